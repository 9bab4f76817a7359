"""Completions of a server: rows and answers, each with its request and the checks of its reply.

T are the tokens of a sequence.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter
from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError, TeacherError
from pipeline.records import Prompt
from teachers.endpoint.answers import read_answer, with_thoughts
from teachers.endpoint.batches import Batches
from teachers.endpoint.forms import RequestForms
from teachers.endpoint.reading import expected_bytes
from teachers.endpoint.replies import (
    MOST_IDS,
    TEXT_REPLY,
    TOKEN_REPLY,
    TokenChoice,
    refuse_duplicates,
    sorted_rows,
)
from teachers.endpoint.transport import Requester
from teachers.engine.prompt_topk import BrokenRowsError
from teachers.protocol import CapturedRows, EndpointSpec, GeneratedAnswer
from teachers.tokenizing import answer_ids, begins_in_thought, repeats_bos, vocabulary_size

FINISHED = ("stop", "length", "repetition")
"""Proper ends of an answer of a vLLM server."""
LONGEST_TOKEN_CHARACTERS = 256
"""Characters that no token of a vocabulary has more of, in the mean of an answer."""
PLAIN_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Defaults of vLLM's `SamplingParams`. They are sent in full, because a server takes the defaults
of the model's generation config for those left out."""


