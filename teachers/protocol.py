"""The words between a teacher's engine and the tasks that use it; imports neither vLLM nor Ray.

A driver builds an `EngineSpec` or an `EndpointSpec`; an actor starts a `VllmTeacher` or an
`EndpointTeacher` from it; a task receives `CapturedRows` and `GeneratedAnswer`s from that
`Teacher`, whichever it is. Axis names: P positions, K entries, T
tokens of a sequence, L layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from pipeline.config.student import StudentConfig
from pipeline.config.teachers import EndpointConfig
from pipeline.errors import TeacherError
from pipeline.records import Prompt

HEAD_ENTRIES = 8
"""Most probable entries of each position that a canary compares."""


class EngineDiedError(TeacherError):
    """The engine process is gone: no later request to this teacher can succeed, another one may."""


class ItemsFailedError(TeacherError):
    """Some items of a task failed; the others are done, and need not be asked again.

    Attributes:
        result: of the part that is done.
        failed: a task of each item that failed, and its error.
    """

    def __init__(self, result: Any, failed: Sequence[tuple[Any, str]]) -> None:
        super().__init__(result, failed)
        self.result, self.failed = result, failed

    def __str__(self) -> str:
        (task, error), *_ = self.failed
        return f"{len(self.failed)} failed, first {task.label}: {error}"


@dataclass(frozen=True)
class EngineSpec:
    """What one engine is started with.

    Attributes:
        model: folder or hub id.
        min_model_len: tokens that the engine must accept, the longest sequence + 1 (a scored
            sequence needs room for one generated token, an answer for `max_tokens` of them).
        revision: hub revision.
        trust_remote_code: run code that comes with the model.
        vllm: engine arguments of vLLM, verbatim.
        num_logprobs: capture width of `score`; 0 when the engine only generates.
        hidden_layers: whose states `score` can capture, in ascending order.
        share_prefixes: several sequences to score begin with one prompt; the engine then keeps its
            prefix cache and computes a prompt once. `vllm: {enable_prefix_caching: …}` overrides.
        seed: of the engine; samples are seeded one by one in `generate`.
        eos_token_ids: tokens that end an answer, beside those of the model's own generation config.
    """

    model: str
    min_model_len: int
    revision: str | None = None
    trust_remote_code: bool = False
    vllm: dict[str, Any] = field(default_factory=dict)
    num_logprobs: int = 0
    hidden_layers: tuple[int, ...] = ()
    share_prefixes: bool = False
    seed: int = 0
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class EndpointSpec:
    """What the actor that asks one endpoint is started with.

    Attributes:
        endpoint: where and how it is asked.
        student: whose tokenizer makes token ids of text.
        min_model_len: tokens that the server must accept, as in `EngineSpec`.
        num_logprobs: capture width of `score`; 0 when it only writes.
        eos_token_ids: tokens that end an answer, beside those that the server knows.
        canary_path: what it said of the canary when it was first asked; written where nothing lies.
            None where nothing is scored under this identity.
    """

    endpoint: EndpointConfig
    student: StudentConfig
    min_model_len: int
    num_logprobs: int = 0
    eos_token_ids: tuple[int, ...] = ()
    canary_path: str | None = None


@dataclass(frozen=True)
class ScoringRequest:
    """One sequence to score, and what to capture of it.

    Attributes:
        input_ids: the T tokens of the sequence.
        first_index: index of the first token with a row; at least 1, since no distribution is over
            token 0.
        distributions: capture the distributions over the tokens at `first_index` to T - 1.
        hidden_states: capture the hidden states that these distributions are computed from, of the
            engine's `hidden_layers`.
    """

    input_ids: list[int]
    first_index: int
    distributions: bool = True
    hidden_states: bool = False


@dataclass(frozen=True)
class CapturedRows:
    """A teacher's distributions over consecutive tokens of one sequence, at temperature 1.

    Row `r` of `score` is over the token at index `first_index + r`. K is
    the capture width, or the vocabulary where that is smaller; where no distributions were asked
    for it is 0. An entry may be `-inf` (the model
    masks that id); it never stands before a finite one. Ties keep the engine's order.

    Attributes:
        token_ids: int32[P, K], most probable first.
        logprobs: float32[P, K], natural log, normalised over the full vocabulary, not increasing
            along K.
        gold_logprobs: float32[P], of the sequence's own token; `-inf` where the model masks it;
            empty where no distributions were asked for.
        hidden_states: float32[P, L, H], row `r` at index `first_index - 1 + r`, of the engine's
            layers; None where they were not asked for.
        num_cached_tokens: tokens of the sequence that were not computed again.
        is_rescored: rows that the prefix cache left incomplete were thrown away for these.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    gold_logprobs: np.ndarray
    hidden_states: np.ndarray | None = None
    num_cached_tokens: int = 0
    is_rescored: bool = False

    @classmethod
    def without_distributions(cls, num_rows: int) -> CapturedRows:
        """Rows of K = 0."""
        nothing = np.zeros((num_rows, 0), np.float32)
        return cls(nothing.astype(np.int32), nothing, np.zeros(0, np.float32))

    def followed_by(self, rows: CapturedRows) -> CapturedRows:
        """These rows and then those of the tokens after them, which say what was computed."""
        return replace(
            rows,
            token_ids=np.concatenate([self.token_ids, rows.token_ids]),
            logprobs=np.concatenate([self.logprobs, rows.logprobs]),
            gold_logprobs=np.concatenate([self.gold_logprobs, rows.gold_logprobs]),
        )

    def with_last_gold(self, logprob: float) -> CapturedRows:
        """The same rows, where the last one's gold token has this log-probability, at most 0."""
        gold_logprobs = self.gold_logprobs.copy()
        gold_logprobs[-1] = min(logprob, 0.0)
        return replace(self, gold_logprobs=gold_logprobs)


