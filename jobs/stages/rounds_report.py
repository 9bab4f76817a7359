"""What the report says of each round, from the records that its stages have left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.bookkeeping.plan import STAGE_NAMES
from jobs.bookkeeping.stage_records import read_record
from pipeline.config.rounds import round_layouts
from pipeline.config.run import Config
from pipeline.config.synthesis import STUDENT
from pipeline.layout import Layout
from pipeline.run.costs import stage_cost
from pipeline.sequences import read_dataset

Json = dict[str, Any]
MEASURED = STAGE_NAMES[:-1]
"""The stages that every round has; the last round's evaluation is measured while it runs."""


def stage_rows(config: Config) -> list[Json]:
    """Seconds, cost and summary of every stage of every round, up to the evaluation, and how many
    attempts that did not end are not in them.
    """
    rows = []
    for number, layout in enumerate(round_layouts(config), start=1):
        place = f"round {number}, " if config.round > 1 else ""
        for stage in MEASURED:
            # A stage that was stopped between its last output and its record has none.
            record = read_record(layout, stage)
            rows.append(
                {
                    "stage": f"{place}{stage}",
                    "seconds": record.seconds,
                    "cost": stage_cost(config, record.engine_seconds, record.worker_seconds),
                    "detail": record.summary,
                    "unended": record.unended,
                }
            )
    return rows


def round_rows(config: Config, students: Sequence[Json]) -> list[Json]:
    """What each round trained on and for how long, and its student on the hold-out split.

    Args:
        students: of each round the student's figures by domain; all are measured on the prompts and
            sequences of the last round.
    """
    return [
        _row(number, layout, domains)
        for number, (layout, domains) in enumerate(
            zip(round_layouts(config), students, strict=True), start=1
        )
    ]


def _row(number: int, layout: Layout, domains: Json) -> Json:
    dataset = read_record(layout, "score").dataset
    assert dataset is not None, "every round has scored before the last one is evaluated"
    entries = read_dataset(layout, dataset)
    trained = [entry for entry in entries if entry.split == "train"]
    training = read_record(layout, "train").figures[STUDENT]
    return {
        "round": number,
        "sequences": len(trained),
        "by_student": sum(STUDENT in entry.authors for entry in trained),
        "steps": training["steps"],
        "tokens": training["tokens"],
        "seconds": sum(read_record(layout, stage).seconds for stage in MEASURED),
        "domains": domains,
    }
