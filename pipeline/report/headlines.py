"""Headlines of the report: the student against each teacher and the twin, in sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipeline.report.comparisons import (
    difference_words,
    fidelity_words,
    over_all,
    preference_words,
)
from pipeline.report.models import DomainFigures, ModelFigures, Report
from pipeline.report.numbers import number, percent, scaled, significant
from pipeline.report.statistics import pooled, within_chance

SMALL_NATS = 0.01
Range = tuple[float, float]
Bounded = tuple[float, bool]
"""A figure, and whether it is a mere lower bound."""


def headlines(report: Report) -> list[str]:
    """The student's gains and losses against each teacher and the twin, whoever wins."""
    student = report.student
    others = [model for model in report.models if model is not student]
    lines, of_teachers = [_answers(report, student, others)], []
    if (words := fidelity_words(report)) and words != lines[0]:
        lines.append(f"Fidelity to the teachers: {words[0].lower()}{words[1:]}")
    for model in others:
        quality = _quality(student, model)
        if model.role == "teacher":
            of_teachers.append(f"Against {model.name}, in quality: {quality}.")
            resources = _resources(student, model)
            of_teachers.append(f"Against {model.name}, in resources: {resources}.")
        else:
            findings = dict.fromkeys((quality, _likelihood(student, model)))
            if measured := difference_words(report, model.name):
                exact = [] if quality == _likelihood(student, model) else [quality]
                findings = dict.fromkeys((*exact, measured))
            lines.append(f"Against the twin (cross-entropy alone): {'; '.join(findings)}.")
    if measured := difference_words(report, "start"):
        lines.append(f"Against the model that it started from: {measured}.")
    for other in dict.fromkeys(row.other for row in report.preferences):
        row = over_all([row for row in report.preferences if row.other == other])
        if row is not None:
            lines.append(f"Against {other}, judged by {row.judge}: {preference_words(row)}.")
    return lines + of_teachers


def why_unchecked(report: Report) -> str:
    """Reason for a report without exact match."""
    if report.run.checker is None:
        return "prompts.checker is not set, so no answer is checked"
    if report.prompts.get("holdout_reference_unread"):
        return f"The checker {report.run.checker} cannot read the reference of any hold-out prompt"
    return "No hold-out prompt has a reference answer"


def _answers(report: Report, student: ModelFigures, others: Sequence[ModelFigures]) -> str:
    ours = pooled(student.domains)
    if ours.exact_match is None and (words := fidelity_words(report)):
        return words
    if ours.exact_match is None:
        return f"{why_unchecked(report)}: likelihood compares the models."
    rates = [f"{m.name} {percent(pooled(m.domains).exact_match)}" for m in others]
    counts = {
        "were too long to ask": report.prompts.get("holdout_too_long_to_ask", 0),
        f"have a reference that {report.run.checker} cannot read": report.prompts.get(
            "holdout_reference_unread", 0
        ),
    }
    more = [f"{count:,} more {what}" for what, count in counts.items() if count]
    beside = f" ({', '.join(more)})" if more else ""
    exact = f"{percent(ours.exact_match)} of {ours.prompts:,}"
    return f"The student answers {exact} hold-out prompts exactly{beside}; {', '.join(rates)}."


def _quality(student: ModelFigures, other: ModelFigures) -> str:
    """Gains and losses in exact match by domain; likelihood where nothing has a reference."""
    parts = []
    for domain, ours in student.domains.items():
        theirs = other.domains.get(domain, DomainFigures())
        if ours.exact_match is None or theirs.exact_match is None:
            continue
        points = round(100 * (ours.exact_match - theirs.exact_match), 1)
        change = f"{'gains' if points > 0 else 'loses'} {abs(points):.1f} points"
        one, two = (ours.exact_match, ours.prompts), (theirs.exact_match, theirs.prompts)
        chance = ", within chance" if points and within_chance(one, two) else ""
        rates = f"{percent(ours.exact_match)} against {percent(theirs.exact_match)}"
        parts.append(f"{change if points else 'is level'} in {domain} ({rates}{chance})")
    return f"the student {', '.join(parts)}" if parts else _likelihood(student, other)


def _likelihood(student: ModelFigures, other: ModelFigures) -> str:
    """Comparison of loss and KL divergence over the same tokens."""
    loss = _compared("hold-out loss", student, other, lambda f: f.holdout_loss, lambda f: False)
    kl = _compared(
        "KL to the mixture",
        student,
        other,
        lambda f: f.kl_to_mixture,
        lambda f: bool(f.kl_bounded_mass),
    )
    return ", ".join(filter(None, (loss, kl))) or "nothing measured on the same tokens"


