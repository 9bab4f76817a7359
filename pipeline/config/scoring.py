"""`scoring`: what is captured of the teachers' distributions, and what is kept."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from pipeline.config.base import Section

MAX_ENTRIES = 255
"""Entries, and draws, of one position: what a byte counts."""
NumDraws = Annotated[int, Field(ge=2, le=MAX_ENTRIES)]


class TopK(Section):
    """Keeps the most probable entries of every position."""

    type: Literal["top_k"]
    max_entries: Annotated[int, Field(ge=1, le=MAX_ENTRIES)]
    """Entries kept."""


class TopP(Section):
    """Keeps the smallest set of entries that reaches a mass; most positions of text need few."""

    type: Literal["top_p"]
    mass: Annotated[float, Field(gt=0, le=1)]
    """Probability that the kept entries reach."""
    max_entries: Annotated[int, Field(ge=1, le=MAX_ENTRIES)]
    """Bound on the entries kept."""


class Sampled(Section):
    """Keeps draws from the captured entries: ids and counts, no log-probabilities.

    An unbiased estimate (Random Sampling KD, arXiv 2503.16870), so only for losses linear in p.
    """

    type: Literal["sampled"]
    num_draws: NumDraws
    """Draws of every position; repeated ids are one entry with its count."""
    renormalise: bool = False
    """Scale the captured distribution to mass 1; otherwise the estimate lacks what lies beyond."""

    @property
    def max_entries(self) -> int:
        return self.num_draws


class HeadAndSampled(Section):
    """Keeps an exact head, and draws from the other captured entries, scaled to their mass.

    Unbiased like `sampled`, of lower variance; only for losses linear in p.
    """

    type: Literal["head_and_sampled"]
    head_mass: Annotated[float, Field(gt=0, le=1)]
    """The head is the smallest set of entries that reaches this probability …"""
    max_head_entries: Annotated[int, Field(ge=1, le=MAX_ENTRIES)]
    """… but no larger than this; with `head_mass: 1` it is just as large."""
    num_draws: NumDraws
    """Draws of every position from outside the head; repeated ids are one entry with its count."""
    renormalise: bool = False
    """Scale the captured distribution to mass 1; otherwise the estimate lacks what lies beyond."""

    @property
    def max_entries(self) -> int:
        return self.max_head_entries + self.num_draws

    @model_validator(mode="after")
    def _entries_fit_a_byte(self) -> HeadAndSampled:
        if self.max_entries > MAX_ENTRIES:
            raise ValueError(
                f"max_head_entries + num_draws is {self.max_entries}; a position holds at most "
                f"{MAX_ENTRIES} entries"
            )
        return self


Selection = Annotated[TopK | TopP | Sampled | HeadAndSampled, Field(discriminator="type")]
_SELECTION: TypeAdapter[Selection] = TypeAdapter(Selection)


def selection_of(recipe: dict[str, Any]) -> Selection:
    """The selection rule that a scoring recipe holds."""
    return _SELECTION.validate_python(recipe["selection"])


class HiddenStatesStorage(Section):
    """How hidden states are stored, for losses on them; which layers, these losses say."""

    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Store a random projection to so many dimensions; without, states as they are."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the projection."""


class ScoringConfig(Section):
    """What is captured of the teachers' distributions, and what is kept."""

    num_logprobs: Annotated[int, Field(ge=1)]
    """Capture width: entries that the engine returns for every position."""
    selection: Selection
    """What of them is kept on disk."""
    features: HiddenStatesStorage = HiddenStatesStorage()
    """Of hidden states, where a loss needs them."""

    @model_validator(mode="after")
    def _capture_covers_selection(self) -> ScoringConfig:
        if isinstance(self.selection, Sampled):
            return self  # the same entry can be drawn again
        if isinstance(self.selection, HeadAndSampled):
            key, most = "max_head_entries", self.selection.max_head_entries
        else:
            key, most = "max_entries", self.selection.max_entries
        if most > self.num_logprobs:
            raise ValueError(
                f"selection.{key} ({most}) exceeds num_logprobs ({self.num_logprobs}): what is not "
                "captured cannot be kept"
            )
        return self
