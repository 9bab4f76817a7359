"""Pools of a run: the actors of each teacher, and the tasks that these actors share.

All pools run in one event loop of the driver. An actor that finds no room waits in Ray, so teachers
run at the same time if the cluster has room for all of them, and one after another if it has not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import ray

from pipeline.config.base import Resources
from pipeline.run.shared_storage import Mark
from teachers.concurrency import cancel
from teachers.pool.actor import RayReplica
from teachers.pool.contracts import PoolReport, Progress, Task
from teachers.pool.dispatch import TASKS_IN_FLIGHT, Dispatcher
from teachers.pool.placement import check_placement, room_in_words
from teachers.protocol import Canary, EndpointSpec, EngineSpec


@dataclass(frozen=True)
class TeacherWork:
    """Tasks of one teacher, and the actors that do them.

    Attributes:
        name: name of the teacher.
        spec: specification of its engines, or of its endpoint.
        resources: Ray resources of one actor.
        replicas: largest number of actors; never more than tasks are started.
        tasks: the work to do.
        env_vars: environment variables of the actors, beside our defaults.
        progress: called in the driver with the items done, the items in all, and the result of the
            task just finished.
        autoscaling: the cluster adds nodes on demand, so an actor that no present node can hold
            waits.
        check_canary: refuses an engine by its canary.
        compare_with_transformers: compare the first engine with transformers before it works.
        marks: files that every node must see before its actor works.
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
    compare_with_transformers: bool = False
    marks: tuple[Mark, ...] = ()

    def launch(self) -> RayReplica:
        """Starts a new actor."""
        return RayReplica(
            self.spec, self.resources, self.env_vars, self.tasks_in_flight, self.marks
        )

    def room(self) -> str:
        """Resources of one actor, and those of the cluster, for people."""
        return room_in_words(self.resources, ray.nodes(), ray.available_resources())

    @property
    def tasks_in_flight(self) -> int:
        """Tasks that one actor works on at a time: all of them if their requests wait in batches,
        so that few batches hold them all.
        """
        waits = isinstance(self.spec, EndpointSpec) and self.spec.endpoint.batch
        return max(len(self.tasks), 1) if waits else TASKS_IN_FLIGHT


def run_pools(all_work: Sequence[TeacherWork]) -> dict[str, PoolReport]:
    """Runs the work of several teachers; their actors share the cluster as it has room.

    Raises:
        ClusterError: no node of the cluster could hold an actor.
        TeacherError: a teacher cannot progress; the others are stopped, and what they have written
            stays.
    """
    for work in all_work:
        if work.tasks and not work.autoscaling:
            check_placement(f"an engine of {work.name!r}", work.resources, ray.nodes())
    return asyncio.run(_run_all(all_work))


async def _run_all(all_work: Sequence[TeacherWork]) -> dict[str, PoolReport]:
    dispatchers = [
        Dispatcher(
            w.name,
            w.launch,
            w.replicas,
            w.tasks,
            w.progress,
            w.check_canary,
            w.compare_with_transformers,
            w.tasks_in_flight,
            w.room,
        )
        for w in all_work
    ]
    running = [asyncio.create_task(each.run()) for each in dispatchers]
    try:
        reports = await asyncio.gather(*running)
    finally:
        await cancel(running)
    return {work.name: report for work, report in zip(all_work, reports, strict=True)}
