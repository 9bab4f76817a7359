"""Tasks to replicas: several in flight, retry, bisection, quarantine, replacement of the dead.

A dispatcher belongs to one teacher and knows nothing of Ray: `launch` gives it replicas.

What happens to a task that fails: it is tried once more; then it is cut in halves; a single item is
set aside. A task that can tell which of its items failed has done the others, and only these are
tried once more, one by one. Items set aside are quarantined as soon as another task succeeds, for
that shows that the item is at fault and not the engine; where no other is left, a control task
takes its place. Tasks that were in flight when a replica died are suspects: its successor takes
them alone, one after another, so that a second death names the culprit.

Every engine, also one that replaces a dead one, must say the same of a canary as the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeVar

from pipeline.errors import ConfigError, DistillationError, StorageError, TeacherError
from teachers.canary import ControlTask, refuse_difference
from teachers.protocol import Canary, EngineDiedError, ItemsFailedError, Teacher

logger = logging.getLogger(__name__)

# Answers differ in length: while the longest of a task is still being written, the others keep the
# engine full.
TASKS_IN_FLIGHT = 6
TRIES = 2
# One item that kills its engine costs at most five deaths in a row: among others, twice in its
# task, twice in the first half of it.
DEATHS_IN_A_ROW = 5
ITEMS_SET_ASIDE_IN_A_ROW = 8
NOT_THE_ITEMS_FAULT = (ConfigError, StorageError)
WAITING_SECONDS = 60
LOGGED = ("engine_version", "device", "dtype", "capture", "capture_reason", "prefix_sharing")

Progress = Callable[[int, int, Any], None]
Item = TypeVar("Item")
Reply = TypeVar("Reply")


class ReplicaDied(Exception):
    """A replica is gone, and what it was doing is unknown."""


class Task(Protocol):
    """A picklable unit of work."""

    @property
    def label(self) -> str:
        """For messages."""
        ...

    def __len__(self) -> int:
        """Number of items."""
        ...

    def halves(self) -> tuple[Self, Self]:
        """The same work in two tasks, neither empty; asked of tasks of at least two items."""
        ...

    def quarantine(self, error: str) -> None:
        """Records, in the driver, that its one item cannot be done."""
        ...

    async def run(self, teacher: Teacher) -> Any:
        """Does the work inside the actor; doing it again is harmless.

        Raises:
            ItemsFailedError: some items failed, and the others are done.
        """
        ...


class Replica(Protocol):
    """One engine; `teachers/pool/actor.py` has the real one."""

    async def placed(self) -> None: ...
    async def ready(self) -> dict[str, Any]: ...
    async def canary(self) -> Canary | None: ...
    async def run(self, task: Any) -> Any: ...
    async def peak_memory_bytes(self) -> int | None: ...
    async def stop(self) -> None: ...


@dataclass
class PoolReport:
    """What became of the tasks.

    Attributes:
        results: of the tasks that succeeded, in the order in which they finished; a task that was
            cut in halves has a result for each part that succeeded.
        quarantined: label and error of every item set aside.
        engines: description of every engine that started, with its `peak_memory_bytes` (None if it
            died).
        num_deaths: replicas that were lost.
    """

    results: list[Any] = field(default_factory=list)
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    engines: list[dict[str, Any]] = field(default_factory=list)
    num_deaths: int = 0


@dataclass(eq=False)
class _Attempt:
    """A task and what became of it so far.

    Attributes:
        stood_among_others: it is one item of a task whose other items are done.
        begun, failed: when it last did, by `time.monotonic`.
        error: of its last failure.
    """

    task: Any
    failures: int = 0
    stood_among_others: bool = False
    begun: float = 0.0
    failed: float = 0.0
    error: str = ""


class Dispatcher:
    """Runs the tasks of one teacher once, on replicas that `launch` makes."""

    def __init__(
        self,
        name: str,
        launch: Callable[[], Replica],
        replicas: int,
        tasks: Sequence[Task],
        progress: Progress | None = None,
        check_canary: Callable[[Canary], None] | None = None,
    ) -> None:
        """`check_canary` refuses an engine by its canary, whatever the other engines say."""
        self._name, self._check_canary = name, check_canary
        self._launch = launch
        self._num_slots = min(replicas, len(tasks))
        # No replica takes at once what another, still starting, could share.
        self._num_lanes = min(TASKS_IN_FLIGHT, math.ceil(len(tasks) / max(self._num_slots, 1)))
        self._progress = progress
        self._total = self._open_items = sum(len(task) for task in tasks)
        # Last in, first out: what failed is settled before new work begins.
        self._queue: asyncio.LifoQueue[_Attempt] = asyncio.LifoQueue()
        for task in reversed(tasks):
            self._queue.put_nowait(_Attempt(task))
        self._finished = asyncio.Event()
        self._running: dict[Replica, dict[str, Any]] = {}
        self._set_aside: list[_Attempt] = []
        self._first_canary: Canary | None = None
        self._deaths_in_a_row = 0
        self._report = PoolReport()

    async def run(self) -> PoolReport:
        """Runs all tasks and stops all replicas.

        Raises:
            TeacherError: nothing can progress, or items failed and so does a control.
            DistillationError: an engine refuses to start, storage failed twice.
        """
        if not self._open_items:
            return self._report
        slots = [asyncio.create_task(self._slot()) for _ in range(self._num_slots)]
        finished = asyncio.create_task(self._finished.wait())
        try:
            await asyncio.wait([finished, *slots], return_when=asyncio.FIRST_COMPLETED)
            for slot in slots:
                if slot.done() and not self._finished.is_set():
                    slot.result()
            for replica, description in list(self._running.items()):
                with contextlib.suppress(ReplicaDied):
                    description["peak_memory_bytes"] = await replica.peak_memory_bytes()
            return self._report
        finally:
            await cancel([finished, *slots])

    async def _slot(self) -> None:
        """Keeps one replica running and replaces it when it dies; ends by error or cancellation."""
        suspects: deque[_Attempt] = deque()
        while not self._finished.is_set():
            replica = self._launch()
            try:
                await self._place(replica, suspects)
                await self._start(replica)
                while suspects:
                    await self._run_alone(replica, suspects)
                await self._run_lanes(replica, suspects)
            except ReplicaDied as death:
                self._count_death(death)
            finally:
                self._running.pop(replica, None)
                await replica.stop()

    async def _place(self, replica: Replica, suspects: deque[_Attempt]) -> None:
        """Waits for room; meanwhile others take the suspects, for the room may be gone for good."""
        placing = asyncio.ensure_future(replica.placed())
        try:
            while not (await asyncio.wait([placing], timeout=WAITING_SECONDS))[0]:
                logger.info("%s: an engine waits for room in the cluster", self._name)
                self._put(list(suspects))
                suspects.clear()
            placing.result()
        finally:
            placing.cancel()

    async def _start(self, replica: Replica) -> None:
        try:
            description = await replica.ready()
            await self._compare(await replica.canary())
        except (DistillationError, ReplicaDied):
            raise
        except Exception as error:
            raise ReplicaDied(f"the engine did not start: {error}") from error
        shown = ", ".join(f"{k} {description[k]}" for k in LOGGED if k in description)
        logger.info("%s: an engine is ready: %s", self._name, shown)
        self._running[replica] = description | {"peak_memory_bytes": None}
        self._report.engines.append(self._running[replica])

    async def _compare(self, canary: Canary | None) -> None:
        """Refuses an engine that says something else than the first one, dead or alive."""
        if canary is None:
            return
        if self._first_canary is None:
            self._first_canary = canary
        refuse_difference(self._name, self._first_canary, canary)
        if self._check_canary is not None:
            await asyncio.to_thread(self._check_canary, canary)

    async def _run_lanes(self, replica: Replica, suspects: deque[_Attempt]) -> None:
        in_flight: list[_Attempt] = []
        lanes = [
            asyncio.create_task(self._lane(replica, in_flight)) for _ in range(self._num_lanes)
        ]
        try:
            await asyncio.gather(*lanes)
        except ReplicaDied as death:
            alone = len(in_flight) == 1
            suspects.extend(self._remainder(in_flight[0], death) if alone else in_flight)
            raise
        finally:
            await cancel(lanes)

    async def _lane(self, replica: Replica, in_flight: list[_Attempt]) -> None:
        while True:
            attempt = await self._queue.get()
            in_flight.append(attempt)
            attempt.begun = time.monotonic()
            try:
                result = await replica.run(attempt.task)
            except ReplicaDied:
                raise
            except Exception as error:
                self._put(self._remainder(attempt, error))
            else:
                self._succeed(attempt, result)
            in_flight.remove(attempt)

    async def _run_alone(self, replica: Replica, suspects: deque[_Attempt]) -> None:
        attempt = suspects[0]
        attempt.begun = time.monotonic()
        try:
            result = await replica.run(attempt.task)
        except ReplicaDied as death:
            suspects.popleft()
            suspects.extend(self._remainder(attempt, death))
            raise
        except Exception as error:
            suspects.popleft()
            self._put(self._remainder(attempt, error))
        else:
            suspects.popleft()
            self._succeed(attempt, result)

    def _put(self, attempts: list[_Attempt]) -> None:
        for attempt in reversed(attempts):
            self._queue.put_nowait(attempt)

    def _succeed(self, attempt: _Attempt, result: Any) -> None:
        self._deaths_in_a_row = 0
        self._quarantine()
        if isinstance(attempt.task, ControlTask):
            self._close(0)
        else:
            self._add(len(attempt.task), result)

    def _add(self, num_items: int, result: Any) -> None:
        self._report.results.append(result)
        self._close(num_items)
        if self._progress:
            self._progress(self._total - self._open_items, self._total, result)

    def _remainder(self, attempt: _Attempt, error: Exception) -> list[_Attempt]:
        """What is still to be tried of a task that failed."""
        task = attempt.task
        attempt.failures += 1
        attempt.failed, attempt.error = time.monotonic(), str(error)
        logger.warning("%s: %s failed (%d): %s", self._name, task.label, attempt.failures, error)
        if isinstance(error, ItemsFailedError):
            self._quarantine(before=attempt.begun)
            self._add(len(task) - len(error.failed), error.result)
            return [_Attempt(each, 1, stood_among_others=True) for each, _ in error.failed]
        if attempt.failures < TRIES:
            return [attempt]
        if isinstance(task, ControlTask):
            count, first = len(self._set_aside), self._set_aside[0]
            raise TeacherError(
                f"{self._name}: {count} items failed, first {first.task.label}: {first.error}. The "
                f"engine fails {task.label} as well ({error}), so it is at fault and not they"
            ) from error
        if isinstance(error, NOT_THE_ITEMS_FAULT):
            raise error
        if len(task) > 1:
            return [_Attempt(half) for half in task.halves()]
        self._set_aside.append(attempt)
        count = sum(not each.stood_among_others for each in self._set_aside)
        if count > ITEMS_SET_ASIDE_IN_A_ROW:
            raise TeacherError(
                f"{self._name}: {count} items failed one after another and nothing succeeds, last "
                f"{task.label}: {error}"
            ) from error
        self._close(1)
        return []

    def _close(self, num_items: int) -> None:
        self._open_items -= num_items
        if self._open_items == 0 and self._set_aside:
            self._put([_Attempt(ControlTask())])
        elif self._open_items == 0:
            self._finished.set()

    def _quarantine(self, before: float = math.inf) -> None:
        """Of what is set aside all that failed before a time from which on an item succeeded."""
        for attempt in [each for each in self._set_aside if each.failed < before]:
            task, error = attempt.task, attempt.error
            logger.warning("%s: %s is quarantined: %s", self._name, task.label, error)
            task.quarantine(error)
            self._report.quarantined.append((task.label, error))
            self._set_aside.remove(attempt)

    def _count_death(self, death: ReplicaDied) -> None:
        self._report.num_deaths += 1
        self._deaths_in_a_row += 1
        logger.warning("%s: lost a replica: %s", self._name, death)
        bound = self._num_slots + (DEATHS_IN_A_ROW if self._report.engines else 1)
        if self._deaths_in_a_row >= bound:
            raise TeacherError(
                f"{self._name}: {self._deaths_in_a_row} engines died and nothing was done "
                f"meanwhile, last: {death}"
            ) from death


async def ask_each(
    items: Sequence[Item], ask: Callable[[Item], Awaitable[Reply]]
) -> tuple[list[tuple[Item, Reply]], list[tuple[Item, str]]]:
    """Asks a teacher for all items of a task at once.

    Returns:
        The items with their replies, and those that failed with their errors, each in order.

    Raises:
        TeacherError: all failed, which is not said of any one of them.
        DistillationError: the teacher is gone or cannot be asked like this; no other item is asked
            any longer.
    """

    async def reply_or_error(item: Item) -> Reply | TeacherError:
        try:
            return await ask(item)
        except EngineDiedError:
            raise
        except TeacherError as error:
            return error

    asking = [asyncio.create_task(reply_or_error(item)) for item in items]
    try:
        found = list(zip(items, await asyncio.gather(*asking), strict=True))
    finally:
        await cancel(asking)
    errors = [reply for _, reply in found if isinstance(reply, TeacherError)]
    if errors and len(errors) == len(items):
        raise errors[0]
    done = [(item, reply) for item, reply in found if not isinstance(reply, TeacherError)]
    failed = [(item, str(reply)) for item, reply in found if isinstance(reply, TeacherError)]
    return done, failed


async def cancel(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancels asyncio tasks and waits until their clean-up is done."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
