"""Complete checkpoints: DeepSpeed's ZeRO state plus everything else that resume needs.

    <training folder>/checkpoints/step-<n>/   zero/ (DeepSpeed)  rng-<rank>.pt  state.json  COMPLETE

`COMPLETE` is written last and only after every other file is on disk: a checkpoint without it does
not exist. A run resumes only from a checkpoint of the same training: same data, targets, student,
losses and schedule.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from pipeline import storage
from pipeline.errors import TrainingError
from pipeline.fingerprint import differences
from pipeline.training import TrainingJob

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

COMPLETE = "COMPLETE"
TAG = "zero"


@dataclass(frozen=True)
class TrainingState:
    """How far a training has come: optimizer steps, tokens of them, seconds spent in all starts."""

    step: int
    tokens: int
    seconds: float


def latest_complete(folder: str) -> Path | None:
    """The complete checkpoint of the highest step below a training folder."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def check_resume(job: TrainingJob) -> tuple[Path, TrainingState] | None:
    """The newest complete checkpoint and its state, or None when training starts from nothing.

    Raises:
        TrainingError: it belongs to another training, world size or ZeRO stage; all differences are
            listed.
    """
    path = latest_complete(job.folder)
    if path is None:
        return None
    state = storage.read_json(str(path / "state.json"))
    found = differences(state["identity"], job.identity())
    if state["zero_stage"] != job.zero_stage:
        found.append(f"zero_optimization.stage: {state['zero_stage']} -> {job.zero_stage}")
    workers = job.config.training.workers
    if state["world_size"] != workers and job.zero_stage > 0:
        found.append(
            f"workers: {state['world_size']} -> {workers} (ZeRO stage {job.zero_stage} partitions "
            "its state over the workers; only stage 0 resumes on another number of them)"
        )
    if found:
        raise TrainingError(
            f"checkpoint {path} does not fit this training (old -> new):\n  "
            + "\n  ".join(found)
            + "\nRestore these values, choose another `name` for the run, or remove "
            f"{job.folder} to train from the start."
        )
    return path, TrainingState(**{field.name: state[field.name] for field in fields(TrainingState)})


def save_checkpoint(engine: DeepSpeedEngine, job: TrainingJob, state: TrainingState) -> None:
    """Writes a complete checkpoint and removes the oldest ones; all ranks call it."""
    path = Path(job.folder) / "checkpoints" / f"step-{state.step:08d}"
    rank = dist.get_rank()
    if rank == 0 and path.exists():
        shutil.rmtree(path)
    dist.barrier()
    engine.save_checkpoint(str(path), tag=TAG, save_latest=False)
    torch.save(_rng_state(), path / f"rng-{rank}.pt")
    dist.barrier()
    if rank == 0:
        layout = {"world_size": dist.get_world_size(), "zero_stage": job.zero_stage}
        storage.write_json(
            str(path / "state.json"), {**asdict(state), **layout, "identity": job.identity()}
        )
        _sync(path)
        storage.write_bytes(str(path / COMPLETE), b"")
        _prune(job.folder, job.config.training.keep_checkpoints)
    dist.barrier()


def load_checkpoint(engine: DeepSpeedEngine, job: TrainingJob) -> TrainingState | None:
    """Restores engine and random state from the newest complete checkpoint, if there is one.

    Raises:
        TrainingError: the checkpoint belongs to another training, or DeepSpeed cannot load it.
    """
    found = check_resume(job)
    if found is None:
        return None
    path, state = found
    loaded, _ = engine.load_checkpoint(str(path), tag=TAG)
    if loaded is None:
        raise TrainingError(
            f"DeepSpeed could not load {path}: remove that folder to resume from the one before it"
        )
    random_state = path / f"rng-{dist.get_rank()}.pt"
    if random_state.exists():  # a rank that the checkpoint did not have keeps its fresh seed
        _restore_rng(torch.load(random_state, weights_only=True))
    return state


def _complete(folder: str) -> list[Path]:
    found = Path(folder, "checkpoints").glob(f"step-*/{COMPLETE}")
    return sorted(
        (marker.parent for marker in found), key=lambda path: int(path.name.removeprefix("step-"))
    )


def _prune(folder: str, keep: int) -> None:
    """Removes older complete checkpoints, and unfinished ones; the marker goes first."""
    complete = _complete(folder)
    newest = complete[-1]
    for path in Path(folder, "checkpoints").glob("step-*"):
        if path not in complete[-keep:] and int(path.name[5:]) < int(newest.name[5:]):
            (path / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(path)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rng_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_rng(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
