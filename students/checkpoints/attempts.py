"""Attempts: of all trainings that write into one folder, the one that began last goes on.

    <training folder>/attempt.json   number, name, node and time of the attempt that began last

A training may outlive its driver: after the loss of a cluster's head its workers go on for up to a
minute, and the same command may start them anew meanwhile. Each start writes its name into the
file, and reads it before it writes or removes anything else. A training that finds another name
there ends.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pipeline import storage
from pipeline.errors import TrainingError


@dataclass(frozen=True)
class Attempt:
    """One start of a training: the training's folder, and a name that no other start has."""

    folder: str
    name: str

    def check(self) -> None:
        """Checks that no other start has begun since.

        Raises:
            TrainingError: another one has, or the file is gone.
        """
        path = _path(self.folder)
        if not storage.exists(path):
            raise TrainingError(
                f"{path} is gone, so this training ends: somebody has removed or moved its folder; "
                "run the same command again"
            )
        newest = storage.read_json(path)
        if newest["name"] != self.name:
            raise TrainingError(
                f"another training of {self.folder} began at {newest['began']} on node "
                f"{newest['node']} (attempt {newest['number']}), so this one ends; that one goes on"
            )


def begin_attempt(folder: str, node: str) -> Attempt:
    """Makes this process's training the only one that may write into a folder.

    Args:
        node: name of this node, for the message that an older training ends with.
    """
    path = _path(folder)
    number = storage.read_json(path)["number"] if storage.exists(path) else 0
    attempt = Attempt(folder, uuid.uuid4().hex)
    began = datetime.now().astimezone().isoformat(timespec="seconds")
    storage.write_json(
        path, {"number": number + 1, "name": attempt.name, "node": node, "began": began}
    )
    return attempt


def _path(folder: str) -> str:
    return str(Path(folder, "attempt.json"))
