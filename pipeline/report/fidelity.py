"""Fidelity on the hold-out split: how closely each model follows the mixture and each teacher, and
the student's differences from other models, with intervals.

All figures are means over the tokens of the hold-out answers. Answers to one prompt depend on each
other, so a prompt counts as one observation; differences between models are taken prompt by prompt,
which removes what makes some prompts harder for all models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.records import DatasetEntry
from pipeline.report.models import DifferenceFigures, Estimate, FidelityFigures
from pipeline.report.statistics import mean_interval

Target = str | None
"""A teacher, or None for the mixture of the teachers."""
STUDENT = "student"


@dataclass(frozen=True)
class SequenceSums:
    """Sums over the positions of one sequence, for one model and one target.

    Attributes:
        tokens: number of positions.
        loss: cross-entropy with the text, in nats.
        kl: KL divergence from the target to the model, in nats; None where the target is known by
            draws alone.
        agreement: number of positions at which the model's likeliest token is the target's; None as
            for `kl`.
        bounded_mass: the target's mass on ids that make `kl` a lower bound.
    """

    tokens: int
    loss: float
    kl: float | None
    agreement: float | None
    bounded_mass: float = 0.0


SumsOfModel = Mapping[Target, Mapping[str, SequenceSums]]
"""Sums of one model by target and sequence id."""
Figure = Callable[[SequenceSums], float | None]


def fidelity_figures(
    sums: Mapping[str, SumsOfModel], entries: Sequence[DatasetEntry]
) -> list[FidelityFigures]:
    """Fidelity of every model to the mixture and to every teacher, in each domain and in all.

    Args:
        sums: sums by model.
        entries: sequences of the hold-out split.
    """
    figures = []
    for target in dict.fromkeys(target for of_model in sums.values() for target in of_model):
        for domain, members in _domains(entries):
            for model, of_model in sums.items():
                measured = [(e, s) for e in members if (s := of_model[target].get(e.sequence_id))]
                kl = _estimate(measured, lambda s: s.kl, (0.0, math.inf))
                agreement = _estimate(measured, lambda s: s.agreement, (0.0, 1.0))
                if kl is None or agreement is None:
                    continue
                figures.append(
                    FidelityFigures(
                        model=model,
                        teacher=target,
                        domain=domain,
                        prompts=len({entry.prompt_id for entry, _ in measured}),
                        tokens=sum(of_sequence.tokens for _, of_sequence in measured),
                        kl=kl,
                        agreement=agreement,
                    )
                )
    return figures


def difference_figures(
    sums: Mapping[str, SumsOfModel], entries: Sequence[DatasetEntry]
) -> list[DifferenceFigures]:
    """Differences of the student from every other model, towards the mixture and every teacher.

    Args:
        sums: sums by model; `student` is one of them.
        entries: sequences of the hold-out split.
    """
    figures = []
    ours = sums[STUDENT]
    for other, theirs in sums.items():
        if other == STUDENT:
            continue
        for target in ours:
            for domain, members in _domains(entries):
                pairs = [
                    (entry, _minus(ours[target][i], theirs[target][i]))
                    for entry in members
                    if (i := entry.sequence_id) in ours[target] and i in theirs[target]
                ]
                if not pairs:
                    continue
                figures.append(
                    DifferenceFigures(
                        other=other,
                        teacher=target,
                        domain=domain,
                        prompts=len({entry.prompt_id for entry, _ in pairs}),
                        loss=_estimate(pairs, lambda s: s.loss),
                        kl=_estimate(pairs, lambda s: s.kl),
                        agreement=_estimate(pairs, lambda s: s.agreement),
                    )
                )
    return figures


def _domains(
    entries: Sequence[DatasetEntry],
) -> Iterable[tuple[str | None, Sequence[DatasetEntry]]]:
    """Every domain with its sequences, and None with all sequences if there are several domains."""
    domains = sorted({entry.domain for entry in entries})
    for domain in domains:
        yield domain, [entry for entry in entries if entry.domain == domain]
    if len(domains) > 1:
        yield None, entries


def _minus(ours: SequenceSums, theirs: SequenceSums) -> SequenceSums:
    def difference(figure: Figure) -> float | None:
        one, other = figure(ours), figure(theirs)
        return None if one is None or other is None else one - other

    return SequenceSums(
        tokens=ours.tokens,
        loss=ours.loss - theirs.loss,
        kl=difference(lambda s: s.kl),
        agreement=difference(lambda s: s.agreement),
    )


def _estimate(
    measured: Sequence[tuple[DatasetEntry, SequenceSums]],
    figure: Figure,
    possible: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate | None:
    """Mean of a figure over tokens, with its interval; None if a sequence lacks the figure.

    Args:
        possible: least and largest value that the mean can have.
    """
    values: dict[str, float] = {}
    tokens: dict[str, int] = {}
    for entry, sums in measured:
        value = figure(sums)
        if value is None:
            return None
        values[entry.prompt_id] = values.get(entry.prompt_id, 0.0) + value
        tokens[entry.prompt_id] = tokens.get(entry.prompt_id, 0) + sums.tokens
    if not values:
        return None
    mean = sum(values.values()) / sum(tokens.values())
    interval = mean_interval(list(values.values()), list(tokens.values()))
    if interval is None:
        return Estimate(mean=mean, low=None, high=None)
    low, high = max(interval[0], possible[0]), min(interval[1], possible[1])
    return Estimate(mean=mean, low=low, high=high)
