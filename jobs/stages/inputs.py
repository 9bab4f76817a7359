"""Datasets that a stage takes from earlier stages, or a refusal that names the missing stage."""

from __future__ import annotations

from jobs.bookkeeping.stage_records import scored_dataset, synthesized_dataset
from pipeline.errors import ConfigError
from pipeline.run.prepared_run import Run


def dataset_to_score(run: Run) -> str:
    """Digest of the dataset that synthesize has written.

    Raises:
        ConfigError: synthesize has not finished for this config.
    """
    return _required(synthesized_dataset(run), "synthesize")


def dataset_to_train_on(run: Run) -> str:
    """Digest of the dataset that score has written.

    Raises:
        ConfigError: score has not finished for this config.
    """
    return _required(scored_dataset(run), "score")


def _required(dataset: str | None, stage: str) -> str:
    if dataset is None:
        raise ConfigError(f"the stage {stage} has not finished for this config: submit it first")
    return dataset
