"""A teacher that runs elsewhere: a vLLM server that takes and returns token ids, or any
OpenAI-compatible API that takes and returns text.

It takes the place that `teachers/engine/vllm_teacher.py` has for engines of this run, so that tasks
do not know the difference. T are the tokens of a sequence.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import TypeAdapter

from pipeline.errors import ConfigError, TeacherError
from pipeline.records import Prompt
from teachers.canary import CANARY_TOKENS, canary_ids, hold_to_first
from teachers.endpoint.replies import (
    ANYTHING,
    MODELS,
    TEXT_REPLY,
    TOKEN_REPLY,
    VERSION,
    TokenChoice,
    sorted_rows,
)
from teachers.endpoint.transport import Requester
from teachers.engine.prompt_topk import BrokenRowsError
from teachers.protocol import (
    HEAD_ENTRIES,
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

Reply = TypeVar("Reply")
FINISHED = {
    "vllm": ("stop", "length", "repetition"),
    "openai": ("stop", "length", "content_filter"),
}
PLAIN_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""SamplingParams' own defaults: a server takes what the model's generation config says instead."""


class EndpointTeacher:
    """One server, made by `start`. All its requests run in the event loop that started it."""

    def __init__(self, spec: EndpointSpec, requester: Requester) -> None:
        self._spec, self._endpoint, self._requester = spec, spec.endpoint, requester
        self.can_score = spec.num_logprobs > 0
        tokenizer, _ = student_tokenizer(spec.student.files)
        self._tokenizer: Any = tokenizer  # upstream's stubs are too wide
        self._max_model_len = spec.endpoint.max_model_len
        self._version: str | None = None
        self._canary: Canary | None = None

    @classmethod
    async def start(
        cls, spec: EndpointSpec, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
    ) -> EndpointTeacher:
        """Asks the server who it is, or at least whether it is there; where rows are captured from
        it, also for the canary.

        Args:
            sleep: waits so many seconds between tries.

        Raises:
            ConfigError: the key is missing or not accepted, or the url or model is wrong.
            TeacherError: the server is not there, its context is too short, it gives fewer
                log-probabilities than wanted, or it no longer says what it said at first.
        """
        teacher = cls(spec, Requester(spec.endpoint, sleep))
        try:
            if spec.endpoint.api == "vllm":
                await teacher._ask_who_it_is()
            else:
                await teacher._reach()
            if spec.canary_path is not None:
                await teacher._score_canary(spec.canary_path)
        except EngineDiedError as error:  # another actor would find nobody there either
            await teacher._requester.close()
            raise TeacherError(f"{error}. What is finished is kept: run it again") from None
        except (ConfigError, TeacherError):
            await teacher._requester.close()
            raise
        return teacher

    async def score(
        self, request: ScoringRequest, earlier: EarlierRows | None = None
    ) -> CapturedRows:
        """The distributions over the tokens at indices `first_index` to T - 1.

        Args:
            earlier: not used, for the server computes every row.

        Raises:
            TeacherError: the server refuses the sequence, or its rows break an invariant.
            EngineDiedError: the server is gone.
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
        """Answers to one prompt.

        Args:
            prompt_ids: what a server with `api: vllm` is sent.
            sampling: vLLM's parameters, `max_tokens` among them. Sample `i` has the seed
                `seed + i`.
            prompt: what a server with `api: openai` is sent.

        Raises:
            TeacherError: the server refuses the prompt, or an answer does not end properly.
            EngineDiedError: the server is gone.
        """
        asked = {key: value for key, value in sampling.items() if value is not None}
        seeds = [asked["seed"] + i if "seed" in asked else None for i in range(num_samples)]
        bodies = [asked | ({} if seed is None else {"seed": seed}) for seed in seeds]
        if self._endpoint.api == "vllm":
            return list(await asyncio.gather(*(self._tokens(prompt_ids, each) for each in bodies)))
        assert prompt is not None, "text is exchanged"
        return list(await asyncio.gather(*(self._text(prompt, each) for each in bodies)))

    def canary(self) -> Canary | None:
        """What the server said of the canary; None where its rows belong to no identity."""
        return self._canary

    def metadata(self) -> dict[str, Any]:
        """What provenance keeps of the server, as JSON values."""
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

    def peak_memory_bytes(self) -> int | None:
        """None, for its processes are elsewhere."""
        return None

    def shutdown(self) -> None:
        """Drops the connections; called inside the event loop."""
        self._closing = asyncio.get_running_loop().create_task(self._requester.close())

    async def _ask_who_it_is(self) -> None:
        """Is the model served, and is its context long enough?"""
        served = {each.get("id"): each for each in (await self._ask("/models", MODELS))["data"]}
        if self._endpoint.model not in served:
            raise ConfigError(
                f"{self._endpoint.url} does not serve {self._endpoint.model!r}, but "
                f"{sorted(map(str, served))}: see endpoint.model"
            )
        theirs = served[self._endpoint.model].get("max_model_len")
        known = [each for each in (theirs, self._max_model_len) if each is not None]
        self._max_model_len = min(known, default=None)
        if self._max_model_len is not None and self._max_model_len < self._spec.min_model_len:
            raise TeacherError(
                f"{self._endpoint.url} holds {self._max_model_len} tokens, and the longest request "
                f"has {self._spec.min_model_len}: start the server with a larger --max-model-len, "
                "or lower synthesis.max_sequence_tokens"
            )
        try:
            root = self._endpoint.url.removesuffix("/v1")
            self._version = (await self._ask(f"{root}/version", VERSION))["version"]
        except (ConfigError, TeacherError):  # a proxy that shows the API alone
            self._version = None

    async def _reach(self) -> None:
        """Is anybody there? Not every API lists its models, so a refusal will do."""
        try:
            await self._ask("/models", ANYTHING)
        except EngineDiedError:
            raise
        except (ConfigError, TeacherError) as error:
            logger.info("%s", error)

    async def _score_canary(self, path: str) -> None:
        """Shows that so many log-probabilities come back, and that the model is still the same."""
        vocabulary = max(self._tokenizer.get_vocab().values()) + 1
        head = min(HEAD_ENTRIES, self._endpoint.max_logprobs)
        width = max(self._spec.num_logprobs, head)
        length = min(CANARY_TOKENS, (self._max_model_len or CANARY_TOKENS + 1) - 1)
        rows = await self._rows(canary_ids(length, vocabulary), 1, width)
        engine = {key: self.metadata()[key] for key in ("engine_version", "dtype", "quantization")}
        self._canary = Canary.of(rows, engine | {"device": self.metadata()["device"]})
        name = f"{self._endpoint.url} ({self._endpoint.model})"
        await asyncio.to_thread(hold_to_first, path, name, self._canary)

    async def _rows(self, input_ids: list[int], first_index: int, width: int) -> CapturedRows:
        self._check_length(input_ids, 1)
        body = {
            "prompt": input_ids,
            "add_special_tokens": False,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": width,
            "return_token_ids": True,
        }
        reply = await self._ask("/completions", TOKEN_REPLY, body)
        choice = reply["choices"][0]
        self._check_prompt(choice, input_ids)
        found = choice.get("prompt_logprobs")
        if found is None or len(found) != len(input_ids):
            raise BrokenRowsError(
                f"{self._endpoint.url} returned log-probabilities of {len(found or ())} positions "
                f"for {len(input_ids)} tokens: is it a vLLM server?"
            )
        positions = [each or {} for each in found[first_index:]]
        captured = sorted_rows(positions, input_ids[first_index:], width, self._endpoint.url)
        return captured.rows([*input_ids], first_index, width)

    async def _tokens(self, prompt_ids: list[int], sampling: dict[str, Any]) -> GeneratedAnswer:
        self._check_length(prompt_ids, sampling["max_tokens"])
        started = time.monotonic()
        end_ids = () if sampling.get("ignore_eos") else self._spec.eos_token_ids
        body = PLAIN_SAMPLING | sampling
        body |= {
            "prompt": prompt_ids,
            "add_special_tokens": False,
            "return_token_ids": True,
            "stop_token_ids": [*sampling.get("stop_token_ids", ()), *end_ids],
        }
        choice = (await self._ask("/completions", TOKEN_REPLY, body))["choices"][0]
        self._check_prompt(choice, prompt_ids)
        token_ids = choice.get("token_ids")
        if token_ids is None:
            raise ConfigError(
                f"{self._endpoint.url} returns no token ids, so it is no vLLM server of today: "
                "update it, or set `api: openai` and `scores: false`"
            )
        finish_reason = self._finished(choice.get("finish_reason"))
        return GeneratedAnswer(token_ids, finish_reason, time.monotonic() - started)

    async def _text(self, prompt: Prompt, sampling: dict[str, Any]) -> GeneratedAnswer:
        started = time.monotonic()
        if prompt.messages is None:
            path, asked = "/completions", {"prompt": prompt.text}
        else:
            path, asked = "/chat/completions", {"messages": list(prompt.messages)}
        choice = (await self._ask(path, TEXT_REPLY, sampling | asked))["choices"][0]
        message = choice.get("message", {})
        said = choice.get("text") or message.get("content") or message.get("refusal") or ""
        finish_reason = self._finished(choice.get("finish_reason"))
        # What looks like a special token in a reply is text like any other.
        token_ids = self._tokenizer(said, add_special_tokens=False, split_special_tokens=True)
        end = [self._tokenizer.eos_token_id] if finish_reason == "stop" else []
        return GeneratedAnswer(
            [*token_ids["input_ids"], *end], finish_reason, time.monotonic() - started
        )

    async def _ask(
        self, path: str, kind: TypeAdapter[Any], body: dict[str, Any] | None = None
    ) -> Any:
        named = None if body is None else {"model": self._endpoint.model, **body}
        return await self._requester.ask(path, kind, named)

    def _check_length(self, token_ids: list[int], new_tokens: int) -> None:
        """Refuses what the server would cut: it lowers `max_tokens` to what its context leaves."""
        limit = self._max_model_len
        if limit is not None and len(token_ids) + new_tokens > limit:
            raise TeacherError(
                f"{self._endpoint.url}: {len(token_ids)} tokens and room for {new_tokens} exceed "
                f"its max_model_len {limit}; raise it or leave such sequences out"
            )

    def _check_prompt(self, choice: TokenChoice, input_ids: list[int]) -> None:
        """Refuses a server that cut or changed what it was sent."""
        theirs = choice.get("prompt_token_ids")
        if theirs is not None and theirs != input_ids:
            raise TeacherError(
                f"{self._endpoint.url} read {len(theirs)} tokens where {len(input_ids)} were sent, "
                "or others: it must take token ids as they are"
            )

    def _finished(self, reason: str | None) -> str:
        if reason not in FINISHED[self._endpoint.api]:
            raise TeacherError(f"{self._endpoint.url}: an answer ended by {reason!r}")
        return reason
