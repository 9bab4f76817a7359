"""`combine`: how the teachers' distributions are weighted and combined."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Name, Positive, Section


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
