"""Failures of workers: which of them end a training at once, and how many restarts the others may
cost.

Ray Train restarts the workers after every failure that the callback here lets pass. It counts
failures since the newest checkpoint, so that a training which goes on between two losses of nodes
outlives any number of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayError
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import RayTrainError, WorkerHealthCheckFailedError

from pipeline import storage
from pipeline.errors import DistillationError, TrainingError
from pipeline.messages import harmless
from pipeline.run.training_spec import TrainingSpec
from students.checkpoints.resume import complete_checkpoints, latest_complete
from students.departure import NodeLeaves
from students.launching.notices import give_notice

SHOWN_LINES = 3
"""Last lines of a worker's error that a message has."""
OF_LOST_WORKERS = (RuntimeError, OSError, RayError, RayTrainError)
"""Errors that the loss of a worker or of its storage can cause, in that worker or in others."""


class Failures(UserCallback):
    """Judges the failures of one training, in the process of Ray Train's controller.

    An error that a callback raises ends the run. Ended at once are errors that would come again:
    every error for the user, and before the first step every other one that no lost worker and no
    storage causes.
    """

    def __init__(self, spec: TrainingSpec, needs: str) -> None:
        """Begins with no failure.

        Args:
            needs: workers and resources that the training asks for, for messages.
        """
        self._spec, self._needs = spec, needs
        self._newest, self._count = latest_complete(spec.folder), 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Lets Ray Train restart the workers, unless the failure ends the training.

        Raises:
            DistillationError: the failure ends it.
        """
        for error in worker_exceptions.values():
            if isinstance(error, DistillationError):
                raise error
        if is_planned(worker_exceptions):
            give_notice(self._spec.folder, f"starts anew with {self._needs}", waits=True)
            return
        if not storage.exists(self._spec.metrics_path):
            for error in worker_exceptions.values():
                if not isinstance(error, OF_LOST_WORKERS):
                    raise TrainingError(
                        f"training of {self._spec.student} failed before its first step: "
                        f"{type(error).__name__}: {error}"
                    ) from error
        self._count_failure(worker_exceptions)

    def _count_failure(self, worker_exceptions: Mapping[int, Exception]) -> None:
        """Counts a failure, and says that the training waits for new workers.

        Raises:
            TrainingError: the training fails again and again without a new checkpoint.
        """
        newest = latest_complete(self._spec.folder)
        if newest != self._newest:
            self._newest, self._count = newest, 0
        self._count += 1
        most, text = self._spec.config.training.max_failures, described(worker_exceptions)
        if most != -1 and self._count > most:
            raise TrainingError(
                f"training of {self._spec.student} failed: {text}\nit is failure {self._count} "
                f"{_since(newest)}, and training.max_failures is {most}: "
                + advice(self._spec.folder)
            )
        allowed = "" if most == -1 else f" of {most}"
        give_notice(
            self._spec.folder,
            f"failed: {text}\nrestart {self._count}{allowed} {_since(newest)}, with {self._needs}",
            waits=True,
        )


def is_planned(worker_exceptions: Mapping[int, Exception]) -> bool:
    """Whether a failure is the end of workers whose node was taken after a notice."""
    return any(
        isinstance(error, NodeLeaves)
        or (isinstance(cause := _cause(error), RayActorError) and cause.preempted)
        for error in worker_exceptions.values()
    )


def described(worker_exceptions: Mapping[int, Exception]) -> str:
    """Errors of workers in a few lines: the cause of each, and equal ones once.

    A lost worker lets the others fail too, so that only lost ones are named where there are some.
    """
    lost = {
        rank: error
        for rank, error in worker_exceptions.items()
        if isinstance(_cause(error), RayActorError)
    }
    ranks: dict[str, list[int]] = {}
    for rank, error in sorted((lost or dict(worker_exceptions)).items()):
        lines = harmless(str(_cause(error))).strip().splitlines()
        name = "lost" if lost else type(error).__name__
        text = "; ".join(line.strip() for line in lines[-SHOWN_LINES:])
        ranks.setdefault(f"{name}: {text}", []).append(rank)
    return "; ".join(
        f"rank {', '.join(map(str, numbers))}: {text}" for text, numbers in ranks.items()
    )


def advice(folder: str) -> str:
    """Advice to the user of a training that has failed."""
    if not complete_checkpoints(folder):
        return "it has no checkpoint yet: mend the cause, then run the same command again"
    return "its checkpoints are kept: run the same command again to resume"


def _cause(error: Exception) -> Exception:
    """The error behind a failed look at a worker's health."""
    return error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else error


def _since(checkpoint: Path | None) -> str:
    return f"since checkpoint {checkpoint.name}" if checkpoint else "before the first checkpoint"
