"""Headlines of the report: the student against each teacher and the twin, in sentences."""

from __future__ import annotations

from typing import Any

from pipeline.report.figures import device, number, percent, price, scaled, significant
from pipeline.report.statistics import pooled, within_chance

SMALL_NATS = 0.01


def headlines(report: dict[str, Any]) -> list[str]:
    """What the student gained and lost against each teacher and the twin, whoever wins."""
    student = next(model for model in report["models"] if model["role"] == "student")
    others = [model for model in report["models"] if model is not student]
    ours = pooled(student)
    exact = f"{percent(ours['exact_match'])} of {ours['prompts']:,}"
    rates = ", ".join(f"{m['name']} {percent(pooled(m)['exact_match'])}" for m in others)
    unasked = report["prompts"].get("holdout_too_long_to_ask", 0)
    beside = f" ({unasked:,} more were too long to ask)" if unasked else ""
    lines = [f"The student answers {exact} hold-out prompts exactly{beside}; {rates}."]
    if ours["exact_match"] is None:
        lines = [f"{why_unchecked(report)}: likelihood compares the models."]
    for model in others:
        name, quality = model["name"], _quality(student, model)
        if model["role"] == "teacher":
            lines.append(f"Against {name}, in quality: {quality}.")
            lines.append(f"Against {name}, in resources: {_resources(student, model)}.")
        else:
            figures = dict.fromkeys((quality, _likelihood(student, model)))
            lines.append(f"Against the twin (cross-entropy alone): {'; '.join(figures)}.")
    check = report["export_check"]
    worst = max(check["max_logit_difference"], check["max_engine_logprob_difference"])
    if not worst <= check["tolerance"]:
        allowed = significant(check["tolerance"])
        lines.append(f"Caution: the export is off by {significant(worst)}, tolerance {allowed}.")
    return lines


def why_unchecked(report: dict[str, Any]) -> str:
    """Why there is no exact match, where there is none."""
    if report["run"]["checker"] is None:
        return "prompts.checker is not set, so no answer is checked"
    return "No hold-out prompt has a reference answer"


def _quality(student: dict[str, Any], other: dict[str, Any]) -> str:
    """Gains and losses in exact match by domain; likelihood where nothing has a reference."""
    parts = []
    for domain, ours in student["domains"].items():
        theirs = other["domains"].get(domain, {"exact_match": None})
        if ours["exact_match"] is None or theirs["exact_match"] is None:
            continue
        points = round(100 * (ours["exact_match"] - theirs["exact_match"]), 1)
        change = f"{'gains' if points > 0 else 'loses'} {abs(points):.1f} points"
        chance = ", within chance" if points and within_chance(ours, theirs) else ""
        figures = f"{percent(ours['exact_match'])} against {percent(theirs['exact_match'])}"
        parts.append(f"{change if points else 'is level'} in {domain} ({figures}{chance})")
    return f"the student {', '.join(parts)}" if parts else _likelihood(student, other)


def _likelihood(student: dict[str, Any], other: dict[str, Any]) -> str:
    """Loss and KL over the same tokens; what is known as a lower bound has no verdict of its own.

    A KL that is above a bound may be above or below the divergence that it bounds.
    """
    parts = []
    for label, key in (("hold-out loss", "holdout_loss"), ("KL to the mixture", "kl_to_mixture")):
        shared = _shared_domains(student, other, key)
        if not shared:
            continue
        both = [_over(model, shared) for model in (student, other)]
        ours, theirs = (figures[key] for figures in both)
        bounds = [key == "kl_to_mixture" and figures["kl_bounded_mass"] > 0 for figures in both]
        show = number if max(ours, theirs) >= SMALL_NATS else significant
        words = " against ".join(
            f"{'at least ' if is_bound else ''}{show(figure)}"
            for is_bound, figure in zip(bounds, (ours, theirs), strict=True)
        )
        places = "" if len(shared) == len(student["domains"]) else f" in {', '.join(shared)}"
        verdict = _verdict((ours, bounds[0]), (theirs, bounds[1]))
        parts.append(f"{label} {words} nats/token{places}{verdict}")
    return ", ".join(parts) or "nothing measured on the same tokens"


def _verdict(ours: tuple[float, bool], theirs: tuple[float, bool]) -> str:
    """Of two figures of which less is better, each with whether it is a lower bound."""
    (our_figure, ours_is_bound), (their_figure, theirs_is_bound) = ours, theirs
    if number(our_figure) == number(their_figure):
        return "" if ours_is_bound or theirs_is_bound else " (level)"
    if our_figure < their_figure:
        return "" if ours_is_bound else " (better)"
    return "" if theirs_is_bound else " (worse)"


def _shared_domains(one: dict[str, Any], two: dict[str, Any], key: str) -> list[str]:
    """Domains in which both models have a figure over as many hold-out tokens."""
    pairs = ((name, part, two["domains"].get(name)) for name, part in one["domains"].items())
    return [
        name
        for name, ours, theirs in pairs
        if theirs is not None
        and None not in (ours[key], theirs[key])
        and ours["holdout_tokens"] == theirs["holdout_tokens"]
    ]


def _over(model: dict[str, Any], domains: list[str]) -> dict[str, Any]:
    """Pooled figures over some domains."""
    return pooled(model | {"domains": {name: model["domains"][name] for name in domains}})


def _resources(student: dict[str, Any], other: dict[str, Any]) -> str:
    parts = []
    for label, figure, spread, less, more in (
        ("parameters", lambda model: model["parameters"], None, "smaller", "larger"),
        ("tokens/s", lambda model: model["tokens_per_second"], _speeds, "slower", "faster"),
        ("price per million tokens", price, _prices, "cheaper", "dearer"),
    ):
        if (ours := figure(student)) and (theirs := figure(other)):
            word = less if ours < theirs else more if ours > theirs else "equal"
            if spread and _overlap(spread(student), spread(other)):
                word = "level within the spread of the rounds"
            figures = f"{scaled(ours)} against {scaled(theirs)}"
            parts.append(f"{word}, {significant(ours / theirs)} times the {label} ({figures})")
    if device(student) != device(other):
        places = (f"{model['name']} {_place(model)}" for model in (student, other))
        parts.append(f"measured apart: {', '.join(places)}")
    return "; ".join(parts)


def _place(model: dict[str, Any]) -> str:
    found = device(model)
    return found if model["engine"]["engine"] == "endpoint" else f"on {found}"


def _speeds(model: dict[str, Any]) -> tuple[float, float]:
    """Tokens per second of the slowest and the fastest round."""
    low, high = model["tokens_per_second_range"]
    return low, high


def _prices(model: dict[str, Any]) -> tuple[float, float]:
    """Per million tokens at the speeds of the fastest and the slowest round."""
    low, high = (model["cost_per_hour"] / (speed * 3600) * 1e6 for speed in _speeds(model)[::-1])
    return low, high


def _overlap(one: tuple[float, float], two: tuple[float, float]) -> bool:
    """Whether two ranges have a value in common."""
    return one[0] <= two[1] and two[0] <= one[1]