@dataclass(frozen=True)
class GeneratedAnswer:
    """One answer.

    Attributes:
        token_ids: of the answer alone; ends with the end-of-sequence token when that stopped it.
        finish_reason: `stop`, `length` or `repetition`, as the engine reports it; of an endpoint
            also `content_filter`.
        seconds: from the request to its last token, waiting inside the engine included.
    """

    token_ids: list[int]
    finish_reason: str
    seconds: float


@dataclass(frozen=True)
class Canary:
    """What one engine says of the short canary.

    Attributes:
        engine: version, dtype, quantisation, device: which engine it is.
        gold_logprobs: float32[P].
        head_logprobs: float32[P, K], of the most probable entries, descending.
    """

    engine: dict[str, str | None]
    gold_logprobs: np.ndarray
    head_logprobs: np.ndarray

    @classmethod
    def of(cls, rows: CapturedRows, engine: dict[str, str | None]) -> Canary:
        """The part of captured rows that is compared."""
        return cls(engine, rows.gold_logprobs, rows.logprobs[:, :HEAD_ENTRIES])


class EarlierRows(Protocol):
    """Rows that answers to the same prompt already have, for an answer that begins like them."""

    async def rows(self, num_cached: int) -> CapturedRows | None:
        """The rows over the tokens at `first_index` to `num_cached`; None if no answer has them.

        Args:
            num_cached: tokens that lie in the engine's cache; they decide these rows.
        """
        ...


class Teacher(Protocol):
    """What tasks are given: an engine beside them, or an endpoint elsewhere."""

    @property
    def can_score(self) -> bool:
        """Whether it was started to capture rows, and not to generate alone."""
        ...

    async def score(
        self, request: ScoringRequest, earlier: EarlierRows | None = None
    ) -> CapturedRows:
        """Captures what a request asks for.

        Args:
            request: sequence, first token and what to capture.
            earlier: rows of earlier answers to the same prompt. A teacher takes them for tokens
                that its prefix cache holds and gives no rows for.

        Raises:
            TeacherError: the sequence is too long, has a token outside the vocabulary, or its rows
                break an invariant.
            EngineDiedError: the engine or server is gone.
        """
        ...

    async def generate(
        self,
        prompt_ids: list[int],
        sampling: dict[str, Any],
        num_samples: int,
        prompt: Prompt | None = None,
    ) -> list[GeneratedAnswer]:
        """Answers to one prompt.

        Args:
            prompt: what the ids were made of; a teacher that exchanges text is sent this.
        """
        ...

    def canary(self) -> Canary | None:
        """What it said of the canary; None where none of its rows are kept."""
        ...

    def metadata(self) -> dict[str, Any]:
        """What provenance keeps of it, as JSON values."""
        ...

    def peak_memory_bytes(self) -> int | None:
        """Of its processes here."""
        ...

    def shutdown(self) -> None:
        """Frees what it holds."""
        ...
