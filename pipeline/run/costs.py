"""Prices of the hardware that stages have used."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.config.run import Config


def stage_cost(
    config: Config, engine_seconds: Mapping[str, float], worker_seconds: float = 0.0
) -> float:
    """Price of the engines and training workers of one stage, at the prices of the config.

    Args:
        engine_seconds: seconds of the engines, by model; names that are no teacher's are students.
        worker_seconds: seconds of all training workers together.
    """
    prices = {name: teacher.cost_per_hour for name, teacher in config.teachers.items()}
    engines = sum(
        seconds * prices.get(name, config.student.cost_per_hour)
        for name, seconds in engine_seconds.items()
    )
    return (engines + worker_seconds * config.training.cost_per_hour) / 3600
