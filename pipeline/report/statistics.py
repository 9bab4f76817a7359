"""Statistics of the report: intervals of proportions, figures pooled over domains."""

from __future__ import annotations

import math
from typing import Any

Z_95 = 1.959963984540054


def wilson_interval(rate: float, trials: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson, 1927); (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    shrink = 1 + Z_95**2 / trials
    centre = (rate + Z_95**2 / (2 * trials)) / shrink
    half = Z_95 / shrink * math.sqrt(rate * (1 - rate) / trials + (Z_95 / (2 * trials)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)


def within_chance(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether the 95 % interval of a difference in exact match holds zero (Newcombe, 1998).

    Takes the two models' answers as independent; the same prompts make that cautious.
    """
    low, high = sorted((ours, theirs), key=lambda figures: figures["exact_match"])
    down = high["exact_match"] - wilson_interval(high["exact_match"], high["prompts"])[0]
    up = wilson_interval(low["exact_match"], low["prompts"])[1] - low["exact_match"]
    return high["exact_match"] - low["exact_match"] <= math.hypot(down, up)


def pooled(model: dict[str, Any]) -> dict[str, Any]:
    """Figures over all domains: exact match by prompts with a reference, others by tokens.

    A figure that lacks some of the tokens is None: it would stand for others than its neighbours.
    """
    parts = list(model["domains"].values())

    def mean(key: str, weight: str) -> float | None:
        known = [(part[key], part[weight]) for part in parts if part[key] is not None]
        total = sum(weight for _, weight in known)
        return sum(value * weight for value, weight in known) / total if total else None

    def over_all_tokens(key: str) -> float | None:
        is_whole = all(part[key] is not None for part in parts if part["holdout_tokens"])
        return mean(key, "holdout_tokens") if is_whole else None

    by_tokens = ("holdout_loss", "kl_to_mixture", "kl_bounded_mass", "top1_agreement")
    return {key: over_all_tokens(key) for key in by_tokens} | {
        "exact_match": mean("exact_match", "prompts"),
        "prompts": sum(part["prompts"] for part in parts if part["exact_match"] is not None),
        "holdout_tokens": sum(part["holdout_tokens"] for part in parts),
    }
