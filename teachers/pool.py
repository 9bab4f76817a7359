"""The pools of a run: for each teacher its actors and the tasks that they share.

All pools run in one event loop of the driver. An actor that finds no room waits in Ray, so teachers
run at once where the cluster has room for all, and one after another where it has not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from pipeline.config_base import Resources
from pipeline.errors import ClusterError
from teachers.actor import RayReplica
from teachers.dispatch import Dispatcher, PoolReport, Progress, Task, cancel
from teachers.engine import EngineSpec


@dataclass(frozen=True)
class PoolJob:
    """The work of one teacher.

    Attributes:
        replicas: engines at most; never more than tasks.
        env_vars: environment of its actors, beside our defaults.
        progress: called in the driver with items done, items in all, and the result of the task
            just finished.
    """

    name: str
    spec: EngineSpec
    resources: Resources
    replicas: int
    tasks: Sequence[Task]
    env_vars: Mapping[str, str] = field(default_factory=dict)
    progress: Progress | None = None

    def launch(self) -> RayReplica:
        """A new actor."""
        return RayReplica(self.name, self.spec, self.resources, self.env_vars)


def run_pools(jobs: Sequence[PoolJob]) -> dict[str, PoolReport]:
    """Runs the work of several teachers; their actors share the cluster as it has room.

    Raises:
        ClusterError: no node of the cluster could hold an engine.
        TeacherError: a teacher cannot progress; the others are stopped, and what they wrote stays.
    """
    nodes = ray.nodes()
    for job in jobs:
        if job.tasks:
            check_placement(job.name, job.resources, nodes)
    return asyncio.run(_run_all(jobs))


async def _run_all(jobs: Sequence[PoolJob]) -> dict[str, PoolReport]:
    dispatchers = [Dispatcher(j.name, j.launch, j.replicas, j.tasks, j.progress) for j in jobs]
    running = [asyncio.create_task(each.run()) for each in dispatchers]
    try:
        reports = await asyncio.gather(*running)
    finally:
        await cancel(running)
    return {job.name: report for job, report in zip(jobs, reports, strict=True)}


def check_placement(name: str, resources: Resources, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Checks that some node could hold one actor, if it were free.

    Args:
        nodes: what `ray.nodes()` returns.

    Raises:
        ClusterError: no node of the cluster, as it is now, has the resources.
    """
    request = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.custom}
    request = {key: amount for key, amount in request.items() if amount > 0}
    offers = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(all(offer.get(key, 0) >= n for key, n in request.items()) for offer in offers):
        hidden = ("memory", "object_store_memory")  # of no use here, like the `node:<address>` ones
        shown = [
            {key: n for key, n in offer.items() if key not in hidden and ":" not in key}
            for offer in offers
        ]
        raise ClusterError(
            f"no node can hold an engine of {name!r}, which asks for {request}; the nodes have "
            f"{shown}. Lower its resources, or add such a node."
        )