class Completions:
    """Completions of one endpoint, for requests that fit into its context."""

    def __init__(
        self,
        spec: EndpointSpec,
        requester: Requester,
        batches: Batches | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """`batches`: batches in which requests wait for their replies; None to ask at once."""
        self._endpoint, self._eos_token_ids = spec.endpoint, spec.eos_token_ids
        self._requester, self._batches = requester, batches
        self._forms = RequestForms(f"{spec.endpoint.url} ({spec.endpoint.model})")
        self._tokenizer: Any = tokenizer  # upstream's stubs are too wide
        self._vocabulary = MOST_IDS if spec.is_padded else vocabulary_size(tokenizer)

    async def rows(self, input_ids: list[int], first_index: int, width: int) -> CapturedRows:
        """Captures the distributions over the tokens at indices `first_index` to T - 1.

        Raises:
            TeacherError: the server refuses the sequence, or its rows break an invariant.
        """
        body = {
            "prompt": input_ids,
            "add_special_tokens": False,
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": width,
            "return_token_ids": True,
        }
        choice = await self._choice(
            "/completions", TOKEN_REPLY, body, len(input_ids), refuse_duplicates
        )
        self._check_prompt(choice, input_ids)
        positions = choice.get("prompt_logprobs")
        if positions is None or len(positions) != len(input_ids):
            raise BrokenRowsError(
                f"{self._endpoint.url} returned log-probabilities of {len(positions or ())} "
                f"positions for {len(input_ids)} tokens: check that it is a vLLM server"
            )
        entries = [position or {} for position in positions[first_index:]]
        gold_ids, vocabulary = input_ids[first_index:], self._vocabulary
        captured = sorted_rows(entries, gold_ids, width, vocabulary, self._endpoint.url)
        return captured.rows([*input_ids], first_index, width)

    async def token_answer(
        self, prompt_ids: list[int], sampling: dict[str, Any]
    ) -> GeneratedAnswer:
        """Generates an answer to token ids, as token ids; for servers with `api: vllm`."""
        started = time.monotonic()
        end_ids = () if sampling.get("ignore_eos") else self._eos_token_ids
        body = PLAIN_SAMPLING | sampling
        body |= {
            "prompt": prompt_ids,
            "add_special_tokens": False,
            "return_token_ids": True,
            "stop_token_ids": [*(sampling.get("stop_token_ids") or ()), *end_ids],
        }
        choice = await self._choice("/completions", TOKEN_REPLY, body, len(prompt_ids))
        self._check_prompt(choice, prompt_ids)
        token_ids = choice.get("token_ids")
        if token_ids is None:
            raise ConfigError(
                f"{self._endpoint.url} returns no token ids, so it is no vLLM server or an old "
                "one: update it, or set `api: openai` and `scores: false`"
            )
        reason = choice.get("finish_reason")
        if reason not in FINISHED:
            raise self._broken_off(reason)
        self._check_answer(token_ids, body["max_tokens"], body["stop_token_ids"])
        return GeneratedAnswer(token_ids, reason, time.monotonic() - started)

    async def text_answer(
        self, prompt_ids: list[int], prompt: Prompt, sampling: dict[str, Any]
    ) -> GeneratedAnswer:
        """Generates an answer to text, as text; for servers with `api: openai`.

        The student's tokenizer turns the answer into token ids that follow those of the prompt. An
        answer whose end has an unknown name gets no end of sequence.
        """
        started = time.monotonic()
        if prompt.messages is None:
            text = str(prompt.text)
            if repeats_bos(self._tokenizer, text):  # the server adds its own
                text = text.removeprefix(self._tokenizer.bos_token)
            path = "/completions"
            question: dict[str, Any] = {"prompt": text}
        else:
            path, question = "/chat/completions", {"messages": list(prompt.messages)}
            if self._endpoint.template_arguments:
                question["chat_template_kwargs"] = self._endpoint.template_arguments
        choice = await self._choice(path, TEXT_REPLY, sampling | question)
        answer = read_answer(choice)
        if answer.end == "failed":
            raise self._broken_off(choice.get("finish_reason"))
        if len(answer.text) > LONGEST_TOKEN_CHARACTERS * sampling["max_tokens"]:
            raise TeacherError(
                f"{self._endpoint.url} returned {len(answer.text)} characters where "
                f"{sampling['max_tokens']} tokens were asked for, so it does not know max_tokens: "
                "name what this server takes in endpoint.request (rename)"
            )
        text, is_opened = answer.text, begins_in_thought(self._tokenizer, prompt_ids)
        if self._endpoint.reasoning == "keep" and (answer.thoughts or is_opened):
            text = with_thoughts(answer, is_opened)
        elif answer.thoughts:
            text = text.lstrip()
        token_ids = answer_ids(self._tokenizer, prompt, prompt_ids, text) if text else []
        end = [self._tokenizer.eos_token_id] if answer.end == "stop" else []
        seconds = time.monotonic() - started
        return GeneratedAnswer([*token_ids, *end], answer.end, seconds, bool(answer.thoughts))

    async def _choice(
        self,
        path: str,
        kind: TypeAdapter[Any],
        body: dict[str, Any],
        num_prompt_tokens: int = 0,
        check: Callable[[bytes, Any], None] | None = None,
    ) -> Any:
        async def send(body: dict[str, Any], alone: bool) -> Any:
            request = self._endpoint.request.applied({"model": self._endpoint.model, **body})
            most = expected_bytes(request, body["max_tokens"], num_prompt_tokens)
            if self._batches is None or alone:
                return await self._requester.ask(
                    path, kind, request, ahead=alone, expected_bytes=most, check=check
                )
            return await self._batches.ask(path, kind, request, most)

        return (await self._forms.ask(body, send))["choices"][0]

    def _check_prompt(self, choice: TokenChoice, input_ids: list[int]) -> None:
        """Refuses a server that cut or changed the prompt."""
        theirs = choice.get("prompt_token_ids")
        if theirs is not None and theirs != input_ids:
            raise TeacherError(
                f"{self._endpoint.url} read {len(theirs)} tokens where {len(input_ids)} were sent, "
                "or other ones: the server must take token ids unchanged"
            )

    def _check_answer(self, token_ids: list[int], most: int, end_ids: list[int]) -> None:
        """Refuses an answer of tokens that the model cannot have, or one that goes on behind its
        end or beyond what was asked for.
        """
        problem = None
        if max(token_ids, default=0) >= self._vocabulary:
            problem = f"token {max(token_ids)} of a vocabulary of {self._vocabulary} tokens"
        elif len(token_ids) > most:
            problem = f"{len(token_ids)} tokens where at most {most} were asked for"
        elif behind := [i for i in token_ids[:-1] if i in end_ids]:
            problem = f"token {behind[0]}, which ends an answer, in the middle of one"
        if problem:
            raise TeacherError(
                f"{self._endpoint.url} returned {problem}: check that it is a vLLM server"
            )

    def _broken_off(self, reason: str | None) -> TeacherError:
        words = self._requester.shown(repr(reason), 60)
        return TeacherError(
            f"{self._endpoint.url}: an answer ended by {words}, so the server broke it off"
        )
