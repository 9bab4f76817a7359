"""Work of one teacher's engines, their progress and their time, for synthesize and score."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.config.run import Config
from pipeline.config.teachers import EndpointTeacherConfig
from pipeline.fingerprint import digest_json
from pipeline.run.prepared_run import Run
from pipeline.run.shared_storage import marks_of
from teachers.pool.actor import Task
from teachers.pool.contracts import PoolReport
from teachers.pool.pool import TeacherWork
from teachers.protocol import EndpointSpec, EngineSpec

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0
"""Least time between two progress lines of a pool."""


def teacher_work(
    run: Run,
    name: str,
    tasks: Sequence[Task],
    *,
    min_model_len: int,
    num_logprobs: int,
    unit: str,
    hidden_layers: tuple[int, ...] = (),
    share_prefixes: bool = False,
) -> TeacherWork:
    """The work of one teacher, or of the student that writes, with the engine that it needs.

    Args:
        name: name of the teacher, or `student`.
        tasks: tasks of its engines.
        min_model_len: tokens that the engine must hold.
        num_logprobs: capture width; 0 if the engine only generates.
        unit: plural of the tasks' items, for progress lines.
        hidden_layers: layers whose hidden states the engine captures.
        share_prefixes: whether several sequences to score begin with one prompt.
    """
    config = run.config
    teacher = config.author(name)
    if isinstance(teacher, EndpointTeacherConfig):
        spec = endpoint_spec(run, name, min_model_len=min_model_len, num_logprobs=num_logprobs)
    else:
        spec = EngineSpec(
            model=teacher.model,
            revision=teacher.revision,
            trust_remote_code=teacher.trust_remote_code,
            vllm=teacher.vllm,
            num_logprobs=num_logprobs,
            hidden_layers=hidden_layers,
            share_prefixes=share_prefixes,
            min_model_len=min_model_len,
            seed=config.seed,
            eos_token_ids=run.prepared.stop_token_ids(name),
        )
    return TeacherWork(
        name,
        spec,
        teacher.resources,
        teacher.replicas,
        tasks,
        config.cluster.env_vars,
        _progress(unit, name),
        config.cluster.autoscaling,
        marks=marks_of(run.layout),
    )


def endpoint_spec(run: Run, name: str, *, min_model_len: int, num_logprobs: int) -> EndpointSpec:
    """Specification of an endpoint; one that scores must repeat its first canary."""
    teacher = run.config.teachers[name]
    assert isinstance(teacher, EndpointTeacherConfig), f"{name} runs in engines of this run"
    identity = run.prepared.identities[name]
    scored = digest_json([identity, run.prepared.tokenizer_hash])
    server = digest_json([identity, teacher.endpoint.url])
    return EndpointSpec(
        endpoint=teacher.endpoint,
        student=run.config.student,
        min_model_len=min_model_len,
        num_logprobs=num_logprobs,
        eos_token_ids=run.prepared.stop_token_ids(name),
        canary_path=run.layout.endpoint_canary(scored) if teacher.scores else None,
        batches_folder=run.layout.endpoint_batches(server) if teacher.endpoint.batch else None,
        is_padded=run.prepared.vocabulary_size is not None,
    )


def engine_seconds(
    config: Config, reports: dict[str, PoolReport], seconds: float
) -> dict[str, float]:
    """Seconds of all engines, by model.

    Each engine counts for the whole time, which is an upper bound.
    """
    return {
        name: config.author(name).replicas * seconds
        for name, report in reports.items()
        if report.engines
    }


def _progress(unit: str, name: str) -> Callable[[int, int, Any], None]:
    """Progress callback of a pool; it logs now and then, and at the end."""
    started = last = time.monotonic()

    def log_progress(done: int, total: int, _: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= PROGRESS_SECONDS:
            last = now
            logger.info("%s: %d/%d %s, %.0f s", name, done, total, unit, now - started)

    return log_progress
