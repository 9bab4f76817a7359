"""Fidelity to the teachers in words, and its rows in the page's table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline.report.models import (
    DifferenceFigures,
    Estimate,
    FidelityFigures,
    PreferenceFigures,
    Report,
)
from pipeline.report.numbers import number, percent, significant
from pipeline.report.statistics import wilson_interval

SMALL_NATS = 0.01
Row = TypeVar("Row", FidelityFigures, DifferenceFigures, PreferenceFigures)
LABELS = {"twin": "the twin", "start": "the model that it started from"}
"""Models that have no name of their own, in words."""


def fidelity_words(report: Report) -> str:
    """Closeness of the student to the mixture, beside that of the models that it is compared with,
    over all domains; empty where it is not known for all of them.
    """
    ours = _overall(report.fidelity, "student")
    if ours is None:
        return ""
    whose = _mixture(report)
    sentence = (
        f"The student's next-token distributions are {nats(ours.kl.mean)} nats/token from "
        f"{whose} (KL{_interval(ours.kl)}), and its likeliest token is theirs at "
        f"{percent(ours.agreement.mean)} of {ours.tokens:,} hold-out tokens"
    )
    others = [
        f"{LABELS[model]} is at {nats(row.kl.mean)} and {percent(row.agreement.mean)}"
        for model in LABELS
        if (row := _overall(report.fidelity, model)) is not None
    ]
    return "; ".join([sentence, *others]) + "."


def difference_words(report: Report, other: str) -> str:
    """The student's differences from another model over all domains, each with its interval and
    what it means; empty without a measurement.
    """
    figures = over_all([d for d in report.differences if (d.other, d.teacher) == (other, None)])
    if figures is None:
        return ""
    whose = _mixture(report)
    parts = [
        _nats_difference(f"KL to {whose}", figures.kl),
        _points_difference(figures.agreement),
        _nats_difference("hold-out loss", figures.loss),
    ]
    return "; ".join(filter(None, parts))


def preference_words(figures: PreferenceFigures) -> str:
    """The judge's preference with its interval, and the prompts at which there is none."""
    rest = {
        "the same answer": figures.same,
        "equally good": figures.ties,
        "changed with the order of the answers": figures.inconsistent,
        "not judged": figures.unjudged,
    }
    others = ", ".join(f"{count:,} {reason}" for reason, count in rest.items() if count)
    beside = f"; of {figures.prompts:,} prompts {others}" if others else ""
    if not figures.decided:
        return f"no preference at any of {figures.prompts:,} prompts{beside}"
    share = figures.wins / figures.decided
    low, high = wilson_interval(share, figures.decided)
    chance = ", within chance" if low <= 0.5 <= high else ""
    return (
        f"the student's answer is preferred at {percent(share)} of {figures.decided:,} decided "
        f"prompts (95 % {number(100 * low, 1)} to {percent(high)}{chance}){beside}"
    )


def nats(value: float) -> str:
    """A divergence or loss, with more digits where it is small."""
    return number(value) if abs(value) >= SMALL_NATS else significant(value)


def holds_zero(estimate: Estimate) -> bool:
    """Whether chance explains a difference: its interval holds zero, or there is none."""
    if estimate.low is None or estimate.high is None:
        return True
    return estimate.low <= 0 <= estimate.high


@dataclass(frozen=True)
class FidelityRow:
    """One row of the page's table: a model, or the student minus another model."""

    label: str
    model: str
    kl: str
    kl_interval: str
    agreement: str
    agreement_interval: str
    is_difference: bool


@dataclass(frozen=True)
class FidelityGroup:
    """Rows of one domain and one target."""

    domain: str
    is_overall: bool
    target: str
    prompts: int
    tokens: int
    rows: tuple[FidelityRow, ...]


