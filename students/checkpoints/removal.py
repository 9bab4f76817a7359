"""Removal of checkpoints: what a training has written goes, and nothing else.

A person may keep notes beside the state, a link to a checkpoint that lies elsewhere, or a copy
under another name. None of these is removed, and no link is followed.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from pipeline.errors import TrainingError
from pipeline.run.training_spec import COMPLETE

logger = logging.getLogger(__name__)

STEP = re.compile(r"step-(\d{8,12})", re.ASCII)
"""Name of a checkpoint's folder."""
WRITTEN = re.compile(
    rf"{COMPLETE}|state\.json|rng-\d+\.pt|zero|universal|\.universal-[0-9a-f]{{8}}"
    r"|\.(state\.json|" + COMPLETE + r")\.[0-9a-f]{8}\.tmp",
    re.ASCII,
)
"""Names of what a training writes into that folder."""


def step_of(path: Path) -> int | None:
    """Step of a checkpoint by the name of its folder; None if the name is another."""
    found = STEP.fullmatch(path.name)
    return int(found[1]) if found else None


def make_room(path: Path) -> None:
    """Removes an unfinished checkpoint of the same step, where a new one will be written.

    Raises:
        TrainingError: a link has the checkpoint's name.
    """
    if path.is_symlink():
        raise TrainingError(
            f"{path} is a link, and a checkpoint would be written through it: remove the link"
        )
    if path.exists():
        remove_checkpoint(path)


def remove_checkpoint(path: Path) -> None:
    """Removes the folder of a checkpoint, the marker of its completeness first; what a training has
    not written stays, and the folder with it.
    """
    if path.is_symlink() or not path.is_dir():
        logger.warning("%s is no folder of this training, so it stays", path)
        return
    own = [entry for entry in path.iterdir() if WRITTEN.fullmatch(entry.name)]
    for entry in sorted(own, key=lambda entry: entry.name != COMPLETE):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    left = sorted(entry.name for entry in path.iterdir())
    if left:
        logger.warning("%s: not of this training, left: %s", path, ", ".join(left))
    else:
        path.rmdir()
