"""Lines of the workers and of the controller for the driver's log, which alone is shown.

    <training folder>/ray_train/notices/<time>-<random name>.json   {"text": …, "waits": …}

Each line is a file of its own, since several nodes write them. The driver also says from time to
time that a training waits, from the loss of a worker until all workers are placed.
"""

from __future__ import annotations

import contextlib
import shutil
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from pipeline import storage

REMIND_SECONDS = (30.0, 60.0, 300.0)
"""Time until the first reminders that a training waits; the last one repeats."""


def scratch_folder(folder: str) -> Path:
    """Folder of Ray Train's own files and of the notices, which lasts as long as the driver."""
    return Path(folder, "ray_train")


def remove_scratch(folder: str, student: str) -> None:
    """Removes the notices and what Ray Train wrote for this start and for killed ones, and then the
    scratch folder if nothing else is in it.
    """
    scratch = scratch_folder(folder)
    for path in (_folder(folder), *scratch.glob(f"{student}-{'[0-9a-f]' * 8}")):
        if not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):
        scratch.rmdir()


def give_notice(folder: str, text: str, waits: bool) -> None:
    """Hands a line to the driver of a training.

    Args:
        folder: folder of the training.
        waits: whether the training waits for workers from now on.
    """
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
    path = _folder(folder) / name
    storage.write_json(str(path), {"text": text, "waits": waits})


class Notices:
    """The lines that the driver has to say, as it learns of them."""

    def __init__(self, folder: str, needs: str, free: Callable[[], str]) -> None:
        """Begins with a training that waits for its first workers.

        Args:
            folder: folder of the training.
            needs: workers and resources that the training waits for.
            free: gives what the cluster has of them, for a reminder.
        """
        self._folder, self._needs, self._free = _folder(folder), needs, free
        self._seen: set[str] = set()
        self._since: float | None = time.time()
        self._reminders = 0

    def lines(self, now: float) -> list[str]:
        """New lines since the last call.

        Args:
            now: seconds since 1970.
        """
        said = []
        for info in storage.list_files(str(self._folder), ".json"):
            if info.base_name in self._seen:
                continue
            self._seen.add(info.base_name)
            notice = storage.read_json(str(self._folder / info.base_name))
            said.append(notice["text"])
            self._since, self._reminders = (now if notice["waits"] else None), 0
        if self._since is not None and now >= self._since + self._wait_before_reminder():
            self._reminders += 1
            said.append(
                f"waits since {datetime.fromtimestamp(self._since):%H:%M:%S} for {self._needs}; "
                f"the cluster has {self._free()} free"
            )
        return said

    def _wait_before_reminder(self) -> float:
        """Seconds from the beginning of the wait to the next reminder."""
        first = REMIND_SECONDS[: self._reminders + 1]
        return sum(first) + REMIND_SECONDS[-1] * (self._reminders + 1 - len(first))


def _folder(folder: str) -> Path:
    return scratch_folder(folder) / "notices"
