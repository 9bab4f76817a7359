"""`scoring`: the captured part of the teachers' distributions, and the part kept on disk.

A new selection needs its model here, in the union `Selection`, and its function in
`pipeline/cache/selection.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, model_validator

from pipeline.config.base import Real, Section, Seed, Whole

MAX_ENTRIES = 255
"""Largest number of entries, and of draws, at one position: the cache counts them in a byte."""
NumDraws = Annotated[Whole, Field(ge=2, le=MAX_ENTRIES)]
NumEntries = Annotated[Whole, Field(ge=1, le=MAX_ENTRIES)]
Mass = Annotated[Real, Field(gt=0, le=1)]


class SelectionSection(Section):
    """Fields and properties that all selections share."""

    is_drawn: ClassVar[bool] = False
    """Whether the selection keeps draws, which only losses and combinations that are linear in the
    teachers' probabilities may use."""
    exact_bound: ClassVar[str | None] = "max_entries"
    """Field that bounds the exact entries of a position; None for a selection without any."""

    type: str


class TopK(SelectionSection):
    """Keeps the most probable entries of every position."""

    type: Literal["top_k"]
    max_entries: NumEntries
    """Number of entries that are kept at every position, at most 255. More entries cost more disk
    and leave less probability in the tail, about whose tokens the student learns nothing."""


class TopP(SelectionSection):
    """Keeps the smallest set of entries that reaches a given probability.

    Few entries suffice at most positions of a text.
    """

    type: Literal["top_p"]
    mass: Mass
    """Probability, from 0 to 1, that the kept entries of a position reach together, such as 0.99.
    Higher values keep more entries where the teacher is unsure."""
    max_entries: NumEntries
    """Largest number of entries that are kept at a position, at most 255, even if they do not reach
    `mass`."""


class Sampled(SelectionSection):
    """Keeps random draws from the captured entries: token ids and counts, no log-probabilities.

    The draws are an unbiased estimate of the distribution (Random Sampling KD, arXiv 2503.16870)
    and take the least disk. Only `forward_kl` and `cross_entropy` at temperature 1 may use them,
    combined by `mixture` or `route`.
    """

    type: Literal["sampled"]
    is_drawn: ClassVar[bool] = True
    exact_bound: ClassVar[str | None] = None

    num_draws: NumDraws
    """Number of draws at every position, from 2 to 255. A token that is drawn several times is one
    entry with its count. More draws cost more disk and make the estimate less noisy."""
    renormalise: bool = False
    """Scale the estimate at every position to probability 1. Without it the estimate lacks the
    probability of tokens that were not captured, and is unbiased for captured tokens. With it the
    captured tokens take over that probability; set it if `num_logprobs` must stay small."""

    @property
    def max_entries(self) -> int:
        """Largest number of entries at a position."""
        return self.num_draws


class HeadAndSampled(SelectionSection):
    """Keeps the most probable entries exactly, and random draws from the other captured entries.

    The estimate is unbiased like that of `sampled` and less noisy. Only `forward_kl` and
    `cross_entropy` at temperature 1 may use it, combined by `mixture` or `route`.
    """

    type: Literal["head_and_sampled"]
    is_drawn: ClassVar[bool] = True
    exact_bound: ClassVar[str | None] = "max_head_entries"

    head_mass: Mass
    """Probability, from 0 to 1, that the exact entries of a position reach together: the most
    probable tokens are kept exactly until their probabilities add up to `head_mass`, or until there
    are `max_head_entries` of them; random draws stand for the rest. Higher values keep more exact
    entries, which costs more disk and makes the estimate less noisy. With 1, `max_head_entries`
    alone decides."""
    max_head_entries: NumEntries
    """Largest number of exact entries at a position, even if they do not reach `head_mass`.
    Together with `num_draws` at most 255."""
    num_draws: NumDraws
    """Number of draws at every position from the captured entries that are not kept exactly. A
    token that is drawn several times is one entry with its count. More draws cost more disk and
    make the estimate less noisy."""
    renormalise: bool = False
    """Scale the estimate at every position to probability 1. Without it the estimate lacks the
    probability of tokens that were not captured, and is unbiased for captured tokens. With it the
    captured tokens take over that probability; set it if `num_logprobs` must stay small."""

    @property
    def max_entries(self) -> int:
        """Largest number of entries at a position."""
        return self.max_head_entries + self.num_draws

    @model_validator(mode="after")
    def _entries_fit_a_byte(self) -> HeadAndSampled:
        if self.max_entries > MAX_ENTRIES:
            raise ValueError(
                f"max_head_entries + num_draws is {self.max_entries}, but a position holds at most "
                f"{MAX_ENTRIES} entries: lower one of them"
            )
        return self


Selection = Annotated[TopK | TopP | Sampled | HeadAndSampled, Field(discriminator="type")]
_SELECTION: TypeAdapter[Selection] = TypeAdapter(Selection)


def selection_of(identity: dict[str, Any]) -> Selection:
    """Selection of a cache, read from its identity."""
    return _SELECTION.validate_python(identity["selection"])


class HiddenStatesStorage(Section):
    """Storage of hidden states, for losses on them; `training.losses` says which layers."""

    dimensions: Annotated[Whole, Field(ge=1, le=100_000)] | None = None
    """Number of dimensions to which hidden states are projected before they are stored, by a fixed
    random matrix. Without it hidden states are stored whole: 2 bytes times the teacher's hidden
    size for each layer and token. A projection saves disk and memory; it keeps distances and
    angles up to a relative error of about sqrt(2 / dimensions)."""
    seed: Annotated[Seed, Field(ge=0)] = 0
    """Seed of the random projection matrix; it has no effect without `dimensions`. Another seed
    stores the hidden states anew."""


class ScoringConfig(Section):
    """Captured and stored part of the teachers' distributions and hidden states."""

    num_logprobs: Annotated[Whole, Field(ge=1)]
    """Capture width: number of most probable tokens whose log-probabilities a teacher returns at
    every position. The selection keeps some of them. It must be at least the number of exact
    entries of the selection; for selections with draws take it much larger, such as 256, since
    tokens beyond it are never drawn."""
    selection: Selection
    """Rule by which captured entries are kept on disk: `top_k`, `top_p`, `sampled` or
    `head_and_sampled`. It decides the size of the caches and which losses can use them. Another
    selection scores every sequence again, into a cache of its own."""
    features: HiddenStatesStorage = HiddenStatesStorage()
    """Storage of hidden states. Set it only if `training.losses` holds a loss on hidden states."""

    @model_validator(mode="after")
    def _capture_covers_exact_entries(self) -> ScoringConfig:
        key = self.selection.exact_bound
        if key is None:
            return self  # draws need no minimum: the same entry can be drawn again
        num_exact = self.selection.model_dump()[key]
        if num_exact > self.num_logprobs:
            raise ValueError(
                f"selection.{key} ({num_exact}) exceeds num_logprobs ({self.num_logprobs}), but "
                f"only captured entries can be kept: lower selection.{key}, or raise num_logprobs"
            )
        return self
