"""Configuration of the targets: what is kept of the teachers' distributions, how they combine."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, model_validator

from pipeline.config_base import Name, Positive, Section

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


class FeatureStorage(Section):
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
    features: FeatureStorage = FeatureStorage()
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


class SoftmaxWeights(Section):
    """Weights from a figure that the caches hold: its softmax over the teachers."""

    temperature: Positive
    """In nats; small values pick one teacher, large ones weigh all alike."""
    per: Literal["token", "sequence"]
    """One weight per token, or one per sequence from its mean."""


class GoldLikelihoodWeights(SoftmaxWeights):
    """Who finds the text likelier weighs more: softmax of gold log-likelihood / temperature."""

    type: Literal["gold_likelihood"]


class ConfidenceWeights(SoftmaxWeights):
    """Who is surer weighs more: softmax of -entropy / temperature. A flat teacher weighs least."""

    type: Literal["confidence"]


class LearnedWeights(Section):
    """One weight for each teacher and domain: those of the mixture under which the validation split
    is likeliest, from the caches alone. The score stage fits them.
    """

    type: Literal["learned"]


Weights = Annotated[
    StaticWeights | ByDomainWeights | GoldLikelihoodWeights | ConfidenceWeights | LearnedWeights,
    Field(discriminator="type"),
]


class CombineConfig(Section):
    """How the teachers' distributions become one target."""

    method: Literal["mixture", "product", "route"]
    """`mixture`: p = sum over teachers of weight times p. `product`: p proportional to the product
    of p to the power of its weight. `route`: the teacher of the greatest weight alone, by token or
    by sequence as the weights go; of equals the first by name."""
    weights: Weights
    """The weight of each teacher at each position."""
    min_tail: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """Of `product`: a smaller tail of a teacher counts as this, since one stored 0 would forbid all
    ids that the teacher has not kept. The report counts such positions."""

    @model_validator(mode="after")
    def _learned_for_sums(self) -> CombineConfig:
        if self.method == "product" and isinstance(self.weights, LearnedWeights):
            raise ValueError(
                "weights learned are those of the likeliest mixture and say nothing about a "
                "product: choose method mixture or route, or other weights"
            )
        return self

    @model_validator(mode="after")
    def _routes_are_decided(self) -> CombineConfig:
        if self.method != "route":
            return self
        tables = []
        if isinstance(self.weights, StaticWeights):
            tables = [self.weights.teachers]
        elif isinstance(self.weights, ByDomainWeights):
            tables = list(self.weights.domains.values())
        for table in tables:
            first = [name for name, weight in table.items() if weight == max(table.values())]
            if len(first) > 1:
                raise ValueError(
                    f"method route takes the teacher of the greatest weight, but {first} share "
                    f"{table[first[0]]:g}: give one of them more"
                )
        return self
