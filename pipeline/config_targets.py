"""Configuration of the targets: what is kept of the teachers' distributions, how they combine."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config_base import Name, Positive, Section

MAX_ENTRIES = 255


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


Selection = Annotated[TopK | TopP, Field(discriminator="type")]


class ScoringConfig(Section):
    """What is captured of the teachers' distributions, and what is kept."""

    num_logprobs: Annotated[int, Field(ge=1)]
    """Capture width: entries that the engine returns for every position."""
    selection: Selection
    """What of them is kept on disk."""

    @model_validator(mode="after")
    def _capture_covers_selection(self) -> ScoringConfig:
        if self.selection.max_entries > self.num_logprobs:
            raise ValueError(
                f"selection.max_entries ({self.selection.max_entries}) exceeds num_logprobs "
                f"({self.num_logprobs}): what is not captured cannot be kept"
            )
        return self


class StaticWeights(Section):
    """The same weights everywhere."""

    type: Literal["static"]
    teachers: dict[Name, Annotated[float, Field(ge=0)]]
    """Weight of each teacher; scaled to sum to 1."""


class ByDomainWeights(Section):
    """Fixed weights for each domain."""

    type: Literal["by_domain"]
    domains: dict[Name, dict[Name, Annotated[float, Field(ge=0)]]]
    """For each domain the weight of each teacher; a teacher left out weighs 0."""


class GoldLikelihoodWeights(Section):
    """Who finds the text likelier weighs more: softmax of gold log-likelihood / temperature."""

    type: Literal["gold_likelihood"]
    temperature: Positive
    """In nats; small values pick one teacher, large ones weigh all alike."""
    per: Literal["token", "sequence"]
    """One weight per token, or one per sequence from its mean."""


Weights = Annotated[
    StaticWeights | ByDomainWeights | GoldLikelihoodWeights, Field(discriminator="type")
]


class CombineConfig(Section):
    """How the teachers' distributions become one target."""

    method: Literal["mixture"]
    """`mixture`: p = sum over teachers of weight times p."""
    weights: Weights
    """The weight of each teacher at each position."""
