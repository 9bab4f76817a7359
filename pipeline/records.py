"""Records that cross the boundaries between stages: frozen, made of plain values and arrays.

Legend of axis names: T tokens of a sequence, P positions (tokens inside the loss spans), N entries
of all positions of a sequence, M teachers, L layers, D width of a stored hidden state.

Position `j` of a sequence stands for token index `i_j`, the j-th index of all loss spans in order.
A teacher's row at position `j` is its distribution over the token at index `i_j` given all tokens
before that index. `input_ids[i_j]` is the gold token of the position.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.fingerprint import digest_json


@dataclass(frozen=True)
class Prompt:
    """One prompt: either chat `messages` or raw `text`, never both.

    Attributes:
        prompt_id: id from the source, or a hash of the content.
        split: `train`, `validation` or `holdout`.
        reference: correct answer, if the source has one.
    """

    prompt_id: str
    domain: str
    split: str
    messages: tuple[dict[str, Any], ...] | None = None
    text: str | None = None
    reference: str | None = None

    @property
    def digest(self) -> str:
        """Hash of everything that answers depend on, which is all but the split."""
        return digest_json([self.prompt_id, self.domain, self.messages, self.text, self.reference])

    def under(self, system: str | None) -> Prompt:
        """Puts a system message before the prompt if it is a chat without one of its own."""
        if system is None or self.messages is None or self.messages[0]["role"] == "system":
            return self
        return replace(self, messages=({"role": "system", "content": system}, *self.messages))

    @property
    def words(self) -> str:
        """Text of the prompt without system messages, which many prompts share."""
        if self.text is not None:
            return self.text
        turns = (message for message in self.messages or () if message["role"] != "system")
        return "\n".join(str(message["content"]) for message in turns)


@dataclass(frozen=True)
class AnswerEnds:
    """Tokens of the student's vocabulary with which the answers of a run end.

    Attributes:
        chat: end of an answer to chat messages, which the chat template writes behind it.
        text: end of an answer to raw text, the tokenizer's end-of-sequence token.
    """

    chat: int
    text: int

    def after(self, prompt: Prompt) -> int:
        """Token that ends an answer to a prompt."""
        return self.text if prompt.messages is None else self.chat

    @property
    def ids(self) -> tuple[int, ...]:
        """The different ends: one or two."""
        return tuple(dict.fromkeys((self.chat, self.text)))


@dataclass(frozen=True)
class TokenSequence:
    """A prompt with one answer, tokenised once; nothing downstream tokenises again.

    Attributes:
        sequence_id: hex of a 16-byte hash of token ids, loss spans and tokenizer.
        input_ids: int32[T].
        loss_spans: half-open index ranges `[start, stop)` with `start >= 1`, in order, not
            overlapping.
        authors: names of the teachers that wrote the answer, `student`, or `dataset` for a given
            reference. The files on disk call them generators.
        finish_reason: `stop` or `length`, reported by the teacher; `unknown` where an endpoint ends
            answers by a word of its own; `dataset` for given references.
    """

    sequence_id: str
    input_ids: np.ndarray
    loss_spans: tuple[tuple[int, int], ...]
    prompt_id: str
    domain: str
    authors: tuple[str, ...]
    finish_reason: str

    @property
    def position_indices(self) -> np.ndarray:
        """int64[P]: token index `i_j` of every position."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.loss_spans])

    @property
    def gold_ids(self) -> np.ndarray:
        """int32[P]: gold token of every position."""
        return self.input_ids[self.position_indices]

    @property
    def num_positions(self) -> int:
        """Number of positions, P."""
        return sum(stop - start for start, stop in self.loss_spans)


@dataclass(frozen=True)
class SparseLogprobs:
    """Row of a cache: the kept part of one teacher's distributions over one sequence.

    Log-probabilities are normalised over the full vocabulary at temperature 1. The entries of all
    positions stand one after another. Position `j` owns `num_entries[j]` entries: first its exact
    entries, whose log-probabilities are stored, then its drawn entries; both kinds stand in
    descending order of probability. The exact entries and the tail of a position leave a mass, and
    each drawn entry stands for the share of that mass that it has among the draws.

    Attributes:
        num_entries: uint8[P], kept entries of each position.
        token_ids: uint32[N], token of each entry.
        logprobs: float16, log-probability of each exact entry.
        counts: uint8, number of times that each drawn entry was drawn; empty for selections
            without draws.
        gold_logprobs: float16[P], log-probability of the gold token.
        tail_mass: float16[P], probability outside the kept entries; for selections with draws,
            probability outside the captured entries, which no draw stands for.
        entropies: float16[P], lower bound of the entropy in nats.
        num_head: uint8[P], exact entries of each position; empty for selections without draws,
            which keep exact entries only.
        renormalised: whether the estimate made of draws is scaled to mass 1.
    """

    sequence_id: str
    num_entries: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray
    counts: np.ndarray
    gold_logprobs: np.ndarray
    tail_mass: np.ndarray
    entropies: np.ndarray
    num_head: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint8))
    renormalised: bool = False

    @property
    def num_positions(self) -> int:
        """Number of positions, P."""
        return len(self.num_entries)

    @property
    def is_drawn(self) -> bool:
        """Whether the row holds draws, so that its entries estimate the distribution."""
        return len(self.num_head) > 0

    @property
    def is_exact_N(self) -> np.ndarray:
        """bool[N]: whether each entry is exact; the others were drawn."""
        if not self.is_drawn:
            return np.ones(len(self.token_ids), dtype=bool)
        num_entries = self.num_entries.astype(np.int64)
        place_N = np.arange(len(self.token_ids)) - np.repeat(
            np.cumsum(num_entries) - num_entries, num_entries
        )
        return place_N < np.repeat(self.num_head, num_entries)


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """Row of a cache: one teacher's hidden states over one sequence.

    Position `j` holds the hidden states at index `i_j - 1`, from which the teacher computes the
    distribution over the token at index `i_j`.

    Attributes:
        states: uint16[P, L, D], the bits of bfloat16. L layers stand in the order of the cache's
            identity; D is the hidden size, or the number of dimensions of the projection.
    """

    sequence_id: str
    states: np.ndarray

    @property
    def num_positions(self) -> int:
        """Number of positions, P."""
        return len(self.states)

    @property
    def values(self) -> np.ndarray:
        """float32[P, L, D]: the hidden states as numbers."""
        return (self.states.astype("<u4") << 16).view("<f4")


CacheRow = SparseLogprobs | HiddenStates
"""Row of a cache of either kind."""


@dataclass(frozen=True)
class CombinedTargets:
    """Targets of one sequence: every teacher's kept entries and the weight of each teacher.

    Attributes:
        rows: one row per teacher in the config's order; None if a teacher has not scored the
            sequence.
        teacher_weights: float32[M, P]; the weights at a position sum to 1 over the teachers.
    """

    sequence: TokenSequence
    rows: tuple[SparseLogprobs | None, ...]
    teacher_weights: np.ndarray


@dataclass(frozen=True)
class DatasetEntry:
    """One sequence of a dataset.

    Attributes:
        authors: as in `TokenSequence`, merged over all answers that are equal.
        shard: path of the sequence shard, relative to the storage root.
    """

    sequence_id: str
    prompt_id: str
    domain: str
    split: str
    authors: tuple[str, ...]
    shard: str
    num_tokens: int
    num_positions: int
