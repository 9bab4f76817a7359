"""Rounds: the same stages again, each time starting from the exported student of the last round.

    runs/<name>/   round 1        runs/<name>/rounds/2/   round 2        …

A round is like a run of its own: its folder holds the same files, and its config is the config of
the run with another start of the student. Caches, answers and prompts are shared by all rounds, so
a round asks only for what no other round has asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.synthesis import STUDENT
from pipeline.layout import Layout

if TYPE_CHECKING:
    from pipeline.config.run import Config


def layout_of(config: Config) -> Layout:
    """Paths of a run in the config's round."""
    return round_layouts(config)[-1]


def round_layouts(config: Config) -> list[Layout]:
    """Paths of every round up to the config's own."""
    first = Layout(config.storage.root, config.name, config.storage.models_root)
    return [first.of_round(number) for number in range(1, config.round + 1)]


def rounds_of(config: Config) -> list[Config]:
    """Configs of all rounds from the config's own to the last."""
    return [of_round(config, number) for number in range(config.round, config.rounds + 1)]


def of_round(config: Config, number: int) -> Config:
    """Config of one round, which must not lie before the config's own round.

    In every round but the first, the student starts from the exported student of the round before.

    Args:
        config: config with absolute paths.
    """
    assert number >= config.round, "the config no longer holds the start of an earlier round"
    if number == 1:
        return config
    first, *_ = round_layouts(config)
    start = first.of_round(number - 1).export_folder(STUDENT)
    student = config.student.model_copy(update={"initial_weights": start})
    return config.model_copy(update={"round": number, "student": student})