def _compared(
    label: str,
    student: ModelFigures,
    other: ModelFigures,
    figure: Callable[[DomainFigures], float | None],
    is_bound: Callable[[DomainFigures], bool],
) -> str:
    """Comparison of one figure in the domains where both models have it; empty without any."""
    shared = _shared_domains(student, other, figure)
    pools = [pooled({name: model.domains[name] for name in shared}) for model in (student, other)]
    ours, theirs = (figure(pool) for pool in pools)
    if ours is None or theirs is None:
        return ""
    bounds = [is_bound(pool) for pool in pools]
    show = number if max(ours, theirs) >= SMALL_NATS else significant
    words = " against ".join(
        f"{'at least ' if bound else ''}{show(value)}"
        for bound, value in zip(bounds, (ours, theirs), strict=True)
    )
    places = "" if len(shared) == len(student.domains) else f" in {', '.join(shared)}"
    return f"{label} {words} nats/token{places}{_verdict((ours, bounds[0]), (theirs, bounds[1]))}"


def _verdict(ours: Bounded, theirs: Bounded) -> str:
    """Comparison of two lower-is-better figures; a mere lower bound never wins.

    A figure above a lower bound may be above or below the quantity that the bound is about.
    """
    (our_figure, ours_is_bound), (their_figure, theirs_is_bound) = ours, theirs
    if number(our_figure) == number(their_figure):
        return "" if ours_is_bound or theirs_is_bound else " (level)"
    if our_figure < their_figure:
        return "" if ours_is_bound else " (better)"
    return "" if theirs_is_bound else " (worse)"


def _shared_domains(
    one: ModelFigures, two: ModelFigures, figure: Callable[[DomainFigures], float | None]
) -> list[str]:
    """Domains in which both models have a figure over as many hold-out tokens."""
    pairs = ((name, part, two.domains.get(name)) for name, part in one.domains.items())
    return [
        name
        for name, ours, theirs in pairs
        if theirs is not None
        and None not in (figure(ours), figure(theirs))
        and ours.holdout_tokens == theirs.holdout_tokens
    ]


def _resources(student: ModelFigures, other: ModelFigures) -> str:
    parts = [
        _ratio("parameters", student.parameters, other.parameters, "smaller", "larger"),
        _ratio(
            "tokens/s",
            student.tokens_per_second,
            other.tokens_per_second,
            "slower",
            "faster",
            [student.tokens_per_second_range, other.tokens_per_second_range],
        ),
    ]
    if student.price and other.price:
        ranges = [_price_range(student), _price_range(other)]
        label = "price per million tokens"
        parts.append(_ratio(label, student.price, other.price, "cheaper", "dearer", ranges))
    if student.device != other.device:
        places = ", ".join(f"{model.name} {_place(model)}" for model in (student, other))
        parts.append(f"measured on different hardware: {places}")
    return "; ".join(filter(None, parts))


def _ratio(
    label: str,
    ours: float | None,
    theirs: float | None,
    less: str,
    more: str,
    ranges: Sequence[Range] = (),
) -> str:
    """Ratio of the student's figure to another model's, in words; empty if one is unknown.

    Args:
        less: word for a smaller figure of the student.
        more: word for a larger figure of the student.
        ranges: both figures' ranges over the rounds of measurement, if there were several.
    """
    if not ours or not theirs:
        return ""
    word = less if ours < theirs else more if ours > theirs else "equal"
    if ranges and _overlap(*ranges):
        word = "level within the spread of the rounds"
    ratio = significant(ours / theirs)
    return f"{word}, {ratio} times the {label} ({scaled(ours)} against {scaled(theirs)})"


def _place(model: ModelFigures) -> str:
    return model.device if model.is_remote else f"on {model.device}"


def _price_range(model: ModelFigures) -> Range:
    """Prices per million tokens at the speeds of the fastest and the slowest round."""
    slowest, fastest = model.tokens_per_second_range
    low, high = (model.cost_per_hour / (speed * 3600) * 1e6 for speed in (fastest, slowest))
    return low, high


def _overlap(one: Range, two: Range) -> bool:
    """Whether two ranges have a value in common."""
    return one[0] <= two[1] and two[0] <= one[1]
