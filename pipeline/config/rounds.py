"""Rounds: the same stages again, each time from the student that the round before has exported.

    runs/<name>/   round 1        runs/<name>/rounds/2/   round 2        …

A round is a run like any other: its folder holds what a run's folder holds, and its config is the
run's with another start of the student. Caches, answers and prompts are shared, so that a round
asks only what no other has asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.synthesis import STUDENT
from pipeline.layout import Layout

if TYPE_CHECKING:
    from pipeline.config.run import Config


def layout_of(config: Config) -> Layout:
    """The paths of a run, in its round."""
    return round_layouts(config)[-1]


def round_layouts(config: Config) -> list[Layout]:
    """The paths of every round up to the config's own."""
    first = Layout(config.storage.root, config.name, config.storage.models_root)
    return [first.of_round(number) for number in range(1, config.round + 1)]


def rounds_of(config: Config) -> list[Config]:
    """The config of each round, from the one that the config is about to the last."""
    return [of_round(config, number) for number in range(config.round, config.rounds + 1)]


def of_round(config: Config, number: int) -> Config:
    """The config of one round, with absolute paths; not of one before the config's own.

    Beyond the first, the student starts from the one that the round before has exported.
    """
    assert number >= config.round, "the start of a former round is not known any more"
    if number == 1:
        return config
    first, *_ = round_layouts(config)
    start = first.of_round(number - 1).export_folder(STUDENT)
    student = config.student.model_copy(update={"initial_weights": start})
    return config.model_copy(update={"round": number, "student": student})
