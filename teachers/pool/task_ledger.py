"""Ledger of one teacher's tasks: queued, failed, retried, halved, set aside, quarantined.

The ledger knows no replica: the dispatcher takes attempts from it and tells it how they ended.

Policy for a task that fails: the task is tried once more; then it is cut in halves; a single item
is set aside. A task that can tell which of its items are at fault has done the others, so only the
failed items are tried once more, one by one. Items set aside are quarantined as soon as another
task succeeds, since that shows that the item is at fault and not the teacher. If no other task is
left, a control task takes its place. An error of the config ends the work at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError, StorageError, TeacherError
from teachers.pool.contracts import PoolReport, Progress, Task
from teachers.protocol import ItemRefusedError, ItemsFailedError
from teachers.tasks.control import ControlTask

logger = logging.getLogger(__name__)

TRIES = 2
ITEMS_SET_ASIDE_IN_A_ROW = 8


@dataclass(eq=False)
class Attempt:
    """A task and its history.

    Attributes:
        failures: number of times that the task failed.
        is_at_fault: the task is one item that the teacher refuses, or the one that failed of a
            larger task; so it says nothing against the teacher.
        begun: time of the last start, by `time.monotonic`.
        failed: time of the last failure, by `time.monotonic`.
        error: message of the last failure.
    """

    task: Any
    failures: int = 0
    is_at_fault: bool = False
    begun: float = 0.0
    failed: float = 0.0
    error: str = ""


class TaskLedger:
    """Tasks of one teacher, from the first attempt to the report.

    Attributes:
        report: report of the pool; the ledger fills in results and quarantined items.
        finished: set when no item is open any longer.
    """

    def __init__(self, name: str, tasks: Sequence[Task], progress: Progress | None) -> None:
        self.report = PoolReport()
        self.finished = asyncio.Event()
        self._name, self._progress = name, progress
        self._total = self._open_items = sum(len(task) for task in tasks)
        self._set_aside: list[Attempt] = []
        # Last in, first out: what failed is settled before new work begins.
        self._queue: asyncio.LifoQueue[Attempt] = asyncio.LifoQueue()
        self.put([Attempt(task) for task in tasks])

    @property
    def is_empty(self) -> bool:
        """Whether there is no item left to do."""
        return self._open_items == 0

    async def take(self) -> Attempt:
        """Waits for the next attempt, and takes it from the queue."""
        return await self._queue.get()

    def put(self, attempts: Sequence[Attempt]) -> None:
        """Queues attempts so that they are taken next, the first one first."""
        for attempt in reversed(attempts):
            self._queue.put_nowait(attempt)

    def succeed(self, attempt: Attempt, result: Any) -> None:
        """Adds a result, and quarantines what was set aside before."""
        self._quarantine()
        if isinstance(attempt.task, ControlTask):
            self._close(0)
        else:
            self._add(len(attempt.task), result)

    def fail(self, attempt: Attempt, error: Exception) -> list[Attempt]:
        """Notes a failure.

        Returns:
            The attempts that remain of the task, not yet queued.

        Raises:
            TeacherError: a control task fails as well, or too many items failed one after another.
            DistillationError: the error is no fault of the items, such as a full disk.
        """
        task = attempt.task
        attempt.failures += 1
        attempt.failed, attempt.error = time.monotonic(), str(error)
        attempt.is_at_fault |= isinstance(error, ItemRefusedError)
        logger.warning(
            "%s: %s failed (failure %d): %s", self._name, task.label, attempt.failures, error
        )
        if isinstance(error, ItemsFailedError):
            if num_done := len(task) - len(error.failed):
                self._quarantine(before=attempt.begun)
                self._add(num_done, error.result)
            return [Attempt(item, 1, is_at_fault=True) for item, _ in error.failed]
        if isinstance(error, ConfigError):
            raise error
        if attempt.failures < TRIES:
            return [attempt]
        if isinstance(task, ControlTask):
            first, count = self._set_aside[0], len(self._set_aside)
            raise TeacherError(
                f"{self._name}: {'1 item' if count == 1 else f'{count} items'} failed, the first "
                f"is {first.task.label}: {first.error}; the {task.label} fails as well ({error}), "
                "so the teacher is at fault and not the items: mend the teacher and run it again"
            ) from error
        if isinstance(error, StorageError):
            raise error
        if len(task) > 1:
            return [Attempt(half) for half in task.halves()]
        self._set_aside.append(attempt)
        count = sum(not each.is_at_fault for each in self._set_aside)
        if count > ITEMS_SET_ASIDE_IN_A_ROW:
            raise TeacherError(
                f"{self._name}: {count} items failed one after another and no task succeeded in "
                f"between, the last is {task.label}: {error}"
            ) from error
        self._close(1)
        return []

    def _add(self, num_items: int, result: Any) -> None:
        self.report.results.append(result)
        self._close(num_items)
        if self._progress:
            self._progress(self._total - self._open_items, self._total, result)

    def _close(self, num_items: int) -> None:
        self._open_items -= num_items
        if self._open_items == 0 and self._set_aside:
            self.put([Attempt(ControlTask())])
        elif self._open_items == 0:
            self.finished.set()

    def _quarantine(self, before: float = math.inf) -> None:
        """Quarantines items that were set aside, now that another item has succeeded.

        Args:
            before: time from which on the other item was worked on, by `time.monotonic`; a failure
                after it may be the fault of a teacher that fell sick in between.
        """
        for attempt in [each for each in self._set_aside if each.failed < before]:
            task, error = attempt.task, attempt.error
            logger.warning("%s: %s is quarantined: %s", self._name, task.label, error)
            task.quarantine(error)
            self.report.quarantined.append((task.label, error))
            self._set_aside.remove(attempt)