def fidelity_groups(report: Report) -> Iterator[FidelityGroup]:
    """The table of the page; a mixture of one teacher is that teacher, and left out."""
    teachers = dict.fromkeys(row.teacher for row in report.fidelity)
    shown = [teacher for teacher in teachers if teacher is not None or len(teachers) != 2]
    for domain in dict.fromkeys(row.domain for row in report.fidelity):
        for teacher in shown:
            place = (domain, teacher)
            rows = [r for r in report.fidelity if (r.domain, r.teacher) == place]
            apart = [d for d in report.differences if (d.domain, d.teacher) == place]
            if rows:
                yield FidelityGroup(
                    domain=domain or "All domains",
                    is_overall=domain is None,
                    target=teacher or "the mixture",
                    prompts=rows[0].prompts,
                    tokens=rows[0].tokens,
                    rows=(*map(_model_row, rows), *_difference_rows(apart)),
                )


def _model_row(row: FidelityFigures) -> FidelityRow:
    return FidelityRow(
        label=row.model,
        model=row.model,
        kl=nats(row.kl.mean),
        kl_interval=_range(row.kl, nats),
        agreement=percent(row.agreement.mean),
        agreement_interval=_range(row.agreement, lambda share: number(100 * share, 1)),
        is_difference=False,
    )


def _difference_rows(figures: Iterable[DifferenceFigures]) -> Iterator[FidelityRow]:
    for row in figures:
        if row.kl is None or row.agreement is None:
            continue
        yield FidelityRow(
            label=f"student minus {row.other}",
            model=row.other,
            kl=_signed(row.kl.mean),
            kl_interval=_range(row.kl, _signed),
            agreement=_points(row.agreement.mean),
            agreement_interval=_range(row.agreement, _points),
            is_difference=True,
        )


def _mixture(report: Report) -> str:
    teachers = {row.teacher for row in report.fidelity} - {None}
    return f"those of {next(iter(teachers))}" if len(teachers) == 1 else "the teachers' mixture"


def over_all(rows: Sequence[Row]) -> Row | None:
    """The row over all domains among rows about the same models; None if some domain is missing."""
    if len(rows) == 1:
        return rows[0]
    return next((row for row in rows if row.domain is None), None)


def _overall(figures: Iterable[FidelityFigures], model: str) -> FidelityFigures | None:
    """The row of a model over all domains towards the mixture."""
    return over_all([row for row in figures if (row.model, row.teacher) == (model, None)])


def _interval(estimate: Estimate) -> str:
    return f", 95 % {_range(estimate, nats)}" if estimate.low is not None else ""


def _range(estimate: Estimate, show: Callable[[float], str]) -> str:
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{show(estimate.low)} to {show(estimate.high)}"


def _spread(estimate: Estimate, show: Callable[[float], str]) -> str:
    """The interval of a difference, counted in the direction of its mean."""
    if estimate.low is None or estimate.high is None:
        return ""
    sign = -1 if estimate.mean < 0 else 1
    low, high = sorted((sign * estimate.low, sign * estimate.high))
    return f", 95 % {show(low)} to {show(high)}"


def _signed(value: float) -> str:
    return f"+{nats(value)}" if value > 0 else nats(value).replace("-", "\u2212")


def _points(share: float) -> str:
    sign = "+" if share > 0 else "\u2212" if share < 0 else ""
    return f"{sign}{number(100 * abs(share), 1)}"


def _nats_difference(label: str, estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    verdict = "within chance" if holds_zero(estimate) else "better"
    if verdict == "better" and estimate.mean > 0:
        verdict = "worse"
    word = "lower" if estimate.mean < 0 else "higher"
    change = f"{nats(abs(estimate.mean))} nats/token {word}{_spread(estimate, nats)}"
    return f"{label} {change} ({verdict})"


def _points_difference(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    verdict = "within chance" if holds_zero(estimate) else "better"
    if verdict == "better" and estimate.mean < 0:
        verdict = "worse"
    word = "higher" if estimate.mean >= 0 else "lower"
    points = number(100 * abs(estimate.mean), 1)
    spread = _spread(estimate, lambda share: number(100 * share, 1))
    return f"top-1 agreement {points} points {word}{spread} ({verdict})"
