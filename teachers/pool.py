"""The pools of a run: for each teacher its actors and the tasks that they share.

All pools run in one event loop of the driver. An actor that finds no room waits in Ray, so teachers
run at once where the cluster has room for all, and one after another where it has not.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from pipeline.config_base import Resources
from pipeline.errors import ClusterError
from teachers.actor import RayReplica
from teachers.canary import Canary
from teachers.dispatch import Dispatcher, PoolReport, Progress, Task, cancel
from teachers.engine import EndpointSpec, EngineSpec


@dataclass(frozen=True)
class PoolJob:
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


def run_pools(jobs: Sequence[PoolJob]) -> dict[str, PoolReport]:
    """Runs the work of several teachers; their actors share the cluster as it has room.

    Raises:
        ClusterError: no node of the cluster could hold an engine.
        TeacherError: a teacher cannot progress; the others are stopped, and what they wrote stays.
    """
    for job in jobs:
        if job.tasks and not job.autoscaling:
            check_placement(f"an engine of {job.name!r}", job.resources, ray.nodes())
    return asyncio.run(_run_all(jobs))


async def _run_all(jobs: Sequence[PoolJob]) -> dict[str, PoolReport]:
    dispatchers = [
        Dispatcher(j.name, j.launch, j.replicas, j.tasks, j.progress, j.check_canary) for j in jobs
    ]
    running = [asyncio.create_task(each.run()) for each in dispatchers]
    try:
        reports = await asyncio.gather(*running)
    finally:
        await cancel(running)
    return {job.name: report for job, report in zip(jobs, reports, strict=True)}


def check_placement(
    name: str, resources: Resources, nodes: Sequence[Mapping[str, Any]], count: int = 1
) -> None:
    """Checks that the cluster could hold so many actors or workers at once, if it were free.

    Args:
        nodes: what `ray.nodes()` returns.

    Raises:
        ClusterError: the nodes, as they are now, do not have the resources.
    """
    request = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.custom}
    request = {key: amount for key, amount in request.items() if amount > 0}
    offers = [node["Resources"] for node in nodes if node["Alive"]]
    if sum(_fitting(request, offer, count) for offer in offers) < count:
        hidden = ("memory", "object_store_memory")  # of no use here, like the `node:<address>` ones
        shown = [
            {key: n for key, n in offer.items() if key not in hidden and ":" not in key}
            for offer in offers
        ]
        raise ClusterError(
            f"the cluster cannot hold {name} ({count} of {request}); its nodes have {shown}. Lower "
            "the resources, add such a node, or set cluster.autoscaling if it adds nodes on demand"
        )


def _fitting(request: Mapping[str, float], offer: Mapping[str, float], most: int) -> int:
    """How many requests fit into a node's resources, at most `most`."""
    # A share such as 0.1 of a resource must not be lost to the rounding of floats.
    shares = [math.floor(offer.get(key, 0) / n + 1e-6) for key, n in request.items()]
    return min([most, *shares])
