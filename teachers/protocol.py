"""Contract between a teacher and the tasks that use it; imports neither vLLM nor Ray.

The driver builds an `EngineSpec` or an `EndpointSpec`, and an actor starts a `VllmTeacher` or an
`EndpointTeacher` from it. A task knows only the protocol `Teacher`, which gives it `CapturedRows`
and `GeneratedAnswer`s.

Axis names: P positions, K entries, T tokens of a sequence, L layers, H hidden size.
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

CANARY_ENTRIES = 8
"""Number of most probable entries of each position that a canary compares."""


class EngineDiedError(TeacherError):
    """The engine process or the server is gone: no later request to this teacher can succeed, but
    one to another teacher may.
    """


class ItemRefusedError(TeacherError):
    """The teacher refuses this item, and would refuse it again."""


class ItemsFailedError(TeacherError):
    """Some items of a task failed; the others are done and need not be asked again.

    Attributes:
        result: result of the items that are done.
        failed: for each failed item a task of this item alone, and its error.
    """

    def __init__(self, result: Any, failed: Sequence[tuple[Any, str]]) -> None:
        super().__init__(result, failed)
        self.result, self.failed = result, failed

    def __str__(self) -> str:
        (task, error), *_ = self.failed
        count = "1 item" if len(self.failed) == 1 else f"{len(self.failed)} items"
        return f"{count} failed, the first is {task.label}: {error}"


@dataclass(frozen=True)
class EngineSpec:
    """Specification from which one engine is started.

    Attributes:
        model: folder or hub id of the teacher.
        min_model_len: number of tokens that the engine must accept, the longest sequence + 1 (a
            scored sequence needs room for one generated token, an answer for `max_tokens`).
        revision: hub revision of the model.
        trust_remote_code: run code that comes with the model.
        vllm: engine arguments for vLLM, passed on unchanged.
        num_logprobs: capture width of `score`; 0 if the engine only generates.
        hidden_layers: layers whose hidden states `score` can capture, in ascending order.
        share_prefixes: several sequences to score begin with the same prompt; the engine then keeps
            its prefix cache and computes a prompt once. `vllm: {enable_prefix_caching: …}`
            overrides this.
        seed: seed of the engine; `generate` seeds each sample by itself.
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

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders that the engine's node must have; hub ids may be among them."""
        return (self.model,)


