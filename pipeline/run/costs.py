"""Price of what a stage has used."""

from __future__ import annotations

from typing import Any

from pipeline.config.run import Config


def stage_cost(config: Config, record: dict[str, Any]) -> float:
    """Price of the engines and training workers of a stage's record, at the config's prices now."""
    prices = {name: teacher.cost_per_hour for name, teacher in config.teachers.items()}
    engines = sum(
        seconds * prices.get(name, config.student.cost_per_hour)
        for name, seconds in record.get("engine_seconds", {}).items()
    )
    workers = record.get("worker_seconds", 0.0) * config.training.cost_per_hour
    return (engines + workers) / 3600
