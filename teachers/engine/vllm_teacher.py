"""A teacher: one vLLM engine that scores given tokens and writes answers.

`teachers/engine/arguments.py` lists what we set where the user's `vllm:` block does not name it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMError
from vllm.inputs import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.third_party import pynvml
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.logprobs import LogprobsProcessor

from pipeline.errors import TeacherError
from pipeline.records import Prompt
from teachers.canary import CANARY_TOKENS, canary_ids, died_of, doubt_of_shared_states, full_step
from teachers.engine import arguments, hardware, prompt_topk
from teachers.engine.hidden_states import StateFolder, take_states
from teachers.engine.options import check_engine_arguments
from teachers.engine.prompt_topk import BrokenRowsError, PromptTopK
from teachers.protocol import (
    Canary,
    CapturedRows,
    EarlierRows,
    EngineDiedError,
    EngineSpec,
    GeneratedAnswer,
    ScoringRequest,
)

logger = logging.getLogger(__name__)

CPU_BLOCK_SIZE = 32  # tokens; vLLM's own 128 would cache nothing of a short prompt
FINISHED = ("stop", "length", "repetition")


class VllmTeacher:
    """One engine, made by `start`. All its requests run in the event loop that started it."""

    def __init__(
        self, spec: EngineSpec, engine: AsyncLLM, folder: StateFolder | None, load_seconds: float
    ) -> None:
        """`folder`: where the engine leaves hidden states, if it captures any."""
        self._spec, self._folder, self.can_score = spec, folder, spec.num_logprobs > 0
        self._engine, self._load_seconds = engine, load_seconds
        self._config = engine.vllm_config
        self._max_model_len = self._config.model_config.max_model_len
        self._vocabulary = self._config.model_config.get_vocab_size()
        self._width = min(spec.num_logprobs, self._vocabulary)
        has_prefix_cache = self._config.cache_config.enable_prefix_caching
        self._shares_prefixes = has_prefix_cache and self._width > 0
        self._request_numbers = itertools.count()
        # Requests wait here: enough for a busy engine, few enough to bound the memory of rows.
        self._slots = asyncio.Semaphore(2 * self._config.scheduler_config.max_num_seqs)
        self._restore: Callable[[], None] | None = None
        self._capture, self._capture_reason = "none", "the engine only generates"
        self._canary: Canary | None = None

    @classmethod
    async def start(cls, spec: EngineSpec) -> VllmTeacher:
        """Loads the model, chooses how rows are captured and scores the largest step once.

        Blocks the event loop while it loads.

        Raises:
            ConfigError: the `vllm:` block has an unknown or contradictory key.
            TeacherError: vLLM refuses the model or an argument, or the model's context is too
                short.
            EngineDiedError: the largest step kills the engine, most likely for want of memory.
        """
        check_engine_arguments(spec.vllm, spec.num_logprobs, bool(spec.hidden_layers))
        chosen, on_cpu = arguments.engine_arguments(spec), current_platform.is_cpu()
        folder = StateFolder() if spec.hidden_layers else None
        if folder is not None:
            chosen |= folder.engine_arguments(spec.hidden_layers, on_cpu=on_cpu)
        if on_cpu and chosen.get("enable_prefix_caching"):
            chosen.setdefault("block_size", CPU_BLOCK_SIZE)
        if on_cpu and "max_num_batched_tokens" not in chosen:
            # A step that cuts a prompt with a seed in two kills vLLM 0.32's engine on a CPU.
            chosen.setdefault("enable_chunked_prefill", False)
        started, quiet = time.monotonic(), chosen["disable_log_stats"]
        try:
            config = AsyncEngineArgs(**chosen).create_engine_config()
            engine = AsyncLLM.from_vllm_config(config, disable_log_stats=quiet)
        except (VLLMError, ValueError) as error:
            raise TeacherError(f"vLLM refuses to start {spec.model}: {error}") from error
        teacher = cls(spec, engine, folder, time.monotonic() - started)
        try:
            teacher._check([0], spec.min_model_len - 1)
            if teacher.can_score:
                await teacher._choose_capture()
                await teacher._check_shared_states()
                await teacher._score_full_step()
        except TeacherError:
            teacher.shutdown()
            raise
        return teacher

    async def score(
        self, request: ScoringRequest, earlier: EarlierRows | None = None
    ) -> CapturedRows:
        """Captures what a request asks for; see `Teacher.score`."""
        assert self.can_score, "an engine started with num_logprobs=0 cannot score"
        assert self._folder or not request.hidden_states, "an engine started without hidden_layers"
        num_tokens = len(request.input_ids)
        assert 1 <= request.first_index < num_tokens, f"row {request.first_index} of {num_tokens}"
        self._check(request.input_ids, 1)
        if not self._shares_prefixes:
            return await self._captured(request)
        try:
            return await self._captured(request, read_prefixes=True, earlier=earlier)
        except BrokenRowsError:
            captured = await self._captured(request)
            return dataclasses.replace(captured, is_rescored=True)

    def canary(self) -> Canary | None:
        """What the engine said of the canary; None when it only generates."""
        return self._canary

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: dict[str, Any],
        num_samples: int,
        prompt: Prompt | None = None,
    ) -> list[GeneratedAnswer]:
        """Answers to one prompt.

        Args:
            prompt: what the ids were made of; an engine takes the ids alone.
            sampling: vLLM's parameters, `max_tokens` among them. Sample `i` has the seed
                `seed + i`, so derive a prompt's seed from a hash; without one, runs differ.

        Raises:
            TeacherError: prompt and `max_tokens` exceed what the engine accepts, a token is outside
                the vocabulary, or an answer does not end properly.
            EngineDiedError: the engine is gone.
        """
        self._check(prompt_ids, sampling["max_tokens"])
        # Without a tokenizer vLLM knows only the end tokens of the model's generation config.
        end_ids = () if sampling.get("ignore_eos") else self._spec.eos_token_ids
        fixed: dict[str, Any] = sampling | {
            "stop_token_ids": [*(sampling.get("stop_token_ids") or ()), *end_ids],
            "detokenize": False,
            "output_kind": RequestOutputKind.FINAL_ONLY,
        }
        parameters = [SamplingParams(**fixed) for _ in range(num_samples)]
        for i, each in enumerate(parameters):
            each.seed = None if each.seed is None else each.seed + i
        return list(await asyncio.gather(*(self._answer(prompt_ids, each) for each in parameters)))

    def metadata(self) -> dict[str, Any]:
        """What provenance keeps of the engine, as JSON values."""
        model = self._config.model_config
        num_parameters, weight_bytes = hardware.weight_size(self._spec.model, self._spec.revision)
        on_cpu = current_platform.is_cpu()
        return {
            "engine": "vllm",
            "engine_version": vllm.__version__,
            "model_runner": "V2" if self._config.use_v2_model_runner else "V1",
            "capture": self._capture,
            "capture_reason": self._capture_reason,
            "prefix_sharing": self._shares_prefixes,
            "hidden_layers": list(self._spec.hidden_layers),
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "max_model_len": self._max_model_len,
            "device": hardware.cpu_name() if on_cpu else current_platform.get_device_name(),
            "num_devices": self._config.parallel_config.world_size,
            "num_parameters": num_parameters,
            "weight_bytes": weight_bytes,
            "load_seconds": self._load_seconds,
        }

    def peak_memory_bytes(self) -> int | None:
        """Of the engine's processes: host memory at its peak, or on a GPU device memory in use."""
        if current_platform.is_cpu():
            return hardware.host_memory_bytes()
        return hardware.device_memory_bytes(pynvml)

    def shutdown(self) -> None:
        """Stops the engine's processes and undoes the override."""
        if self._restore:
            self._restore()
        self._engine.shutdown()
        del self._engine  # its finalizer complains when the interpreter runs it
        if self._folder is not None:
            self._folder.remove()

    async def _choose_capture(self) -> None:
        """Takes the arrays where a canary shows that they are what vLLM's public way returns."""
        canary = canary_ids(min(CANARY_TOKENS, self._max_model_len - 1), self._vocabulary)

        async def request_flat() -> Any:
            parameters = self._scoring_parameters(self._width, flat=True, read_prefixes=False)
            return (await self._finish(canary, parameters))[0].prompt_logprobs

        self._restore, reason = await prompt_topk.install_if_equal(LogprobsProcessor, request_flat)
        self._capture = "arrays" if self._restore else "flat"
        self._capture_reason = reason
        rows = await self._captured(ScoringRequest(canary, 1))
        self._canary = Canary.of(rows, self.metadata())
        level = logging.INFO if self._restore else logging.WARNING
        logger.log(level, "%s: capture by %s: %s", self._spec.model, self._capture, reason)

    async def _check_shared_states(self) -> None:
        """Shares prefixes only where states from the prefix cache are those computed anew."""
        if self._folder is None or not self._shares_prefixes:
            return
        # The cache holds whole blocks, and never the last token.
        length = min(2 * self._config.cache_config.block_size + 1, self._max_model_len - 1)
        ids = canary_ids(length, self._vocabulary)
        asked = ScoringRequest(ids, 1, distributions=False, hidden_states=True)
        anew = await self._captured(asked)
        again = await self._captured(asked, read_prefixes=True)
        dtype = str(self._config.model_config.dtype).removeprefix("torch.")
        doubt = doubt_of_shared_states(anew, again, dtype)
        self._shares_prefixes = doubt is None
        if doubt is not None:
            logger.warning("%s: prefixes are not shared: %s", self._spec.model, doubt)

    async def _score_full_step(self) -> None:
        """Lets memory run out now or never: vLLM's profile knows no prompt log-probabilities."""
        scheduler = self._config.scheduler_config
        length = self._spec.min_model_len - 1
        sequences = full_step(
            length, self._vocabulary, scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        )
        try:
            captures_hidden_states = self._folder is not None
            requests = [
                ScoringRequest(ids, 1, hidden_states=captures_hidden_states) for ids in sequences
            ]
            await asyncio.gather(*map(self.score, requests))
        except EngineDiedError as error:
            step = f"{len(sequences)} sequences of {length} tokens with {self._width}"
            raise EngineDiedError(died_of(step, self._spec, self._config)) from error

    async def _captured(
        self, asked: ScoringRequest, read_prefixes: bool = False, earlier: EarlierRows | None = None
    ) -> CapturedRows:
        """Rows inside the cached prefix come from an earlier answer; states all come back."""
        input_ids, first_index = asked.input_ids, asked.first_index
        width = self._width if asked.distributions else None
        parameters = self._scoring_parameters(width, self._capture == "flat", read_prefixes)
        places = (first_index - 1, len(input_ids) - 1) if asked.hidden_states else None
        output, states = await self._finish(input_ids, parameters, places)
        if states is not None and not np.isfinite(states).all():
            raise BrokenRowsError(f"hidden states of {len(input_ids)} tokens are not finite")
        num_cached, known = output.num_cached_tokens or 0, None
        if not asked.distributions:
            rows = CapturedRows.without_distributions(len(input_ids) - first_index)
            return dataclasses.replace(rows, hidden_states=states, num_cached_tokens=num_cached)
        if earlier and first_index <= num_cached < len(input_ids) - 1:
            known = await earlier.rows(num_cached)
            if known is not None and np.isnan(known.gold_logprobs[-1]):
                gold = await self._next_logprob(input_ids[: num_cached + 1])
                known = known.with_last_gold(gold)
        rows = self._rows(output, input_ids, num_cached + 1 if known else first_index)
        rows = known.followed_by(rows) if known else rows
        return dataclasses.replace(rows, hidden_states=states)

    async def _next_logprob(self, input_ids: list[int]) -> float:
        """Of the last token given those before it, whatever the cache holds of these."""
        *before, token = input_ids
        parameters = SamplingParams(
            max_tokens=1,
            temperature=0,
            logprob_token_ids=[token],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        output, _ = await self._finish(before, parameters)
        found = output.outputs[0].logprobs
        assert found is not None, "it was asked for"
        return found[0][token].logprob

    def _rows(self, output: RequestOutput, input_ids: list[int], first_index: int) -> CapturedRows:
        num_cached = output.num_cached_tokens or 0
        # After a preemption vLLM reports the first admission's number; then the rows tell.
        if num_cached >= first_index:
            raise BrokenRowsError(
                f"{num_cached} tokens came from the prefix cache, which has no rows, and rows from "
                f"token {first_index} on are wanted"
            )
        found: Any = output.prompt_logprobs
        if isinstance(found, FlatLogprobs):
            found = PromptTopK.from_flat(found)
        if not isinstance(found, PromptTopK):
            raise BrokenRowsError(f"the engine returned no rows for {len(input_ids)} tokens")
        rows = found.rows(input_ids, first_index, self._width)
        return dataclasses.replace(rows, num_cached_tokens=num_cached)

    def _scoring_parameters(
        self, width: int | None, flat: bool, read_prefixes: bool
    ) -> SamplingParams:
        # Both must reach the constructor: assigned later, vLLM reads its prefix cache unasked.
        return SamplingParams(
            max_tokens=1,
            temperature=0,
            prompt_logprobs=width,
            flat_logprobs=flat,
            skip_reading_prefix_cache=not read_prefixes,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    async def _answer(self, prompt_ids: list[int], parameters: SamplingParams) -> GeneratedAnswer:
        started = time.monotonic()
        output = (await self._finish(prompt_ids, parameters))[0].outputs[0]
        if output.finish_reason not in FINISHED:
            raise TeacherError(f"{self._spec.model}: an answer ended by {output.finish_reason!r}")
        seconds = time.monotonic() - started
        return GeneratedAnswer(list(output.token_ids), output.finish_reason, seconds)

    async def _finish(
        self,
        input_ids: list[int],
        parameters: SamplingParams,
        states: tuple[int, int] | None = None,
    ) -> tuple[RequestOutput, np.ndarray | None]:
        """The output, and the hidden states at the indices from `states[0]` to before `states[1]`.
        An engine that captures states writes them for every request.
        """
        async with self._slots:
            name = f"request-{next(self._request_numbers)}"
            try:
                stream = self._engine.generate(tokens_input(input_ids), parameters, name)
                (output,) = [output async for output in stream]
            except EngineDeadError as error:
                raise EngineDiedError(
                    f"the engine of {self._spec.model} died; the actor's log names the cause"
                ) from error
            except VLLMError as error:
                cause = error.__cause__ or error
                raise TeacherError(f"{self._spec.model}: vLLM failed a request: {cause}") from error
            if self._folder is None:
                return output, None
            path = (output.kv_transfer_params or {})["hidden_states_path"]
            found = await asyncio.to_thread(take_states, path, *(states or (0, 0)))
        return output, found if states else None

    def _check(self, token_ids: list[int], new_tokens: int) -> None:
        """Refuses what vLLM would cut at its context, and ids that it does not check itself.

        Without a tokenizer vLLM takes any id, and one outside the vocabulary kills the engine.
        """
        limit, vocabulary = self._max_model_len, self._vocabulary
        if len(token_ids) + new_tokens > limit:
            raise TeacherError(
                f"{self._spec.model}: {len(token_ids)} tokens and room for {new_tokens} exceed "
                f"max_model_len {limit}; raise it or leave such sequences out"
            )
        if not token_ids or min(token_ids) < 0 or max(token_ids) >= vocabulary:
            raise TeacherError(
                f"{self._spec.model}: a prompt is empty or has ids outside 0 to {vocabulary - 1}"
            )
