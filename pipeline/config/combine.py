"""`combine`: weights of the teachers, and the way in which their distributions are combined.

A new weighting needs its model here, in the union `Weights`, and its numbers in
`pipeline/combine/weights.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Name, Positive, Real, Section

Weight = Annotated[Real, Field(ge=0)]
LINEAR_METHODS = frozenset({"mixture", "route"})
"""Methods whose target is a weighted sum of the teachers' probabilities, so that draws stay
unbiased. Every other method, also one added later, is refused for draws."""


class WeightsSection(Section):
    """Fields and properties that all weightings share."""

    type: str

    @property
    def fixed_tables(self) -> dict[str, dict[str, float]]:
        """Tables of fixed weights by teacher, by the config key that holds each table."""
        return {}


class StaticWeights(WeightsSection):
    """The same fixed weights for all sequences."""

    type: Literal["static"]
    teachers: dict[Name, Weight]
    """Weight of each teacher, such as `{large: 2, small: 1}`; the weights are scaled to sum to 1. A
    teacher that is left out has weight 0."""

    @property
    def fixed_tables(self) -> dict[str, dict[str, float]]:
        return {"combine.weights.teachers": self.teachers}


class ByDomainWeights(WeightsSection):
    """Fixed weights for each domain, for teachers whose strengths are known."""

    type: Literal["by_domain"]
    domains: dict[Name, dict[Name, Weight]]
    """Weight of each teacher for every domain, such as `{code: {coder: 1}, words: {writer: 3,
    coder: 1}}`; the weights of a domain are scaled to sum to 1. A teacher that is left out has
    weight 0 in that domain."""

    @property
    def fixed_tables(self) -> dict[str, dict[str, float]]:
        return {f"combine.weights.domains.{name}": table for name, table in self.domains.items()}


class SoftmaxWeights(WeightsSection):
    """Weights from a figure in the caches: the softmax of the figure over the teachers."""

    temperature: Positive
    """Temperature of the softmax, in nats, the unit of the figure. Small values give nearly all
    weight to the best teacher, large values weigh all teachers nearly alike."""
    per: Literal["token", "sequence"]
    """Extent of one weight: each `token` has weights of its own, or each `sequence` has one weight
    for each teacher, from the mean of the figure over its tokens."""


class GoldLikelihoodWeights(SoftmaxWeights):
    """Larger weight to a teacher that finds the text likelier.

    The weights are the softmax of (log-likelihood of the text's own tokens / temperature).
    """

    type: Literal["gold_likelihood"]


class ConfidenceWeights(SoftmaxWeights):
    """Larger weight to a teacher that is surer of the next token.

    The weights are the softmax of (-entropy / temperature); a flat distribution weighs least.
    """

    type: Literal["confidence"]


class LearnedWeights(WeightsSection):
    """Weights of each teacher in each domain, learned from the validation split.

    They are the weights of the mixture under which the validation split is likeliest. The score
    stage fits them to the caches alone, so `prompts` must give a validation split.
    """

    type: Literal["learned"]


Weights = Annotated[
    StaticWeights | ByDomainWeights | GoldLikelihoodWeights | ConfidenceWeights | LearnedWeights,
    Field(discriminator="type"),
]


class CombineConfig(Section):
    """Combination of the teachers' distributions into one target."""

    method: Literal["mixture", "product", "route"]
    """Way of combining. `mixture`: the weighted sum of the teachers' probabilities. `product`: the
    normalised product of the teachers' probabilities, each to the power of its weight, which keeps
    what all teachers find likely. `route`: the distribution of the teacher with the largest weight
    alone, chosen for each token or sequence as the weights are; the first by name wins a tie."""
    weights: Weights
    """Weighting of the teachers: `static`, `by_domain`, `gold_likelihood`, `confidence` or
    `learned`. Choose `by_domain` if you know the strength of each teacher, `gold_likelihood` or
    `learned` if not."""
    min_tail: Annotated[Real, Field(gt=0, lt=1)] = 1e-4
    """Smallest tail probability that a teacher has in a `product`; other methods ignore it. The
    tail is all probability outside the teacher's kept entries. A smaller tail counts as this value,
    since a stored 0 would forbid every token that the teacher has not kept. The report counts such
    positions; lower the value if they are many and the caches keep many entries."""

    @model_validator(mode="after")
    def _learned_weights_fit_the_method(self) -> CombineConfig:
        if self.method == "product" and isinstance(self.weights, LearnedWeights):
            raise ValueError(
                "weights of type learned are fitted to a mixture and say nothing about a product: "
                "choose method mixture or route, or other weights"
            )
        return self

    @model_validator(mode="after")
    def _routes_are_decided(self) -> CombineConfig:
        if self.method != "route":
            return self
        for place, table in self.weights.fixed_tables.items():
            greatest = max(table.values(), default=0.0)
            first = [name for name, weight in table.items() if weight == greatest]
            if len(first) > 1:
                raise ValueError(
                    f"method route takes the teacher with the largest weight, but in {place} "
                    f"{first} share {greatest:g}: give one of them more"
                )
        return self
