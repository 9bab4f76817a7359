"""One teacher in one Ray actor, an engine or the client of an endpoint, and the driver's handle.

The task travels to the teacher: the actor runs the task beside the teacher, where the task reads
its input and writes its output. Only the task and its small result travel; no log-probabilities
enter Ray's object store.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from pipeline.config.base import Resources
from pipeline.run.shared_storage import Mark, check_folder_here, check_marks
from teachers.pool.contracts import ReplicaDied, ReplicaLost, Task
from teachers.pool.deaths import reason_in_words
from teachers.pool.dispatch import TASKS_IN_FLIGHT
from teachers.protocol import Canary, Comparison, EndpointSpec, EngineDiedError, EngineSpec, Teacher

ENGINE_ENV_VARS = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}
THREADS_BIND, MULTIPROCESSING = "VLLM_CPU_OMP_THREADS_BIND", "VLLM_ENABLE_V1_MULTIPROCESSING"
CPU_ENV_VARS = {
    # GiB. Without it vLLM takes a share of the machine's whole memory.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # vLLM's own choice gives every engine of a machine the same first cores.
    THREADS_BIND: "nobind",
    # vLLM starts a worker process beside the engine's own only to bind threads. Without the worker
    # an engine starts in two thirds of the time; `AsyncLLM` still has a process of its own.
    MULTIPROCESSING: "0",
}
SHUTDOWN_SECONDS = 20
NOTICE_SECONDS = 40
"""Time within which Ray should know why an actor is out of reach: it notices a lost node after 15
seconds.
"""
OTHER_CALLS = 2
"""Calls of an actor beside those of its tasks."""


class TeacherActor:
    """Ray actor with one teacher, which runs several tasks at a time in one event loop."""

    _teacher: Teacher

    def __init__(self, spec: EngineSpec | EndpointSpec, marks: Sequence[Mark] = ()) -> None:
        self._spec, self._marks = spec, marks

    async def placed(self) -> str:
        """The id of the node that has the actor, as soon as the actor has its resources."""
        return ray.get_runtime_context().get_node_id()

    async def ready(self) -> dict[str, Any]:
        """Starts the engine, or asks the endpoint which model it serves; returns the metadata.

        Raises:
            StorageError: this node does not see the storage of the run, or a folder of the spec.
            DistillationError: the teacher refuses to start.
        """
        await asyncio.to_thread(self._check_node, ray.util.get_node_ip_address())
        if isinstance(self._spec, EndpointSpec):
            from teachers.endpoint.teacher import EndpointTeacher

            self._teacher = await EndpointTeacher.start(self._spec)
        else:
            from teachers.engine.vllm_teacher import VllmTeacher

            self._teacher = await VllmTeacher.start(self._spec)
        return self._teacher.metadata()

    def _check_node(self, address: str) -> None:
        check_marks(self._marks, address)
        for folder in self._spec.folders:
            check_folder_here(folder, address)

    async def canary(self) -> Canary | None:
        """The teacher's canary; None if none of its rows are kept."""
        return self._teacher.canary()

    async def compare_with_transformers(self) -> Comparison:
        """Compares the engine with transformers."""
        from teachers.engine.vllm_teacher import VllmTeacher

        assert isinstance(self._teacher, VllmTeacher), "an endpoint has no weights here"
        return await self._teacher.compare_with_transformers()

    async def run(self, task: Task) -> Any:
        """Runs a task beside the teacher."""
        return await task.run(self._teacher)

    async def peak_memory_bytes(self) -> int | None:
        """Peak memory of the engine's processes in bytes; None if unknown."""
        return self._teacher.peak_memory_bytes()

    async def waits_for(self) -> str | None:
        """Event elsewhere that the teacher waits for; None if it works."""
        return self._teacher.waits_for()

    async def shutdown(self) -> None:
        """Stops the engine, so that its memory is free when the actor ends."""
        self._teacher.shutdown()


