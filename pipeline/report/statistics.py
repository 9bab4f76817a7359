"""Statistics of the report: intervals of proportions, figures pooled over domains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from pipeline.report.models import DomainFigures

Z_95 = 1.959963984540054
Proportion = tuple[float, int]
"""A share of successes and the number of trials."""


def wilson_interval(rate: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson, 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    shrink = 1 + Z_95**2 / trials
    centre = (rate + Z_95**2 / (2 * trials)) / shrink
    half = Z_95 / shrink * math.sqrt(rate * (1 - rate) / trials + (Z_95 / (2 * trials)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def within_chance(one: Proportion, other: Proportion) -> bool:
    """Whether the 95 % interval of the difference of two proportions holds zero (Newcombe, 1998).

    It takes the answers of two models as independent; they answer the same prompts, which makes
    this cautious.
    """
    (low, low_trials), (high, high_trials) = sorted((one, other))
    down = high - wilson_interval(high, high_trials)[0]
    up = wilson_interval(low, low_trials)[1] - low
    return high - low <= math.hypot(down, up)


def pooled(domains: Mapping[str, DomainFigures]) -> DomainFigures:
    """Figures over all domains: exact match weighted by checked prompts, the others by tokens.

    A figure that is not known for all tokens is None: it would be about other tokens than the
    figures beside it.
    """
    parts = list(domains.values())

    def over_all_tokens(values: list[float | None]) -> float | None:
        weighted = [(v, p.holdout_tokens) for v, p in zip(values, parts, strict=True)]
        if any(value is None and tokens for value, tokens in weighted):
            return None
        return _mean((value, tokens) for value, tokens in weighted if value is not None)

    checked = [(p.exact_match, p.prompts) for p in parts if p.exact_match is not None]
    return DomainFigures(
        prompts=sum(prompts for _, prompts in checked),
        exact_match=_mean(checked),
        holdout_tokens=sum(part.holdout_tokens for part in parts),
        holdout_loss=over_all_tokens([part.holdout_loss for part in parts]),
        kl_to_mixture=over_all_tokens([part.kl_to_mixture for part in parts]),
        kl_bounded_mass=over_all_tokens([part.kl_bounded_mass for part in parts]),
        top1_agreement=over_all_tokens([part.top1_agreement for part in parts]),
    )


def _mean(weighted: Iterable[tuple[float, int]]) -> float | None:
    values = list(weighted)
    total = sum(weight for _, weight in values)
    return sum(value * weight for value, weight in values) / total if total else None
