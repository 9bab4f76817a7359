"""Teacher that runs elsewhere: a vLLM server that takes and returns token ids, or any
OpenAI-compatible API that takes and returns text.

It stands in for `teachers/engine/vllm_teacher.py`, so that tasks do not know the difference.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from pipeline.errors import ConfigError, TeacherError
from pipeline.records import Prompt
from teachers.canary import CANARY_TOKENS, canary_ids, check_endpoint_canary
from teachers.endpoint.batches import Batches
from teachers.endpoint.completions import Completions
from teachers.endpoint.replies import ANY_REPLY, MODELS_REPLY, VERSION_REPLY
from teachers.endpoint.transport import Requester
from teachers.protocol import (
    CANARY_ENTRIES,
    Canary,
    CapturedRows,
    EarlierRows,
    EndpointSpec,
    EngineDiedError,
    GeneratedAnswer,
    ScoringRequest,
)
from teachers.tokenizing import student_tokenizer

logger = logging.getLogger(__name__)


class EndpointTeacher:
    """Client of one server, made by `start`; all requests run in the event loop of the start.

    Attributes:
        can_score: the teacher was started to capture rows, and not only to generate.
    """

    def __init__(
        self, spec: EndpointSpec, requester: Requester, batches: Batches | None = None
    ) -> None:
        self._spec, self._endpoint, self._requester = spec, spec.endpoint, requester
        self._batches = batches
        self.can_score = spec.num_logprobs > 0
        self._tokenizer, _ = student_tokenizer(spec.student.files)
        self._completions = Completions(spec, requester, batches, self._tokenizer)
        self._max_model_len = spec.endpoint.max_model_len
        self._version: str | None = None
        self._canary: Canary | None = None

    @classmethod
    async def start(
        cls, spec: EndpointSpec, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    ) -> EndpointTeacher:
        """Asks the server for its models, or at least for a sign of life, and scores the canary if
        rows are captured from it.

        Args:
            spec: specification of the endpoint.
            sleep: function that waits for a number of seconds between tries.

        Raises:
            ConfigError: the key is missing or not accepted, or the url or model is wrong.
            TeacherError: the server is not there, its context is too short, it gives fewer
                log-probabilities than needed, or it disagrees with its first canary.
        """
        requester, batches = Requester(spec.endpoint, sleep), None
        if spec.endpoint.batch:
            assert spec.batches_folder is not None, "batches are found again by their records"
            batches = Batches(spec.endpoint, requester, spec.batches_folder, sleep)
        teacher = cls(spec, requester, batches)
        try:
            if spec.endpoint.api == "vllm":
                await teacher._check_server()
            else:
                await teacher._reach()
            if spec.canary_path is not None:
                await teacher._score_canary(spec.canary_path)
        except EngineDiedError as error:  # another actor would not find the server either
            await teacher._requester.close()
            raise TeacherError(
                f"{error}; what is finished is kept: run it again when the server is back"
            ) from None
        except (ConfigError, TeacherError):
            await teacher._requester.close()
            raise
        return teacher

    async def score(
        self, request: ScoringRequest, earlier: EarlierRows | None = None
    ) -> CapturedRows:
        """Captures the distributions that a request asks for; see `Teacher.score`.

        Args:
            request: sequence and first token; an endpoint captures no hidden states.
            earlier: not used, since the server returns every row.
        """
        assert self.can_score, "an endpoint started with num_logprobs=0 cannot score"
        num_tokens = len(request.input_ids)
        assert request.distributions, "an endpoint captures distributions"
        assert not request.hidden_states, "the config asks an endpoint for no hidden states"
        assert 1 <= request.first_index < num_tokens, f"row {request.first_index} of {num_tokens}"
        return await self._rows(request.input_ids, request.first_index, self._spec.num_logprobs)

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: dict[str, Any],
        num_samples: int,
        prompt: Prompt | None = None,
    ) -> list[GeneratedAnswer]:
        """Generates answers to one prompt; see `Teacher.generate`.

        A server with `api: vllm` is sent the ids, a server with `api: openai` the prompt itself.
        """
        given = {key: value for key, value in sampling.items() if value is not None}
        seeds = [given["seed"] + i if "seed" in given else None for i in range(num_samples)]
        samplings = [given | ({} if seed is None else {"seed": seed}) for seed in seeds]
        if self._endpoint.api == "vllm":
            self._check_length(prompt_ids, given["max_tokens"])
            answers = [self._completions.token_answer(prompt_ids, each) for each in samplings]
        else:
            assert prompt is not None, "text is exchanged"
            answers = [
                self._completions.text_answer(prompt_ids, prompt, each) for each in samplings
            ]
        return list(await asyncio.gather(*answers))

    def canary(self) -> Canary | None:
        """The canary that the server has scored; None if its rows belong to no identity."""
        return self._canary

    def metadata(self) -> dict[str, Any]:
        """Metadata of the server that provenance keeps, as JSON values."""
        most = self._endpoint.max_logprobs if self._endpoint.scores else 0
        return {
            "engine": "endpoint",
            "engine_version": self._version,
            "api": self._endpoint.api,
            "url": self._endpoint.url,
            "served_model": self._endpoint.model,
            "capture": "endpoint" if most else "none",
            "capture_reason": f"a server elsewhere, at most {most} log-probabilities a position",
            "max_logprobs": most,
            "prefix_sharing": False,
            "hidden_layers": [],
            "dtype": self._endpoint.dtype,
            "quantization": None,
            "max_model_len": self._max_model_len,
            "device": f"endpoint {urlsplit(self._endpoint.url).netloc}",
            "num_parameters": None,
            "weight_bytes": None,
        }

    def waits_for(self) -> str | None:
        """Requests that are tried again, and batches that are not finished; None without any."""
        states = [self._requester.state(), self._batches.state() if self._batches else None]
        return "; ".join(filter(None, states)) or None

    def peak_memory_bytes(self) -> int | None:
        """None, since the server's processes are elsewhere."""
        return None

    def shutdown(self) -> None:
        """Closes the connections; called inside the event loop. Batches go on at the server."""
        if self._batches is not None:
            self._batches.close()
        self._closing = asyncio.get_running_loop().create_task(self._requester.close())

    async def _check_server(self) -> None:
        """Checks that the server has the model with a sufficient context; notes its version."""
        models = (await self._requester.ask("/models", MODELS_REPLY))["data"]
        served = {model.get("id"): model for model in models}
        if self._endpoint.model not in served:
            raise ConfigError(
                f"{self._endpoint.url} does not serve {self._endpoint.model!r}, but "
                f"{self._requester.shown(sorted(map(str, served)))}: set endpoint.model to one of "
                "these"
            )
        theirs = served[self._endpoint.model].get("max_model_len")
        known = [length for length in (theirs, self._max_model_len) if length is not None]
        self._max_model_len = min(known, default=None)
        if self._max_model_len is not None and self._max_model_len < self._spec.min_model_len:
            raise TeacherError(
                f"{self._endpoint.url} holds {self._max_model_len} tokens, but the longest request "
                f"has {self._spec.min_model_len}: start the server with a larger --max-model-len, "
                "or lower synthesis.max_sequence_tokens"
            )
        try:
            url = f"{self._endpoint.url.removesuffix('/v1')}/version"
            version = (await self._requester.ask(url, VERSION_REPLY))["version"]
            self._version = self._requester.shown(version, 60)
        except (ConfigError, TeacherError):  # a proxy that shows the API alone
            self._version = None

    async def _reach(self) -> None:
        """Checks that a server answers. Not every API lists its models, so a refusal suffices."""
        try:
            await self._requester.ask("/models", ANY_REPLY)
        except EngineDiedError:
            raise
        except (ConfigError, TeacherError) as error:
            logger.info("the server answers, but lists no models: %s", error)

    async def _score_canary(self, path: str) -> None:
        """Checks that the server gives enough log-probabilities, and that its model is the same."""
        vocabulary = max(self._tokenizer.get_vocab().values()) + 1
        entries = min(CANARY_ENTRIES, self._endpoint.max_logprobs)
        width = max(self._spec.num_logprobs, entries)
        length = min(CANARY_TOKENS, (self._max_model_len or CANARY_TOKENS + 1) - 1)
        rows = await self._rows(canary_ids(length, vocabulary), 1, width)
        metadata = self.metadata()
        keys = ("engine_version", "dtype", "quantization", "device")
        self._canary = Canary.of(rows, {key: metadata[key] for key in keys})
        name = f"{self._endpoint.url} ({self._endpoint.model})"
        await asyncio.to_thread(check_endpoint_canary, path, name, self._canary)

    async def _rows(self, input_ids: list[int], first_index: int, width: int) -> CapturedRows:
        self._check_length(input_ids, 1)
        return await self._completions.rows(input_ids, first_index, width)

    def _check_length(self, token_ids: list[int], new_tokens: int) -> None:
        """Refuses what the server would cut: it lowers `max_tokens` to what its context leaves."""
        limit = self._max_model_len
        if limit is not None and len(token_ids) + new_tokens > limit:
            raise TeacherError(
                f"{self._endpoint.url}: {len(token_ids)} tokens and room for {new_tokens} exceed "
                f"its max_model_len {limit}; raise it or leave such sequences out"
            )
