"""The whole run, in order: every stage a Ray job, followed to its end; a failure stops it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext

from ray.job_submission import JobSubmissionClient

from jobs.bookkeeping.plan import STAGE_NAMES, StagePlan, make_plan, plan_rounds, stages_of
from jobs.cluster.connection import connect
from jobs.cluster.placement import check_local_head
from jobs.cluster.run_lock import alone
from jobs.cluster.stage_jobs import Say, cluster, is_visible, submit_and_follow_stage
from pipeline.config.load import check_shared_paths
from pipeline.config.rounds import layout_of, round_layouts, rounds_of
from pipeline.config.run import Config


def run(config: Config, address: str | None, say: Say, stages: Sequence[str] = STAGE_NAMES) -> None:
    """Runs every stage of every round that has something to do, on a cluster or on a head of its
    own.

    Args:
        stages: all, or the first of them.

    Raises:
        DistillationError: a stage failed, the cluster cannot be reached, or the config cannot be
            honoured.
    """
    say(f"run {config.name}: {' -> '.join(stages)}")
    if address is not None:
        check_shared_paths(config)
    visible = is_visible(config, address)
    plans = plan_rounds(config, stages) if visible else []
    if plans and not any(plan.todo for of_round in plans for plan in of_round):
        say("nothing to do: every stage is complete")
        say(where(config, stages))
        return
    if address is None:
        check_local_head(config, {p.stage for of_round in plans for p in of_round if p.todo})
    # A head of its own knows no job of another's.
    lock = round_layouts(config)[0].lock("run")
    only_one = alone(lock, f"the run {config.name}") if address is None else nullcontext()
    with only_one, cluster(config, address) as url:
        client = connect(url)
        for each in rounds_of(config):
            _run_round(client, address, each, stages_of(each, stages), visible, say)
    say(where(config, stages))


def _run_round(
    client: JobSubmissionClient,
    address: str | None,
    config: Config,
    stages: Sequence[str],
    visible: bool,
    say: Say,
) -> None:
    of_round = f"round {config.round}/{config.rounds}, " if config.rounds > 1 else ""
    for number, stage in enumerate(stages, start=1):
        say_stage = _prefixed(say, f"[{of_round}{number}/{len(stages)} {stage}]")
        plan = _plan_of(config, stage) if visible else None
        if plan is not None and plan.todo == 0:
            say_stage(f"up to date ({plan.summary})")
            continue
        started = time.monotonic()
        submit_and_follow_stage(client, address, config, stage, say_stage)
        say_stage(f"done in {time.monotonic() - started:.0f} s")


def where(config: Config, stages: Sequence[str]) -> str:
    """Where the results of a run's stages lie, of its last round, one a line."""
    layout = layout_of(rounds_of(config)[-1])
    report = {"report": layout.report_html, "figures": layout.report_json}
    places = (report if stages[-1] == STAGE_NAMES[-1] else {}) | {
        "caches": layout.caches_folder,
        "student": layout.export_folder("student"),
        "metrics": layout.metrics("student"),
    }
    return "\n".join(f"{name + ':':9} {path}" for name, path in places.items())


def _plan_of(config: Config, stage: str) -> StagePlan:
    return next(plan for plan in make_plan(config) if plan.stage == stage)


def _prefixed(say: Say, prefix: str) -> Say:
    return lambda line: say(f"{prefix} {line}")
