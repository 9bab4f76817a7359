"""Stage 4: trains the student, and the twin if the config asks for one."""

from __future__ import annotations

import time

import ray

from jobs.bookkeeping.stage_records import StageRecord, stage_key
from jobs.stages.inputs import dataset_to_train_on
from pipeline.run.prepared_run import Run
from pipeline.run.training_spec import training_specs


def train(run: Run) -> StageRecord:
    """Trains every student of the run from its newest checkpoint.

    Raises:
        ConfigError: the score stage has not finished.
        ClusterError: the cluster cannot hold the training workers.
        TrainingError: a training failed, or its folder holds another training.
    """
    from students.checkpoints.resume import seconds_before
    from students.launching.launch import train_student
    from teachers.pool.placement import check_placement

    started = time.time()
    dataset, training = dataset_to_train_on(run), run.config.training
    if not run.config.cluster.autoscaling:
        check_placement("the student", training.resources, ray.nodes(), training.workers)
    specs = training_specs(run, dataset)
    before = sum(seconds_before(spec) for spec in specs)
    summaries = {spec.student: train_student(spec) for spec in specs}
    return StageRecord(
        key=stage_key(run, "train"),
        figures=summaries,
        # Checkpoints count the seconds of earlier starts, and so do the summaries.
        seconds=before + time.time() - started,
        worker_seconds=training.workers * sum(s["seconds"] for s in summaries.values()),
        summary="; ".join(
            f"{student}: {s['steps']} steps, {s['tokens'] / s['seconds']:.0f} tokens/s"
            for student, s in summaries.items()
        ),
    )
