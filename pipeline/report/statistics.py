"""Statistics of the report: intervals of proportions and means, figures pooled over domains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

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


def mean_interval(totals: Sequence[float], sizes: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of `sum(totals) / sum(sizes)` where groups were drawn, not single items.

    The standard error is that of a ratio estimator (Cochran, Sampling Techniques, 1977, 6.3), with
    Student's t for the number of groups. None for a single group, which shows no spread.

    Args:
        totals: sum of each group.
        sizes: number of items of each group.
    """
    num_groups = len(totals)
    if num_groups < 2:
        return None
    whole = math.fsum(sizes)
    mean = math.fsum(totals) / whole
    squares = math.fsum(
        (total - mean * size) ** 2 for total, size in zip(totals, sizes, strict=True)
    )
    half = t_95(num_groups - 1) * math.sqrt(squares * num_groups / (num_groups - 1)) / whole
    return mean - half, mean + half


def t_95(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t.

    Exact for one and two degrees of freedom, otherwise the expansion of Abramowitz and Stegun
    (1964), 26.7.5, which is off by less than 0.004.
    """
    if freedom == 1:
        return math.tan(math.pi * 0.475)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z = Z_95
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


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
