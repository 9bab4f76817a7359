"""Replica loop of one teacher: start, placement, tasks in flight, death and replacement.

A dispatcher knows nothing of Ray: `launch` gives it replicas. The ledger decides what becomes of a
task that fails.

Tasks that were in flight when a replica died are suspects: the successor takes them alone, one
after another, so that a second death names the culprit.

A replica that is lost with its node, or before it had one, says nothing against its engine or its
tasks; it is launched again.

Every replica, also one that replaces a dead one, must score the canary like the first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from pipeline.errors import DistillationError, TeacherError
from teachers.canary import check_replicas_agree
from teachers.concurrency import cancel
from teachers.pool.contracts import (
    PoolReport,
    Progress,
    Replica,
    ReplicaDied,
    ReplicaLost,
    Task,
)
from teachers.pool.placement import reminders
from teachers.pool.task_ledger import Attempt, TaskLedger
from teachers.protocol import Canary, Comparison

logger = logging.getLogger(__name__)

# Answers differ in length: while the longest of a task is still being written, the others keep the
# engine full.
TASKS_IN_FLIGHT = 6
# One item that kills its engine costs at most five deaths in a row: among others, twice in its
# task, twice in the first half of it.
DEATHS_IN_A_ROW = 5
LOSSES_IN_A_ROW = 20
LONGEST_PAUSE_SECONDS = 30.0
"""Pauses after losses in a row grow from one second to this."""
PATIENCE_SECONDS = 60
"""Wait for room after which a replica gives its suspects to others."""
WATCH_SECONDS = 20
LOGGED = ("engine_version", "device", "dtype", "capture", "capture_reason", "prefix_sharing")


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
        compare_with_transformers: bool = False,
        tasks_in_flight: int = TASKS_IN_FLIGHT,
        room: Callable[[], str] = str,
    ) -> None:
        """`check_canary` refuses a replica by its canary, whatever the other replicas score; the
        first canary has the comparison with transformers, if there shall be one. `room` describes
        what a replica needs and what the cluster has.
        """
        self._name, self._launch, self._check_canary = name, launch, check_canary
        self._room = room
        self._num_slots = min(replicas, len(tasks))
        # No replica takes at once what another, still starting, could share.
        self._num_lanes = min(tasks_in_flight, math.ceil(len(tasks) / max(self._num_slots, 1)))
        self._ledger = TaskLedger(name, tasks, progress)
        self._report = self._ledger.report
        self._running: dict[Replica, dict[str, Any]] = {}
        self._compares_with_transformers = compare_with_transformers
        self._first_canary: Canary | None = None
        self._comparing = asyncio.Lock()
        self._died_in_a_row: list[Replica] = []
        self._losses_in_a_row = 0

    async def run(self) -> PoolReport:
        """Runs all tasks and stops all replicas.

        Raises:
            TeacherError: no task can progress, or items failed and so does a control task.
            DistillationError: a replica refuses to start, or storage failed twice.
        """
        if self._ledger.is_empty:
            return self._report
        slots = [asyncio.create_task(self._slot()) for _ in range(self._num_slots)]
        finished = asyncio.create_task(self._ledger.finished.wait())
        watching = asyncio.create_task(self._tell_what_it_waits_for())
        try:
            await asyncio.wait([finished, *slots], return_when=asyncio.FIRST_COMPLETED)
            for slot in slots:
                if slot.done() and not self._ledger.finished.is_set():
                    slot.result()
            for replica, metadata in list(self._running.items()):
                with contextlib.suppress(ReplicaDied):
                    metadata["peak_memory_bytes"] = await replica.peak_memory_bytes()
            return self._report
        finally:
            await cancel([finished, watching, *slots])

    async def _tell_what_it_waits_for(self) -> None:
        """Says now and then what a replica waits for, since progress alone would not tell."""
        said: str | None = None
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            for replica in list(self._running):
                with contextlib.suppress(ReplicaDied):
                    state = await replica.waits_for()
                    if state is not None and state != said:
                        logger.info("%s waits: %s", self._name, state)
                    said = state

    async def _slot(self) -> None:
        """Keeps one replica running and replaces it when it dies; ends by error or cancellation."""
        suspects: deque[Attempt] = deque()
        while not self._ledger.finished.is_set():
            replica = self._launch()
            try:
                await self._place(replica, suspects)
                await self._start(replica)
                while suspects:
                    await self._run_alone(replica, suspects)
                await self._run_lanes(replica, suspects)
            except ReplicaLost as loss:
                await asyncio.sleep(self._count_loss(loss))
            except ReplicaDied as death:
                await self._count_death(replica, death)
            finally:
                self._running.pop(replica, None)
                await replica.stop()

    async def _place(self, replica: Replica, suspects: deque[Attempt]) -> None:
        """Waits for room in the cluster. Meanwhile other replicas take the suspects, since the room
        may be gone for good.
        """
        placing = asyncio.ensure_future(replica.placed())
        waited = 0.0
        try:
            for seconds in reminders():
                if (await asyncio.wait([placing], timeout=seconds))[0]:
                    break
                waited += seconds
                room = await asyncio.to_thread(self._room)
                logger.info(
                    "%s: a replica has waited %.0f s for a node: %s", self._name, waited, room
                )
                if waited >= PATIENCE_SECONDS:
                    self._ledger.put(list(suspects))
                    suspects.clear()
            placing.result()
        except ReplicaDied as death:
            raise ReplicaLost(f"before a node had it: {death}") from death
        finally:
            placing.cancel()

    async def _start(self, replica: Replica) -> None:
        logger.info("%s: a replica starts", self._name)
        try:
            metadata = await replica.ready()
            async with self._comparing:  # nobody works before the first is known to be right
                comparison = await self._compare(replica)
        except (DistillationError, ReplicaDied):
            raise
        except Exception as error:
            raise ReplicaDied(f"the replica did not start: {error}") from error
        shown = ", ".join(f"{key} {metadata[key]}" for key in LOGGED if key in metadata)
        logger.info("%s: a replica is ready: %s", self._name, shown)
        if comparison is not None:
            logger.info("%s: %s", self._name, comparison)
            metadata = metadata | {"comparison": str(comparison)}
        self._running[replica] = metadata | {"peak_memory_bytes": None}
        self._report.engines.append(self._running[replica])

    async def _compare(self, replica: Replica) -> Comparison | None:
        """Refuses a replica that scores the canary otherwise than the first, dead or alive, and
        compares the first with transformers if that is asked for.
        """
        canary = await replica.canary()
        if canary is None:
            return None
        if self._first_canary is None and self._compares_with_transformers:
            canary = replace(canary, comparison=await replica.compare_with_transformers())
        check_replicas_agree(self._name, self._first_canary or canary, canary)
        if self._check_canary is not None:
            await asyncio.to_thread(self._check_canary, canary)
        self._first_canary = self._first_canary or canary
        return canary.comparison

    async def _run_lanes(self, replica: Replica, suspects: deque[Attempt]) -> None:
        """Runs several tasks at a time until the replica dies; those in flight become suspects."""
        in_flight: list[Attempt] = []
        lanes = [
            asyncio.create_task(self._lane(replica, in_flight)) for _ in range(self._num_lanes)
        ]
        try:
            await asyncio.gather(*lanes)
        except ReplicaDied as death:
            alone = len(in_flight) == 1 and not isinstance(death, ReplicaLost)
            suspects.extend(self._ledger.fail(in_flight[0], death) if alone else in_flight)
            raise
        finally:
            await cancel(lanes)

    async def _lane(self, replica: Replica, in_flight: list[Attempt]) -> None:
        while True:
            attempt = await self._ledger.take()
            in_flight.append(attempt)
            attempt.begun = time.monotonic()
            try:
                result = await replica.run(attempt.task)
            except ReplicaDied:
                raise
            except Exception as error:
                self._ledger.put(self._ledger.fail(attempt, error))
            else:
                self._succeed(attempt, result)
            in_flight.remove(attempt)

    async def _run_alone(self, replica: Replica, suspects: deque[Attempt]) -> None:
        """Runs the first suspect and nothing beside it; if the replica dies, it is the culprit."""
        attempt = suspects[0]
        attempt.begun = time.monotonic()
        try:
            result = await replica.run(attempt.task)
        except ReplicaLost:
            raise
        except ReplicaDied as death:
            suspects.popleft()
            suspects.extend(self._ledger.fail(attempt, death))
            raise
        except Exception as error:
            suspects.popleft()
            self._ledger.put(self._ledger.fail(attempt, error))
        else:
            suspects.popleft()
            self._succeed(attempt, result)

    def _succeed(self, attempt: Attempt, result: Any) -> None:
        self._died_in_a_row.clear()
        self._losses_in_a_row = 0
        self._ledger.succeed(attempt, result)

    def _count_loss(self, loss: ReplicaLost) -> float:
        """Counts a loss; returns the seconds to wait before the next launch."""
        self._report.num_deaths += 1
        self._losses_in_a_row += 1
        logger.warning("%s: a replica is lost, another is launched: %s", self._name, loss)
        if self._losses_in_a_row >= self._num_slots + LOSSES_IN_A_ROW:
            raise TeacherError(
                f"{self._name}: {self._losses_in_a_row} replicas in a row were lost with their "
                "nodes, or before they had one, and no task was finished in between: look at the "
                f"cluster's nodes, then run it again; the last loss: {loss}"
            ) from loss
        return min(2.0 ** (self._losses_in_a_row - 1), LONGEST_PAUSE_SECONDS)

    async def _count_death(self, replica: Replica, death: ReplicaDied) -> None:
        self._report.num_deaths += 1
        self._died_in_a_row.append(replica)
        logger.warning("%s: a replica died: %s", self._name, death)
        bound = self._num_slots + (DEATHS_IN_A_ROW if self._report.engines else 1)
        if len(self._died_in_a_row) < bound:
            return
        # A node that goes down in order ends its processes before the cluster misses it.
        gone = [await each.node_is_gone() for each in self._died_in_a_row]
        if (count := gone.count(False)) >= bound:
            raise TeacherError(
                f"{self._name}: {count} replicas died in a row and no task was finished in "
                f"between; the last death: {death}"
            ) from death
