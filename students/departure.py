"""Departure from a node that is about to go away: all workers stop after the same step, behind a
checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

ASK_SECONDS = 5.0
"""Time between two questions whether a node goes away. Ray itself looks every 5 seconds."""


class NodeLeaves(RuntimeError):
    """A node goes away, and a checkpoint is made: the training goes on with other workers."""


class Departure:
    """Question whether a node of the training goes away, which all workers ask after the same
    steps, about every `ASK_SECONDS`.
    """

    def __init__(self, notice: Callable[[], str | None]) -> None:
        """Begins with the next step.

        Args:
            notice: the line that names the node and the time, or None; all ranks call it together.
        """
        self._notice = notice
        self._next, self._interval = 0, 1
        self._asked_at, self._asked_after = time.monotonic(), 0

    def after_step(self, step: int) -> str | None:
        """The notice that a worker has got, on all of them; mostly None, without a question.

        Args:
            step: number of finished steps of the training.
        """
        if step < self._next:
            return None
        now = time.monotonic()
        steps = step - self._asked_after if self._next else 1
        answers: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(answers, (self._notice(), (now - self._asked_at) / steps))
        slowest = max(seconds for _, seconds in answers)
        # later steps may take longer than the first ones
        self._interval = min(steps_between(slowest), 2 * self._interval)
        self._next = step + self._interval
        self._asked_at, self._asked_after = now, step
        return next((line for line, _ in answers if line is not None), None)


def steps_between(seconds_per_step: float) -> int:
    """Number of steps that take about `ASK_SECONDS`, at least 1."""
    return max(1, int(ASK_SECONDS / max(seconds_per_step, 1e-6)))
