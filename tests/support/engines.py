"""Real engines in the test's own process, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from teachers.pool.actor import CPU_ENV_VARS, ENGINE_ENV_VARS
from teachers.protocol import EngineSpec

if TYPE_CHECKING:
    from teachers.engine.vllm_teacher import VllmTeacher

T = TypeVar("T")


@dataclass
class Running:
    """A started teacher with its event loop; a call runs a coroutine in the loop."""

    teacher: VllmTeacher
    loop: asyncio.AbstractEventLoop

    def __call__(self, request: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(request)


@contextmanager
def started(spec: EngineSpec) -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (ENGINE_ENV_VARS | CPU_ENV_VARS).items():
            patch.setenv(key, value)
        from teachers.engine.vllm_teacher import VllmTeacher

        loop = asyncio.new_event_loop()
        teacher = loop.run_until_complete(VllmTeacher.start(spec))
        yield Running(teacher, loop)
        teacher.shutdown()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
