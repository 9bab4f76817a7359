"""Contracts of a pool: what a task and a replica must do, and what a pool reports.

The ledger, the dispatcher, the Ray actor and the tasks all stand on these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from teachers.protocol import Canary, Comparison, Teacher

Progress = Callable[[int, int, Any], None]
"""Called with the items done, the items in all and the result of the task just finished."""


class ReplicaDied(Exception):
    """A replica is gone, and whether its tasks were done is unknown."""


class ReplicaLost(ReplicaDied):
    """A replica is gone with its node, or before a node had it: neither engine nor tasks did it."""


class Task(Protocol):
    """A picklable unit of work."""

    @property
    def label(self) -> str:
        """Name of the task in messages."""
        ...

    def __len__(self) -> int:
        """Number of items."""
        ...

    def halves(self) -> tuple[Self, Self]:
        """The same work in two tasks, neither empty; called for tasks of at least two items."""
        ...

    def quarantine(self, error: str) -> None:
        """Notes, in the driver, that the task's one item cannot be done."""
        ...

    async def run(self, teacher: Teacher) -> Any:
        """Does the work inside the actor; doing it again is harmless.

        Raises:
            ItemsFailedError: some items failed, and the others are done.
        """
        ...


class Replica(Protocol):
    """One engine, or one client of an endpoint; `teachers/pool/actor.py` has the real one."""

    async def placed(self) -> None: ...
    async def node_is_gone(self) -> bool: ...
    async def ready(self) -> dict[str, Any]: ...
    async def canary(self) -> Canary | None: ...
    async def compare_with_transformers(self) -> Comparison: ...
    async def run(self, task: Any) -> Any: ...
    async def peak_memory_bytes(self) -> int | None: ...
    async def waits_for(self) -> str | None: ...
    async def stop(self) -> None: ...


@dataclass
class PoolReport:
    """Outcome of one teacher's tasks.

    Attributes:
        results: results of the tasks that succeeded, in the order in which they finished; a task
            that was cut in halves has a result for each part that succeeded.
        quarantined: label and error of every item that was quarantined.
        engines: metadata of every replica that started, with its `peak_memory_bytes` (None if the
            replica died).
        num_deaths: number of replicas that were lost.
    """

    results: list[Any] = field(default_factory=list)
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    engines: list[dict[str, Any]] = field(default_factory=list)
    num_deaths: int = 0
