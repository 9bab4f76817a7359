"""The records that cross the boundaries between stages: frozen, of plain values and arrays.

Legend of axis names: T tokens of a sequence, P positions (tokens inside the loss spans), N entries
of all positions of a sequence, M teachers.

Position `j` of a sequence stands for token index `i_j`, the j-th index of all loss spans in order.
A teacher's row at position `j` is its distribution over the token at index `i_j` given everything
before it, and `input_ids[i_j]` is the position's gold token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pipeline.fingerprint import digest_json


@dataclass(frozen=True)
class Prompt:
    """One prompt: either chat `messages` or raw `text`, never both."""

    prompt_id: str
    domain: str
    split: str
    messages: tuple[dict[str, Any], ...] | None = None
    text: str | None = None
    reference: str | None = None

    @property
    def digest(self) -> str:
        """Hash of all that its answers depend on, which is everything but the split."""
        return digest_json([self.prompt_id, self.domain, self.messages, self.text, self.reference])

    def under(self, system: str | None) -> Prompt:
        """The prompt with a system message, where it is a chat without one of its own."""
        if system is None or self.messages is None or self.messages[0]["role"] == "system":
            return self
        return replace(self, messages=({"role": "system", "content": system}, *self.messages))

    @property
    def words(self) -> str:
        """Its text without system messages, which many prompts share."""
        if self.text is not None:
            return self.text
        spoken = (m for m in self.messages or () if m["role"] != "system")
        return "\n".join(str(message["content"]) for message in spoken)


@dataclass(frozen=True)
class TokenSequence:
    """A prompt with one answer, tokenised once; nothing downstream tokenises again.

    Attributes:
        sequence_id: hex of a 16-byte hash of token ids, tokenizer and loss spans.
        input_ids: int32[T].
        loss_spans: half-open index ranges `[start, stop)` with `start >= 1`, in order, not
            overlapping.
        generators: names of the teachers that wrote the answer, or `dataset`.
        finish_reason: `stop` or `length` as the engine reports it; `dataset` for given answers.
    """

    sequence_id: str
    input_ids: np.ndarray
    loss_spans: tuple[tuple[int, int], ...]
    prompt_id: str
    domain: str
    generators: tuple[str, ...]
    finish_reason: str

    @property
    def position_indices(self) -> np.ndarray:
        """int64[P]: the token index `i_j` of every position."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.loss_spans])

    @property
    def gold_ids(self) -> np.ndarray:
        """int32[P]: the token at every position."""
        return self.input_ids[self.position_indices]

    @property
    def num_positions(self) -> int:
        """P."""
        return sum(stop - start for start, stop in self.loss_spans)


@dataclass(frozen=True)
class SparseLogprobs:
    """What is kept of one teacher's distributions over one sequence.

    Log-probabilities are normalised over the full vocabulary at temperature 1. The entries of all
    positions stand one after another: position `j` owns `num_entries[j]` of them, the head entries
    first, both kinds in descending order of probability. A drawn entry stands for its share of the
    draws in the mass that its position's head and tail leave.

    Attributes:
        num_entries: uint8[P].
        token_ids: uint32[N].
        logprobs: float16, of the head entries.
        counts: uint8, how often each other entry was drawn; empty for selections without draws.
        gold_logprobs: float16[P], log-probability of the gold token.
        tail_mass: float16[P], probability outside the kept entries; with draws, outside the
            captured ones, which nothing stands for.
        entropies: float16[P], lower bound of the entropy in nats.
        num_head: uint8[P], head entries of each position; empty for selections without draws,
            whose entries are all of the head.
        renormalised: whether the estimate that draws make is scaled to mass 1.
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
        """P."""
        return len(self.num_entries)

    @property
    def is_drawn(self) -> bool:
        """Whether the entries estimate the distribution by draws."""
        return len(self.num_head) > 0

    @property
    def head_N(self) -> np.ndarray:
        """bool[N]: which entries belong to the head; the others were drawn."""
        if not self.is_drawn:
            return np.ones(len(self.token_ids), dtype=bool)
        num_entries = self.num_entries.astype(np.int64)
        place_N = np.arange(len(self.token_ids)) - np.repeat(
            np.cumsum(num_entries) - num_entries, num_entries
        )
        return place_N < np.repeat(self.num_head, num_entries)


@dataclass(frozen=True, eq=False)
class HiddenStates:
    """What is kept of one teacher's hidden states over one sequence.

    The states of position `j` are those at index `i_j - 1`, from which the distribution over the
    token at index `i_j` is computed.

    Attributes:
        states: uint16[P, L, D], the bits of bfloat16; L layers in the order of the recipe, D the
            hidden size, or the dimensions of the projection.
    """

    sequence_id: str
    states: np.ndarray

    @property
    def num_positions(self) -> int:
        """P."""
        return len(self.states)

    @property
    def values(self) -> np.ndarray:
        """float32[P, L, D]."""
        return (self.states.astype("<u4") << 16).view("<f4")


CacheRow = SparseLogprobs | HiddenStates
"""A row of either kind of cache."""


@dataclass(frozen=True)
class CombinedTargets:
    """The targets of one sequence: every teacher's kept entries and how much each teacher weighs.

    Attributes:
        rows: one per teacher in the config's order; `None` where a teacher has not scored the
            sequence.
        teacher_weights: float32[M, P], sums to 1 over the teachers at every position.
    """

    sequence: TokenSequence
    rows: tuple[SparseLogprobs | None, ...]
    teacher_weights: np.ndarray


@dataclass(frozen=True)
class DatasetEntry:
    """One sequence of a dataset. `shard` is the sequence shard, relative to the storage root."""

    sequence_id: str
    prompt_id: str
    domain: str
    split: str
    generators: tuple[str, ...]
    shard: str
    num_tokens: int
    num_positions: int
