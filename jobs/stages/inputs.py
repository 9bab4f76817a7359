"""The inputs that a stage takes from earlier stages, or a refusal that names the missing one."""

from __future__ import annotations

from typing import Any

from jobs.bookkeeping.stage_records import scored_dataset
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.layout import Layout
from pipeline.run.preparation import Prepared, load_prepared

Outcome = dict[str, Any]


def prepared_of(config: Config, layout: Layout) -> Prepared:
    prepared = load_prepared(config, layout)
    if prepared is None:
        raise ConfigError(
            f"run {config.name} is not prepared for this config: submit prepare first"
        )
    return prepared


def scored_of(config: Config, layout: Layout) -> tuple[Prepared, str]:
    prepared = prepared_of(config, layout)
    return prepared, required(scored_dataset(config, layout, prepared), "score")


def required(dataset: str | None, stage: str) -> str:
    if dataset is None:
        raise ConfigError(f"the stage {stage} has not finished for this config: submit it first")
    return dataset
