"""Teacher in a vLLM engine: scores given tokens and writes answers.

`running_engine` holds the engine and its requests, `row_capture` turns outputs into rows.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import vllm
from vllm import SamplingParams
from vllm.platforms import current_platform
from vllm.third_party import pynvml

from pipeline.errors import TeacherError
from pipeline.records import Prompt
from teachers.canary import canary_ids, full_step, full_step_death
from teachers.engine import hardware, reference
from teachers.engine.options import answer_parameters
from teachers.engine.row_capture import RowCapture
from teachers.engine.running_engine import RunningEngine
from teachers.protocol import (
    Canary,
    CapturedRows,
    Comparison,
    EarlierRows,
    EngineDiedError,
    EngineSpec,
    GeneratedAnswer,
    ScoringRequest,
)

FINISHED = ("stop", "length", "repetition")


class VllmTeacher:
    """Teacher with one engine, made by `start`; all requests run in the event loop of the start.

    Attributes:
        engine: the vLLM engine.
        capture: capture of rows from the engine.
        can_score: the engine was started to capture rows, and not only to generate.
    """

    def __init__(self, engine: RunningEngine) -> None:
        self.engine, self._spec = engine, engine.spec
        self.capture = RowCapture(engine)
        self.can_score = engine.spec.num_logprobs > 0
        self._canary: Canary | None = None

    @classmethod
    async def start(cls, spec: EngineSpec) -> VllmTeacher:
        """Loads the model, chooses how rows are captured and scores the largest step once.

        Blocks the event loop while the model loads.

        Raises:
            ConfigError: the `vllm:` block has an unknown or contradictory key.
            TeacherError: vLLM refuses the model or an argument, or the model's context is too
                short.
            EngineDiedError: the largest step kills the engine, most likely because memory runs out.
        """
        teacher = cls(RunningEngine.start(spec))
        try:
            teacher.engine.check_request([0], spec.min_model_len - 1)
            if teacher.can_score:
                rows = await teacher.capture.choose_mode()
                teacher._canary = Canary.of(rows, teacher.metadata())
                await teacher.capture.check_shared_hidden_states()
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
        num_tokens = len(request.input_ids)
        assert 1 <= request.first_index < num_tokens, f"row {request.first_index} of {num_tokens}"
        can_capture = self.engine.captures_hidden_states
        assert can_capture or not request.hidden_states, "an engine started without hidden_layers"
        self.engine.check_request(request.input_ids, 1)
        return await self.capture.score(request, earlier)

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: dict[str, Any],
        num_samples: int,
        prompt: Prompt | None = None,
    ) -> list[GeneratedAnswer]:
        """Generates answers to one prompt, given by its ids alone; see `Teacher.generate`."""
        self.engine.check_request(prompt_ids, sampling["max_tokens"])
        ends = self._spec.eos_token_ids
        parameters = [answer_parameters(sampling, ends) for _ in range(num_samples)]
        for i, each in enumerate(parameters):
            each.seed = None if each.seed is None else each.seed + i
        return list(await asyncio.gather(*(self._answer(prompt_ids, each) for each in parameters)))

    async def compare_with_transformers(self) -> Comparison:
        """Compares the engine's log-probabilities with those of transformers, where memory allows.

        Raises:
            EngineDiedError: the engine is gone.
        """
        config = self.engine.config.model_config.hf_config.to_dict()
        length = reference.num_tokens(config, self.engine.max_model_len - 1)
        engine, vocabulary = self.metadata(), self.engine.vocabulary
        reason = reference.reason_not_to_compare(self._spec, engine, length, vocabulary)
        if reason is not None:
            return Comparison(reason)
        ids = canary_ids(length, vocabulary)
        rows = await self.score(ScoringRequest(ids, 1))
        return await asyncio.to_thread(reference.compare, self._spec, engine, ids, rows)

    def canary(self) -> Canary | None:
        """The canary that the engine has scored; None if the engine only generates."""
        return self._canary

    def metadata(self) -> dict[str, Any]:
        """Metadata of the engine that provenance keeps, as JSON values."""
        config = self.engine.config
        num_parameters, weight_bytes = hardware.weight_size(self._spec.model, self._spec.revision)
        on_cpu = current_platform.is_cpu()
        return {
            "engine": "vllm",
            "engine_version": vllm.__version__,
            "model_runner": "V2" if config.use_v2_model_runner else "V1",
            "capture": self.capture.mode,
            "capture_reason": self.capture.reason,
            "prefix_sharing": self.capture.shares_prefixes,
            "prefix_sharing_reason": self.capture.sharing_reason,
            "hidden_layers": list(self._spec.hidden_layers),
            **self.engine.rounding,
            "quantization": config.model_config.quantization,
            "max_model_len": self.engine.max_model_len,
            "device": hardware.cpu_name() if on_cpu else current_platform.get_device_name(),
            "num_devices": config.parallel_config.world_size,
            "num_parameters": num_parameters,
            "weight_bytes": weight_bytes,
            "load_seconds": self.engine.load_seconds,
        }

    def waits_for(self) -> str | None:
        """None, since an engine works."""
        return None

    def peak_memory_bytes(self) -> int | None:
        """Memory of the engine's processes: peak host memory, or on a GPU device memory in use."""
        if current_platform.is_cpu():
            return hardware.host_memory_bytes()
        return hardware.device_memory_bytes(pynvml)

    def shutdown(self) -> None:
        """Stops the engine's processes and undoes the override of vLLM's method."""
        self.capture.restore()
        self.engine.shutdown()

    async def _score_full_step(self) -> None:
        """Scores the largest step, so that memory runs out now or never: vLLM's memory profile does
        not know prompt log-probabilities.
        """
        scheduler = self.engine.config.scheduler_config
        sequences = full_step(
            self._spec.min_model_len - 1,
            self.engine.vocabulary,
            scheduler.max_num_batched_tokens,
            scheduler.max_num_seqs,
        )
        captures_hidden_states = self.engine.captures_hidden_states
        requests = [
            ScoringRequest(ids, 1, hidden_states=captures_hidden_states) for ids in sequences
        ]
        try:
            await asyncio.gather(*map(self.score, requests))
        except EngineDiedError as error:
            message = full_step_death(len(sequences), self._spec, self.engine.config)
            raise EngineDiedError(message) from error

    async def _answer(self, prompt_ids: list[int], parameters: SamplingParams) -> GeneratedAnswer:
        started = time.monotonic()
        output = (await self.engine.finish(prompt_ids, parameters))[0].outputs[0]
        if output.finish_reason not in FINISHED:
            raise TeacherError(
                f"{self._spec.model}: an answer ended by {output.finish_reason!r}, and only "
                f"{', '.join(FINISHED)} are proper ends"
            )
        seconds = time.monotonic() - started
        return GeneratedAnswer(list(output.token_ids), output.finish_reason, seconds)
