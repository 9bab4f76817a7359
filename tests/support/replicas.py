"""Replicas of a pool that run in the process of the test."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from teachers.endpoint.teacher import EndpointTeacher
from teachers.pool.contracts import ReplicaDied
from teachers.protocol import Comparison, EndpointSpec, EngineDiedError


class EndpointReplica:
    """A replica in this process that asks an endpoint."""

    def __init__(self, spec: EndpointSpec, sleep: Callable[[float], Awaitable[object]]) -> None:
        self._spec, self._sleep = spec, sleep

    async def placed(self) -> None: ...
    async def node_is_gone(self) -> bool:
        return False

    async def ready(self) -> dict[str, Any]:
        self._teacher = await EndpointTeacher.start(self._spec, self._sleep)
        return self._teacher.metadata()

    async def canary(self) -> None: ...
    async def compare_with_transformers(self) -> Comparison:
        raise AssertionError("an endpoint has no weights here")

    async def run(self, task: Any) -> Any:
        try:
            return await task.run(self._teacher)
        except EngineDiedError as error:
            raise ReplicaDied(str(error)) from error

    async def peak_memory_bytes(self) -> None: ...
    async def waits_for(self) -> str | None:
        return self._teacher.waits_for()

    async def stop(self) -> None:
        self._teacher.shutdown()
        await asyncio.sleep(0)
