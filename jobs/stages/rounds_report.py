"""The report's rows for stages and rounds, from the stage records of all rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jobs.bookkeeping.plan import STAGE_NAMES
from jobs.bookkeeping.stage_records import read_record
from pipeline.config.rounds import round_layouts
from pipeline.config.run import Config
from pipeline.config.synthesis import STUDENT
from pipeline.layout import Layout
from pipeline.report.models import DomainFigures, RoundFigures, StageFigures
from pipeline.run.costs import stage_cost
from pipeline.sequences import read_dataset

MEASURED = STAGE_NAMES[:-1]
"""The stages that every round has; the last round's evaluation is measured while it runs."""


def stage_rows(config: Config) -> list[StageFigures]:
    """Time, cost and summary of every stage of every round, up to the evaluation."""
    rows = []
    for number, layout in enumerate(round_layouts(config), start=1):
        place = f"round {number}, " if config.round > 1 else ""
        for stage in MEASURED:
            # A stage that was stopped between its last output and its record has none.
            record = read_record(layout, stage)
            rows.append(
                StageFigures(
                    stage=f"{place}{stage}",
                    seconds=record.seconds,
                    cost=stage_cost(config, record.engine_seconds, record.worker_seconds),
                    detail=record.summary,
                    unended=record.unended,
                )
            )
    return rows


def round_rows(
    config: Config, students: Sequence[Mapping[str, DomainFigures]]
) -> list[RoundFigures]:
    """Training data, training time and student of each round.

    Args:
        students: figures by domain of each round's student, all measured on the hold-out prompts
            and sequences of the last round.
    """
    return [
        _row(number, layout, domains)
        for number, (layout, domains) in enumerate(
            zip(round_layouts(config), students, strict=True), start=1
        )
    ]


def _row(number: int, layout: Layout, domains: Mapping[str, DomainFigures]) -> RoundFigures:
    dataset = read_record(layout, "score").dataset
    assert dataset is not None, "every round has scored before the last one is evaluated"
    entries = read_dataset(layout, dataset)
    trained = [entry for entry in entries if entry.split == "train"]
    training = read_record(layout, "train").figures[STUDENT]
    return RoundFigures(
        round=number,
        sequences=len(trained),
        by_student=sum(STUDENT in entry.authors for entry in trained),
        steps=training["steps"],
        tokens=training["tokens"],
        seconds=sum(read_record(layout, stage).seconds for stage in MEASURED),
        domains=dict(domains),
    )
