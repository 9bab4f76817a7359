"""Stage 4: trains the student, and the twin where the config asks for one."""

from __future__ import annotations

import time

import ray

from jobs.bookkeeping.stage_records import (
    stage_key,
)
from jobs.stages.inputs import Outcome, scored_of
from pipeline.config.run import Config
from pipeline.layout import Layout
from pipeline.run.training_spec import training_specs


def train(config: Config, layout: Layout) -> Outcome:
    from students.checkpoints.checkpoint import seconds_before
    from students.launch import train_student
    from teachers.pool.placement import check_placement

    started = time.time()
    prepared, dataset = scored_of(config, layout)
    if not config.cluster.autoscaling:
        training = config.training
        check_placement("the student", training.resources, ray.nodes(), training.workers)
    jobs = training_specs(config, layout, prepared, dataset)
    before = sum(seconds_before(job) for job in jobs)
    figures = {job.student: train_student(job) for job in jobs}
    return {
        "key": stage_key(config, layout, prepared, "train"),
        "figures": figures,
        "seconds": before + time.time() - started,
        # Of the summaries, which count all starts.
        "worker_seconds": config.training.workers * sum(f["seconds"] for f in figures.values()),
        "summary": "; ".join(
            f"{label}: {found['steps']} steps, {found['tokens'] / found['seconds']:.0f} tokens/s"
            for label, found in figures.items()
        ),
    }
