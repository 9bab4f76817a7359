"""Entry point of every stage, for its Ray job. A stage does only what is missing."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext

import ray

from jobs.bookkeeping.plan import key_cautions, length_cautions, make_plan
from jobs.bookkeeping.stage_records import (
    StageRecord,
    read_record,
    unended_attempts,
    with_earlier_attempts,
    write_record,
)
from jobs.cluster.run_lock import alone
from jobs.stages.inputs import dataset_to_score, dataset_to_train_on
from pipeline import storage
from pipeline.cache_care.status import stale_caches
from pipeline.config.load import dump_config
from pipeline.config.rounds import layout_of
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.layout import Layout
from pipeline.run.prepared_run import Run

logger = logging.getLogger(__name__)

ALONE = ("train", "export")
"""Stages that write files in place. All other stages may run twice at once, since both processes
write the same.
"""
USES_OUTPUT_OF = {"export": "train", "evaluate": "export"}
"""Stages whose input lies in one folder, whichever config has made it."""


def run_stage(stage: str, config: Config) -> None:
    """Runs one stage and keeps its record: what it did, how long it and its engines took.

    Raises:
        DistillationError: the stage failed; everything that it has finished stays.
    """
    layout = layout_of(config)
    plans = {plan.stage: plan for plan in make_plan(config)}
    if plans[stage].todo == 0:
        logger.info("up to date (%s)", plans[stage].summary)
        return
    needed = USES_OUTPUT_OF.get(stage)
    if needed and plans[needed].todo:
        raise ConfigError(f"{needed} is not complete for this config: submit it first")
    started = time.time()
    unended = unended_attempts(layout, stage)
    storage.write_json(layout.unended_attempts(stage), unended + 1)
    if stage != "prepare":
        join_cluster()
    lock = alone(layout.lock(stage), f"{stage} of the run {config.name}")
    with lock if stage in ALONE else nullcontext():
        record = STAGE_FUNCTIONS[stage](config)
    # Written last: if a stage is refused, the folder keeps the config that made its content.
    storage.write_bytes(layout.resolved_config, dump_config(config).encode(), private=True)
    attempt: dict[str, float] = {"started": started, "unended": unended}
    if stage != "train":  # its checkpoints count the seconds of all its starts
        attempt["seconds"] = time.time() - started
    _keep_record(layout, stage, record.model_copy(update=attempt))
    storage.write_json(layout.unended_attempts(stage), 0)
    logger.info(record.summary)


def _prepare(config: Config) -> StageRecord:
    from jobs.stages.prepare import prepare

    run = prepare(config)
    prepared = run.prepared
    for line in [*stale_caches(run), *length_cautions(config, prepared.longest_prompt)]:
        logger.info(line)
    for line in [*key_cautions(config), *prepared.unread_references]:
        logger.warning(line)
    counts = ", ".join(f"{name} {count}" for name, count in prepared.prompt_counts.items())
    return StageRecord(key=prepared.key, summary=f"prompts: {counts}; vocabularies agree")


def _synthesize(config: Config) -> StageRecord:
    from jobs.cluster.placement import cautions
    from jobs.stages.synthesize import synthesize

    for line in cautions(config, ray.nodes()):
        logger.info("caution: %s", line)
    return synthesize(Run.open(config))


def _score(config: Config) -> StageRecord:
    from jobs.stages.score import score

    run = Run.open(config)
    return score(run, dataset_to_score(run))


def _train(config: Config) -> StageRecord:
    from jobs.stages.train import train

    return train(Run.open(config))


def _export(config: Config) -> StageRecord:
    from jobs.stages.export import export

    return export(Run.open(config))


def _evaluate(config: Config) -> StageRecord:
    from jobs.stages.evaluate import evaluate

    run = Run.open(config)
    return evaluate(run, dataset_to_train_on(run))


# Each function imports its stage when it runs, since engines take seconds to import.
STAGE_FUNCTIONS: dict[str, Callable[[Config], StageRecord]] = {
    "prepare": _prepare,
    "synthesize": _synthesize,
    "score": _score,
    "train": _train,
    "export": _export,
    "evaluate": _evaluate,
}


def _keep_record(layout: Layout, stage: str, record: StageRecord) -> None:
    """Writes the record of a stage; earlier attempts with the same key are added to it.

    The train stage counts earlier attempts itself, by its checkpoints.
    """
    earlier = read_record(layout, stage)
    if stage != "train" and earlier.key == record.key:
        record = with_earlier_attempts(record, earlier)
    write_record(layout, stage, record)


def join_cluster() -> None:
    """Makes this process, which runs inside a job, a driver of the job's cluster."""
    ray.init(log_to_driver=False, logging_level=logging.WARNING)