@dataclass(frozen=True)
class EndpointSpec:
    """Specification from which the client of one endpoint is started.

    Attributes:
        endpoint: address of the endpoint, and rules for requests to it.
        student: student, whose tokenizer turns text into token ids.
        min_model_len: number of tokens that the server must accept, as in `EngineSpec`.
        num_logprobs: capture width of `score`; 0 if the endpoint only generates.
        eos_token_ids: tokens that end an answer, beside those that the server knows.
        canary_path: file of the first canary under the endpoint's identity, written if it does not
            exist; None if nothing is scored under this identity.
        batches_folder: folder of the records of batches; None if the endpoint takes none.
        is_padded: a teacher has ids that the tokenizer lacks, so that an id may be one of them.
    """

    endpoint: EndpointConfig
    student: StudentConfig
    min_model_len: int
    num_logprobs: int = 0
    eos_token_ids: tuple[int, ...] = ()
    canary_path: str | None = None
    batches_folder: str | None = None
    is_padded: bool = False

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders that the client's node must have; hub ids may be among them."""
        return (self.student.model,)


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
    """Distributions of a teacher over consecutive tokens of one sequence, at temperature 1.

    Row `r` is over the token at index `first_index + r` of the request. K is the capture width, or
    the size of the vocabulary if that is smaller; K is 0 if the request asks for no distributions.
    An entry may be `-inf` if the model masks its token; such an entry never precedes a finite one.
    Ties keep the engine's order.

    Attributes:
        token_ids: int32[P, K], most probable token first.
        logprobs: float32[P, K], natural log, normalised over the full vocabulary, not increasing
            along K.
        gold_logprobs: float32[P], log-probability of the sequence's own token, `-inf` if the model
            masks it; empty if the request asks for no distributions.
        hidden_states: float32[P, L, H], row `r` at token index `first_index - 1 + r`, of the
            engine's `hidden_layers`; None if the request does not ask for them.
        num_cached_tokens: number of tokens that came from the prefix cache.
        is_rescored: the sequence was scored a second time without the prefix cache, because the
            first rows were incomplete.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    gold_logprobs: np.ndarray
    hidden_states: np.ndarray | None = None
    num_cached_tokens: int = 0
    is_rescored: bool = False

    @classmethod
    def without_distributions(cls, num_rows: int) -> CapturedRows:
        """Rows with K = 0."""
        nothing = np.zeros((num_rows, 0), np.float32)
        return cls(nothing.astype(np.int32), nothing, np.zeros(0, np.float32))

    def followed_by(self, rows: CapturedRows) -> CapturedRows:
        """Concatenates these rows with the rows of the next tokens, whose other fields are kept."""
        return replace(
            rows,
            token_ids=np.concatenate([self.token_ids, rows.token_ids]),
            logprobs=np.concatenate([self.logprobs, rows.logprobs]),
            gold_logprobs=np.concatenate([self.gold_logprobs, rows.gold_logprobs]),
        )

    def with_last_gold(self, logprob: float) -> CapturedRows:
        """Copy of the rows with another log-probability of the last gold token, at most 0."""
        gold_logprobs = self.gold_logprobs.copy()
        gold_logprobs[-1] = min(logprob, 0.0)
        return replace(self, gold_logprobs=gold_logprobs)


@dataclass(frozen=True)
class GeneratedAnswer:
    """One answer to a prompt.

    Attributes:
        token_ids: tokens of the answer alone; the last one is the end-of-sequence token if that
            stopped the answer.
        finish_reason: `stop`, `length` or `repetition`, as the engine reports it; `content_filter`
            or `unknown` too from an endpoint.
        seconds: time from the request to its last token, including the wait inside the engine.
        had_thoughts: the server sent reasoning apart from the answer.
    """

    token_ids: list[int]
    finish_reason: str
    seconds: float
    had_thoughts: bool = False


@dataclass(frozen=True)
class Comparison:
    """Comparison of an engine's log-probabilities with those of transformers, in nats.

    Attributes:
        reason: reason why nothing was compared; None if something was.
        num_tokens: length of the text.
        mean: mean absolute difference, over the own token and the most probable entries of every
            position.
        signed_mean: mean difference.
        largest: largest absolute difference.
        noise: mean absolute difference that rounding explains.
        tolerance: largest `mean` that is accepted.
    """

    reason: str | None
    num_tokens: int = 0
    mean: float = 0.0
    signed_mean: float = 0.0
    largest: float = 0.0
    noise: float = 0.0
    tolerance: float = 0.0

    def __str__(self) -> str:
        if self.reason is not None:
            return f"not compared with transformers: {self.reason}"
        return (
            f"{self.mean:.2g} nats from transformers in the mean of {self.num_tokens} tokens, "
            f"tolerance {self.tolerance:.2g}"
        )


@dataclass(frozen=True)
class Canary:
    """Rows of the short canary from one engine, or from one endpoint.

    Attributes:
        engine: metadata that tells engines apart (version, dtype, quantisation, device), and the
            number of layers.
        gold_logprobs: float32[P], log-probability of the canary's own tokens.
        top_logprobs: float32[P, K], log-probabilities of the most probable entries, descending.
        comparison: comparison of the engine with transformers, if there was one.
    """

    engine: dict[str, Any]
    gold_logprobs: np.ndarray
    top_logprobs: np.ndarray
    comparison: Comparison | None = None

    @classmethod
    def of(cls, rows: CapturedRows, engine: dict[str, Any]) -> Canary:
        """Takes the part of captured rows that is compared."""
        return cls(engine, rows.gold_logprobs, rows.logprobs[:, :CANARY_ENTRIES])


class EarlierRows(Protocol):
    """Rows of earlier answers to the same prompt, for an answer that begins like one of them."""

    async def rows(self, num_cached: int) -> CapturedRows | None:
        """Rows over the tokens at `first_index` to `num_cached`; None if no answer has them.

        Args:
            num_cached: number of tokens in the engine's prefix cache; they determine these rows.
        """
        ...


class Teacher(Protocol):
    """Teacher that a task works with: an engine in the same actor, or an endpoint elsewhere."""

    @property
    def can_score(self) -> bool:
        """Whether the teacher was started to capture rows, and not only to generate."""
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
        """Generates answers to one prompt.

        Args:
            prompt_ids: token ids of the prompt.
            sampling: parameters of vLLM's `SamplingParams`, `max_tokens` among them. Sample `i` has
                the seed `seed + i`, so derive a prompt's seed from a hash. Without a seed, each run
                gives other answers.
            num_samples: number of answers.
            prompt: the prompt itself, which a teacher that exchanges text is sent.

        Raises:
            TeacherError: the prompt cannot be answered, or an answer does not end properly.
            EngineDiedError: the engine or server is gone.
        """
        ...

    def canary(self) -> Canary | None:
        """The canary that this teacher has scored; None if its rows are not stored."""
        ...

    def metadata(self) -> dict[str, Any]:
        """Metadata of the teacher that provenance keeps, as JSON values."""
        ...

    def peak_memory_bytes(self) -> int | None:
        """Peak memory of the teacher's processes on this machine; None if unknown."""
        ...

    def waits_for(self) -> str | None:
        """Event elsewhere that the teacher waits for, for people; None if it works."""
        ...

    def shutdown(self) -> None:
        """Frees memory, processes and connections of the teacher."""
        ...
