"""One entry point a stage, for its Ray job. All are idempotent and do only what is missing."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import ray

from jobs.bookkeeping.plan import length_cautions, make_plan
from jobs.bookkeeping.stage_records import (
    dataset_of,
    read_record,
    stage_key,
    unended_attempts,
)
from jobs.cluster.run_lock import alone
from jobs.stages.inputs import Outcome, prepared_of, required, scored_of
from pipeline import storage
from pipeline.cache_care.status import stale_caches
from pipeline.config.load import dump_config
from pipeline.config.rounds import layout_of
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from pipeline.layout import Layout

ALONE = ("train", "export")
"""Stages that write files in place; whatever two of the others write at once is the same."""
USES_OUTPUT_OF = {"export": "train", "evaluate": "export"}
"""Stages whose input lies at one place, whatever config has made it."""


def run_stage(stage: str, config: Config) -> None:
    """Runs one stage and keeps its record: what it did, how long it and its engines took.

    Raises:
        DistillationError: what went wrong; everything finished before stays.
    """
    layout = layout_of(config)
    plans = {plan.stage: plan for plan in make_plan(config)}
    if plans[stage].todo == 0:
        print(f"up to date ({plans[stage].summary})", flush=True)
        return
    needed = USES_OUTPUT_OF.get(stage)
    if needed and plans[needed].todo:
        raise ConfigError(f"{needed} is not complete for this config: let it run first")
    log_our_lines()
    started = time.time()
    unended = unended_attempts(layout, stage)
    storage.write_json(layout.unended_attempts(stage), unended + 1)
    if stage != "prepare":
        join_cluster()
    lock = alone(layout.lock(stage), f"{stage} of the run {config.name}")
    with lock if stage in ALONE else nullcontext():
        outcome = STAGE_FUNCTIONS[stage](config, layout)
    # A refused stage leaves the config that made what lies there.
    storage.write_bytes(layout.resolved_config, dump_config(config).encode())
    record = {"seconds": time.time() - started, "started": started, "unended": unended, **outcome}
    _keep_record(layout, stage, record)
    storage.write_json(layout.unended_attempts(stage), 0)
    print(outcome["summary"], flush=True)


def _prepare(config: Config, layout: Layout) -> Outcome:
    from jobs.stages.prepare import prepare

    prepared = prepare(config)
    for line in [
        *stale_caches(layout, prepared),
        *length_cautions(config, prepared.longest_prompt),
    ]:
        print(line, flush=True)
    counts = ", ".join(f"{name} {count}" for name, count in prepared.prompt_counts.items())
    summary = f"prompts: {counts}; vocabularies agree"
    return {"key": prepared.key, "summary": summary}


def _synthesize(config: Config, layout: Layout) -> Outcome:
    from jobs.cluster.placement import cautions
    from jobs.stages.synthesize import synthesize

    for line in cautions(config, ray.nodes()):
        print(f"caution: {line}", flush=True)
    return synthesize(config, layout, prepared_of(config, layout))


def _score(config: Config, layout: Layout) -> Outcome:
    from jobs.stages.score import score

    prepared = prepared_of(config, layout)
    return score(
        config, layout, prepared, required(dataset_of(config, layout, prepared), "synthesize")
    )


def _evaluate(config: Config, layout: Layout) -> Outcome:
    from jobs.stages.evaluate import evaluate

    prepared, dataset = scored_of(config, layout)
    outcome = evaluate(config, layout, prepared, dataset)
    return {"key": stage_key(config, layout, prepared, "evaluate"), **outcome}


def _train(config: Config, layout: Layout) -> Outcome:
    from jobs.stages.train import train

    return train(config, layout)


def _export(config: Config, layout: Layout) -> Outcome:
    from jobs.stages.export import export

    return export(config, layout)


# Each imports what it needs when it runs: engines take seconds to import.
STAGE_FUNCTIONS: dict[str, Callable[[Config, Layout], Outcome]] = {
    "prepare": _prepare,
    "synthesize": _synthesize,
    "score": _score,
    "train": _train,
    "export": _export,
    "evaluate": _evaluate,
}


def _keep_record(layout: Layout, stage: str, record: Outcome) -> None:
    """Writes the record of a stage; what earlier runs of the same work took is added (train counts
    that by its checkpoints).
    """
    before = read_record(layout, stage)
    if stage != "train" and before.get("key") == record["key"]:
        record["seconds"] += before["seconds"]
        record["unended"] += before.get("unended", 0)
        took = Counter(before.get("engine_seconds", {}))
        took.update(record.get("engine_seconds", {}))
        record["engine_seconds"] = dict(took)
    storage.write_json(layout.stage_record(stage), record)


def join_cluster() -> None:
    """Makes this process, which runs inside a job, a driver of the job's cluster."""
    ray.init(log_to_driver=False, logging_level=logging.WARNING)


def log_our_lines() -> None:
    """Shows what this project's modules log, and of all others only warnings."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    for package in ("pipeline", "teachers", "students", "jobs"):
        logging.getLogger(package).setLevel(logging.INFO)
