"""vLLM engine of this process: start, requests with their limits, shutdown.

`teachers/engine/arguments.py` lists the arguments that we set if the user's `vllm:` block does not
name them.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMError
from vllm.inputs import tokens_input
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from pipeline.errors import TeacherError
from teachers.engine import arguments
from teachers.engine.hidden_states import HiddenStatesFolder, take_hidden_states
from teachers.engine.options import check_engine_arguments
from teachers.protocol import EngineDiedError, EngineSpec
from teachers.rope import check_context


class RunningEngine:
    """One engine; all its requests run in the event loop that started it.

    Attributes:
        spec: specification that the engine was started from.
        llm: vLLM's front end of the engine.
        config: vLLM's config of the engine.
        max_model_len: number of tokens that a request may have.
        vocabulary: number of token ids.
        dtype: dtype of the weights, such as `bfloat16`.
        load_seconds: time that the model took to load.
    """

    def __init__(
        self,
        spec: EngineSpec,
        llm: AsyncLLM,
        folder: HiddenStatesFolder | None,
        load_seconds: float,
    ) -> None:
        """`folder`: where the engine leaves hidden states, if it captures any."""
        self.spec, self.llm, self.load_seconds = spec, llm, load_seconds
        self._folder = folder
        self.config = llm.vllm_config
        self.max_model_len = self.config.model_config.max_model_len
        self.vocabulary = self.config.model_config.get_vocab_size()
        self.dtype = str(self.config.model_config.dtype).removeprefix("torch.")
        self._request_numbers = itertools.count()
        # Requests wait here: enough for a busy engine, few enough to bound the memory of rows.
        self._slots = asyncio.Semaphore(2 * self.config.scheduler_config.max_num_seqs)

    @classmethod
    def start(cls, spec: EngineSpec) -> RunningEngine:
        """Loads the model; blocks the event loop meanwhile.

        Raises:
            ConfigError: the `vllm:` block has an unknown or contradictory key.
            TeacherError: vLLM refuses the model or an argument.
        """
        check_engine_arguments(spec.vllm, spec.num_logprobs, bool(spec.hidden_layers))
        chosen, on_cpu = arguments.engine_arguments(spec), current_platform.is_cpu()
        folder = HiddenStatesFolder() if spec.hidden_layers else None
        if folder is not None:
            chosen |= folder.engine_arguments(spec.hidden_layers, on_cpu=on_cpu)
        started, quiet = time.monotonic(), chosen["disable_log_stats"]
        try:
            if on_cpu:
                has_state = AsyncEngineArgs(**chosen).create_model_config().has_inner_state
                chosen = arguments.cpu_arguments(spec, chosen, has_state)
            config = AsyncEngineArgs(**chosen).create_engine_config()
            check_context(spec, config.model_config.hf_text_config)
            llm = AsyncLLM.from_vllm_config(config, disable_log_stats=quiet)
        except (VLLMError, ValueError) as error:
            raise TeacherError(f"vLLM refuses to start {spec.model}: {error}") from error
        return cls(spec, llm, folder, time.monotonic() - started)

    @property
    def rounding(self) -> dict[str, Any]:
        """Metadata that decide how much the engine rounds (`teachers/noise.py`)."""
        layers = self.config.model_config.get_total_num_hidden_layers()
        return {"dtype": self.dtype, "num_layers": layers}

    @property
    def captures_hidden_states(self) -> bool:
        """Whether the engine was started with `hidden_layers`."""
        return self._folder is not None

    def shutdown(self) -> None:
        """Stops the engine's processes and removes the hidden states that are left."""
        self.llm.shutdown()
        del self.llm  # its finalizer complains when the interpreter runs it
        if self._folder is not None:
            self._folder.remove()

    def check_request(self, token_ids: list[int], new_tokens: int) -> None:
        """Refuses a request that vLLM would cut at its context, and ids that vLLM does not check.

        Without a tokenizer vLLM takes any id, and an id outside the vocabulary kills the engine.

        Args:
            token_ids: tokens of the request.
            new_tokens: number of tokens to generate.

        Raises:
            TeacherError: the request does not fit.
        """
        if len(token_ids) + new_tokens > self.max_model_len:
            raise TeacherError(
                f"{self.spec.model}: {len(token_ids)} tokens and room for {new_tokens} exceed "
                f"max_model_len {self.max_model_len}; raise it or leave such sequences out"
            )
        if not token_ids or min(token_ids) < 0 or max(token_ids) >= self.vocabulary:
            raise TeacherError(
                f"{self.spec.model}: a request is empty or has token ids outside 0 to "
                f"{self.vocabulary - 1}; check that the teacher shares the student's vocabulary"
            )

    async def finish(
        self,
        input_ids: list[int],
        parameters: SamplingParams,
        span: tuple[int, int] | None = None,
    ) -> tuple[RequestOutput, np.ndarray | None]:
        """Sends one request and waits for its end.

        Args:
            input_ids: tokens of the prompt.
            parameters: sampling parameters, which also select what the output holds.
            span: first token index of the hidden states to return, and the index after the last.

        Returns:
            The output, and the hidden states (None without a span).

        Raises:
            TeacherError: vLLM failed this request.
            EngineDiedError: the engine is gone.
        """
        async with self._slots:
            name = f"request-{next(self._request_numbers)}"
            try:
                stream = self.llm.generate(tokens_input(input_ids), parameters, name)
                (output,) = [output async for output in stream]
            except EngineDeadError as error:
                raise EngineDiedError(
                    f"the engine of {self.spec.model} died; the actor's log names the cause"
                ) from error
            except VLLMError as error:
                cause = error.__cause__ or error
                raise TeacherError(f"{self.spec.model}: vLLM failed a request: {cause}") from error
            if self._folder is None:
                return output, None
            # An engine that captures hidden states writes them for every request.
            path = (output.kv_transfer_params or {})["hidden_states_path"]
            hidden_states = await asyncio.to_thread(take_hidden_states, path, *(span or (0, 0)))
        return output, hidden_states if span else None