class RayReplica:
    """Driver's handle on one actor; the actor waits in Ray until its resources are free."""

    def __init__(
        self,
        spec: EngineSpec | EndpointSpec,
        resources: Resources,
        env_vars: Mapping[str, str],
        tasks_in_flight: int = TASKS_IN_FLIGHT,
        marks: Sequence[Mark] = (),
    ) -> None:
        self._is_ready = False
        self._node_id: str | None = None
        self._actor: Any = (
            ray.remote(TeacherActor)
            .options(
                num_cpus=resources.num_cpus,
                num_gpus=resources.num_gpus,
                resources=resources.custom,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=tasks_in_flight + OTHER_CALLS,
                runtime_env={"env_vars": engine_env_vars(resources, env_vars, os.environ)},
            )
            .remote(spec, marks)
        )

    async def placed(self) -> None:
        """Waits until the cluster has room for the actor."""
        self._node_id = await self._ask(self._actor.placed.remote())

    async def node_is_gone(self) -> bool:
        """Whether the cluster has lost the node that had the actor."""
        nodes = await asyncio.to_thread(ray.nodes)
        return any(node["NodeID"] == self._node_id and not node["Alive"] for node in nodes)

    async def ready(self) -> dict[str, Any]:
        """Waits until the teacher has started; returns its metadata."""
        metadata = await self._ask(self._actor.ready.remote())
        self._is_ready = True
        return metadata

    async def canary(self) -> Canary | None:
        """The teacher's canary; None if none of its rows are kept."""
        return await self._ask(self._actor.canary.remote())

    async def compare_with_transformers(self) -> Comparison:
        """Comparison of the engine with transformers."""
        return await self._ask(self._actor.compare_with_transformers.remote())

    async def run(self, task: Task) -> Any:
        """Runs a task.

        Raises:
            ReplicaLost: the actor's node is gone.
            ReplicaDied: the actor or its engine is gone.
            Exception: the task's own exception, with Ray's traceback of the actor as its cause.
        """
        return await self._ask(self._actor.run.remote(task))

    async def peak_memory_bytes(self) -> int | None:
        """Peak memory of the engine's processes in bytes; None if unknown."""
        return await self._ask(self._actor.peak_memory_bytes.remote())

    async def waits_for(self) -> str | None:
        """Event elsewhere that the teacher waits for; None if it works."""
        return await self._ask(self._actor.waits_for.remote())

    async def stop(self) -> None:
        """Ends the actor and its engine, in whatever state they are."""
        try:
            if self._is_ready:
                with contextlib.suppress(RayError, TimeoutError):
                    await asyncio.wait_for(self._actor.shutdown.remote(), SHUTDOWN_SECONDS)
        finally:
            ray.kill(self._actor)

    async def _ask(self, reference: Any) -> Any:
        try:
            return await reference
        except RayTaskError as error:
            if isinstance(error.cause, EngineDiedError):
                raise ReplicaDied(str(error.cause)) from error
            raise error.cause from error
        except RayError as error:
            cause = await self._known_cause(error)
            kind = ReplicaLost if await self.node_is_gone() else ReplicaDied
            raise kind(reason_in_words(str(cause))) from error

    async def _known_cause(self, error: RayError) -> RayError:
        """Error that says why the actor is gone. Until Ray knows, the actor is only out of reach,
        and the next one might be put on the same lost node.
        """
        deadline = time.monotonic() + NOTICE_SECONDS
        while isinstance(error, ActorUnavailableError) and time.monotonic() < deadline:
            try:
                await asyncio.wait_for(self._actor.placed.remote(), NOTICE_SECONDS)
                break  # within reach again; a call of it was lost
            except TimeoutError:
                break
            except ActorUnavailableError:
                await asyncio.sleep(1)
            except RayError as known:
                error = known
        return error


def engine_env_vars(
    resources: Resources, env_vars: Mapping[str, str], inherited: Mapping[str, str]
) -> dict[str, str]:
    """Environment variables of an actor.

    Args:
        env_vars: the user's variables, which always win.
        inherited: variables of the Ray job; our defaults give way to them.
    """
    defaults = ENGINE_ENV_VARS | (CPU_ENV_VARS if resources.num_gpus == 0 else {})
    if THREADS_BIND in {*inherited, *env_vars}:
        defaults.pop(MULTIPROCESSING, None)
    return {key: value for key, value in defaults.items() if key not in inherited} | dict(env_vars)
