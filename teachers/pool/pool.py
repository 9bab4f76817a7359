"""The pools of a run: for each teacher its actors and the tasks that they share.

All pools run in one event loop of the driver. An actor that finds no room waits in Ray, so teachers
run at once where the cluster has room for all, and one after another where it has not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import ray

from pipeline.config.base import Resources
from teachers.pool.actor import RayReplica
from teachers.pool.dispatch import Dispatcher, PoolReport, Progress, Task, cancel
from teachers.pool.placement import check_placement
from teachers.protocol import Canary, EndpointSpec, EngineSpec


@dataclass(frozen=True)
class TeacherWork:
    """The work of one teacher.

    Attributes:
        replicas: engines at most; never more than tasks.
        env_vars: environment of its actors, beside our defaults.
        progress: called in the driver with items done, items in all, and the result of the task
            just finished.
        autoscaling: the cluster adds nodes on demand, so what no present node can hold waits.
        check_canary: refuses an engine by what it says of the canary.
    """

    name: str
    spec: EngineSpec | EndpointSpec
    resources: Resources
    replicas: int
    tasks: Sequence[Task]
    env_vars: Mapping[str, str] = field(default_factory=dict)
    progress: Progress | None = None
    autoscaling: bool = False
    check_canary: Callable[[Canary], None] | None = None

    def launch(self) -> RayReplica:
        """A new actor."""
        return RayReplica(self.spec, self.resources, self.env_vars)


def run_pools(jobs: Sequence[TeacherWork]) -> dict[str, PoolReport]:
    """Runs the work of several teachers; their actors share the cluster as it has room.

    Raises:
        ClusterError: no node of the cluster could hold an engine.
        TeacherError: a teacher cannot progress; the others are stopped, and what they wrote stays.
    """
    for job in jobs:
        if job.tasks and not job.autoscaling:
            check_placement(f"an engine of {job.name!r}", job.resources, ray.nodes())
    return asyncio.run(_run_all(jobs))


async def _run_all(jobs: Sequence[TeacherWork]) -> dict[str, PoolReport]:
    dispatchers = [
        Dispatcher(j.name, j.launch, j.replicas, j.tasks, j.progress, j.check_canary) for j in jobs
    ]
    running = [asyncio.create_task(each.run()) for each in dispatchers]
    try:
        reports = await asyncio.gather(*running)
    finally:
        await cancel(running)
    return {job.name: report for job, report in zip(jobs, reports, strict=True)}
