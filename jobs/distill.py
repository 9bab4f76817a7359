"""The whole run, in order. Every stage is a Ray job that is followed; a failure stops the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext

from ray.job_submission import JobSubmissionClient

from jobs.bookkeeping.plan import STAGE_NAMES, StagePlan, make_plan, plan_rounds, stages_of
from jobs.cluster.connection import connect
from jobs.cluster.placement import check_local_head
from jobs.cluster.run_lock import alone
from jobs.cluster.stage_jobs import cluster, is_visible, submit_and_follow_stage
from jobs.stages.preflight import check_options
from pipeline.config.load import check_shared_paths
from pipeline.config.rounds import layout_of, round_layouts, rounds_of
from pipeline.config.run import Config

logger = logging.getLogger(__name__)


def run(config: Config, address: str | None, stages: Sequence[str] = STAGE_NAMES) -> None:
    """Runs every stage of every round that has something to do.

    Args:
        config: config of the run.
        address: URL of a cluster's job server; None for a local Ray head, which ends with the run.
        stages: all stages, or the first few of them.

    Raises:
        DistillationError: a stage failed, the cluster cannot be reached, or the config cannot be
            honoured.
    """
    logger.info("run %s: %s", config.name, " -> ".join(stages))
    if address is not None:
        check_shared_paths(config)
    visible = is_visible(config, address)
    rounds = plan_rounds(config, stages) if visible else []
    todo = {plan.stage for plans in rounds for plan in plans if plan.todo}
    if rounds and not todo:
        logger.info("nothing to do: every stage is complete")
        logger.info(where(config, stages))
        return
    if address is None:  # a cluster may have other libraries than this machine
        check_options(config)
        check_local_head(config, todo)
    # Commands with local Ray heads do not see one another's jobs, so they need a lock.
    lock = round_layouts(config)[0].lock("run")
    only_one = alone(lock, f"the run {config.name}") if address is None else nullcontext()
    with only_one, cluster(config, address) as url:
        client = connect(url)
        for of_round in rounds_of(config):
            _run_round(client, address, of_round, stages_of(of_round, stages), visible)
    logger.info(where(config, stages))


def _run_round(
    client: JobSubmissionClient,
    address: str | None,
    config: Config,
    stages: Sequence[str],
    visible: bool,
) -> None:
    of_round = f"round {config.round}/{config.rounds}, " if config.rounds > 1 else ""
    for number, stage in enumerate(stages, start=1):
        prefix = f"[{of_round}{number}/{len(stages)} {stage}] "
        plan = _plan_of(config, stage) if visible else None
        if plan is not None and plan.todo == 0:
            logger.info("%sup to date (%s)", prefix, plan.summary)
            continue
        started = time.monotonic()
        submit_and_follow_stage(client, address, config, stage, prefix)
        logger.info("%sdone in %.0f s", prefix, time.monotonic() - started)


def where(config: Config, stages: Sequence[str]) -> str:
    """Places of the results of a run's last round, one a line."""
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
