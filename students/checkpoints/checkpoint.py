"""Complete checkpoints: DeepSpeed's ZeRO state plus everything else that resume needs.

    <training folder>/checkpoints/step-<n>/   zero/ (DeepSpeed)  rng-<rank>.pt  state.json  COMPLETE

`COMPLETE` is written last and only after every other file, also of the other nodes, is on disk: a
checkpoint without it does not exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pipeline import storage
from pipeline.errors import TrainingError
from pipeline.run.training_spec import COMPLETE, TrainingSpec
from students.checkpoints.agreement import from_rank_0
from students.checkpoints.attempts import Attempt
from students.checkpoints.ranks import check_ranks
from students.checkpoints.removal import make_room, remove_checkpoint, step_of
from students.checkpoints.resume import (
    Resume,
    TrainingState,
    complete_checkpoints,
    keep_changes,
    refuse_other_shapes,
)
from students.checkpoints.universal import TAG, UNIVERSAL, partitioning


class CheckpointedStudent(Protocol):
    """The part of a `DeepSpeedStudent` that a checkpoint saves and restores."""

    deepspeed: Any
    device: torch.device
    parameter_shapes: dict[str, list[int]]

    def load(self, folder: Path, tag: str) -> bool:
        """Restores weights and optimizer state; returns whether DeepSpeed found them. All ranks
        call it.
        """
        ...


def save_checkpoint(
    student: CheckpointedStudent,
    spec: TrainingSpec,
    state: TrainingState,
    attempt: Attempt,
    nodes: Sequence[str],
) -> None:
    """Writes a complete checkpoint and removes the oldest ones; all ranks call it.

    Args:
        nodes: names of the workers' nodes, by rank.

    Raises:
        TrainingError: files of a worker do not show in the folder, or another attempt has begun.
    """
    path = Path(spec.folder) / "checkpoints" / f"step-{state.step:08d}"
    rank = dist.get_rank()
    from_rank_0(lambda: _clear(path, attempt), student.device)
    student.deepspeed.save_checkpoint(str(path), tag=TAG, save_latest=False)
    torch.save(_rng_state(), path / f"rng-{rank}.pt")
    dist.barrier()
    storage.sync_folder(path)  # by every rank: none can flush the files of another node
    dist.barrier()
    content = {
        **asdict(state),
        "partitioning": asdict(partitioning(spec.config.training)),
        "identity": spec.identity(),
        "shapes": student.parameter_shapes,
    }
    from_rank_0(lambda: _complete(path, spec, content, attempt, nodes), student.device)


def _clear(path: Path, attempt: Attempt) -> None:
    """Removes what an interrupted training has left in the place of a checkpoint."""
    attempt.check()
    make_room(path)


def _complete(
    path: Path, spec: TrainingSpec, content: dict[str, Any], attempt: Attempt, nodes: Sequence[str]
) -> None:
    """Writes the last files of a checkpoint, and removes older ones."""
    check_ranks(path, partitioning(spec.config.training), nodes)
    attempt.check()
    storage.write_json(str(path / "state.json"), content)
    storage.sync_folder(path)
    storage.write_bytes(str(path / COMPLETE), b"")
    _prune(spec.folder, spec.config.training.keep_checkpoints)


def load_checkpoint(
    student: CheckpointedStudent, spec: TrainingSpec, resume: Resume
) -> TrainingState:
    """Restores student and random state; all ranks call it.

    Raises:
        TrainingError: its parameters have other shapes, or DeepSpeed cannot load it.
    """
    refuse_other_shapes(resume, student.parameter_shapes)
    folder = resume.path / UNIVERSAL if resume.universal else resume.path
    if not student.load(folder, TAG):
        raise TrainingError(
            f"DeepSpeed could not load {folder}: remove {resume.path} to resume from the "
            "checkpoint before it"
        )
    random_state = resume.path / f"rng-{dist.get_rank()}.pt"
    if random_state.exists():  # a rank that the checkpoint did not have keeps its fresh seed
        _restore_rng(torch.load(random_state, weights_only=True))
    if dist.get_rank() == 0:
        keep_changes(spec.folder, resume)
    return resume.state


def _prune(folder: str, keep: int) -> None:
    """Removes older complete checkpoints, and unfinished ones; the marker goes first."""
    complete = complete_checkpoints(folder)
    newest = step_of(complete[-1])
    assert newest is not None, "a checkpoint was completed before"
    for path in Path(folder, "checkpoints").glob("step-*"):
        step = step_of(path)
        if step is not None and path not in complete[-keep:] and step < newest:
            remove_checkpoint(path)


def _rng_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_rng(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
