"""Complete checkpoints: DeepSpeed's ZeRO state plus everything else that resume needs.

    <training folder>/checkpoints/step-<n>/   zero/ (DeepSpeed)  rng-<rank>.pt  state.json  COMPLETE

`COMPLETE` is written last and only after every other file is on disk: a checkpoint without it does
not exist. A run resumes only from a checkpoint of the same training: same data, targets, student,
losses and schedule, but for what `training.allow_resume_with` names. Such changes are kept in

    <training folder>/changes.json   [{"step": n, "differences": [...]}, ...]
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from pipeline import storage
from pipeline.errors import TrainingError
from pipeline.fingerprint import differences
from pipeline.run.training_spec import COMPLETE, TrainingSpec
from students.checkpoints.universal import (
    TAG,
    UNIVERSAL,
    convert,
    needs_conversion,
    partitioning,
    refuse_other_version,
    refused_changes,
    stored_partitioning,
)

SHOWN = 10


class CheckpointedEngine(Protocol):
    """The part of a `DeepSpeedStudent` that a checkpoint saves and restores."""

    deepspeed: Any
    parameter_shapes: dict[str, list[int]]

    def load(self, folder: Path, tag: str) -> bool:
        """Restores weights and optimizer state; whether DeepSpeed found them. All ranks call it."""
        ...


@dataclass(frozen=True)
class TrainingState:
    """How far a training has come: optimizer steps, sequences and tokens of them, seconds spent in
    all starts. The number of sequences is the place in the order of the data, whatever the batches
    of earlier starts were.
    """

    step: int
    sequences: int
    tokens: int
    seconds: float


def latest_complete(folder: str) -> Path | None:
    """The complete checkpoint of the highest step below a training folder."""
    complete = _complete(folder)
    return complete[-1] if complete else None


@dataclass(frozen=True)
class Resume:
    """A checkpoint that fits a training.

    Attributes:
        universal: it is loaded in its universal form.
        shapes: of the parameters, by name.
        changes: differences from the training that wrote it, all of them allowed.
    """

    path: Path
    state: TrainingState
    universal: bool
    shapes: dict[str, list[int]]
    changes: list[str]


def check_resume(job: TrainingSpec) -> Resume | None:
    """The newest complete checkpoint, or None when training starts from nothing.

    Raises:
        TrainingError: it belongs to another training, or DeepSpeed cannot load it at this ZeRO
            stage; all differences are listed.
    """
    path = latest_complete(job.folder)
    if path is None:
        return None
    stored = storage.read_json(str(path / "state.json"))
    needed = [*(field.name for field in fields(TrainingState)), "shapes"]
    refuse_other_version(stored, needed, path)
    old, new = stored_partitioning(stored, path), partitioning(job.config.training)
    changes = differences(stored["identity"], job.identity())
    allowed = [line for line in changes if _is_allowed(line, job)]
    found = [line for line in changes if line not in allowed] + refused_changes(old, new)
    found += _other_matrices(stored["identity"], job.identity())
    if found:
        raise TrainingError(
            f"checkpoint {path} does not fit this training (old -> new):\n  "
            + "\n  ".join(found)
            + "\nRestore these values, choose another `name` for the run, or remove "
            f"{job.folder} to train from the start. To go on with other data, targets, losses or "
            "schedule, name what may differ: --allow NAME, or training.allow_resume_with."
        )
    state = TrainingState(**{field.name: stored[field.name] for field in fields(TrainingState)})
    if state.step > job.config.training.steps:
        raise TrainingError(
            f"checkpoint {path} is beyond the last step, training.steps is "
            f"{job.config.training.steps}: raise it"
        )
    return Resume(path, state, needs_conversion(old, new), stored["shapes"], allowed)


def agreed_resume(job: TrainingSpec, device: torch.device) -> Resume | None:
    """`check_resume` as rank 0 sees it, on every rank: a shared file system may show its nodes the
    newest checkpoint at different times. All ranks call it.

    Raises:
        TrainingError: as `check_resume`.
    """
    found: list[Resume | TrainingError | None] = [None]
    if dist.get_rank() == 0:
        try:
            found = [check_resume(job)]
        except TrainingError as error:
            found = [error]
    dist.broadcast_object_list(found, device=device)
    if isinstance(found[0], TrainingError):
        raise found[0]
    return found[0]


def seconds_before(job: TrainingSpec) -> float:
    """Seconds that earlier starts of a training took, up to what they have left behind.

    Raises:
        TrainingError: its checkpoint belongs to another training.
    """
    if storage.exists(job.summary_path):
        return storage.read_json(job.summary_path)["seconds"]
    resume = check_resume(job)
    return resume.state.seconds if resume is not None else 0.0


def prepare_resume(job: TrainingSpec) -> Resume | None:
    """`check_resume`, and the universal form of the checkpoint where the workers need that; one
    process calls it before the workers start.

    Raises:
        TrainingError: the checkpoint does not fit, or cannot be converted.
    """
    resume = check_resume(job)
    if resume is not None and resume.universal:
        convert(resume.path)
    return resume


def save_checkpoint(engine: CheckpointedEngine, job: TrainingSpec, state: TrainingState) -> None:
    """Writes a complete checkpoint and removes the oldest ones; all ranks call it."""
    path = Path(job.folder) / "checkpoints" / f"step-{state.step:08d}"
    rank = dist.get_rank()
    if rank == 0 and path.exists():
        shutil.rmtree(path)
    dist.barrier()
    engine.deepspeed.save_checkpoint(str(path), tag=TAG, save_latest=False)
    torch.save(_rng_state(), path / f"rng-{rank}.pt")
    dist.barrier()
    storage.sync_folder(path)  # by every rank: it cannot flush what another node has written
    dist.barrier()
    if rank == 0:
        storage.write_json(
            str(path / "state.json"),
            {
                **asdict(state),
                "partitioning": asdict(partitioning(job.config.training)),
                "identity": job.identity(),
                "shapes": engine.parameter_shapes,
            },
        )
        storage.sync_folder(path)
        storage.write_bytes(str(path / COMPLETE), b"")
        _prune(job.folder, job.config.training.keep_checkpoints)
    dist.barrier()


def load_checkpoint(engine: CheckpointedEngine, job: TrainingSpec, resume: Resume) -> TrainingState:
    """Restores engine and random state; all ranks call it.

    Raises:
        TrainingError: its parameters are of other shapes, or DeepSpeed cannot load it.
    """
    _refuse_other_shapes(resume, engine.parameter_shapes)
    folder = resume.path / UNIVERSAL if resume.universal else resume.path
    if not engine.load(folder, TAG):
        raise TrainingError(
            f"DeepSpeed could not load {folder}: remove {resume.path} to resume from the one "
            "before it"
        )
    random_state = resume.path / f"rng-{dist.get_rank()}.pt"
    if random_state.exists():  # a rank that the checkpoint did not have keeps its fresh seed
        _restore_rng(torch.load(random_state, weights_only=True))
    if dist.get_rank() == 0:
        _keep_changes(job.folder, resume)
    return resume.state


def allowed_changes(folder: str) -> list[dict[str, Any]]:
    """What changed in a training between its starts: the step and the differences, in order."""
    path = Path(folder, "changes.json")
    return storage.read_json(str(path)) if path.exists() else []


def _keep_changes(folder: str, resume: Resume) -> None:
    """Adds the changes of this start; those of starts whose steps were lost are dropped."""
    before = allowed_changes(folder)
    changes = [change for change in before if change["step"] < resume.state.step]
    if resume.changes:
        changes.append({"step": resume.state.step, "differences": resume.changes})
    if changes != before:
        storage.write_json(str(Path(folder, "changes.json")), changes)


def _other_matrices(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Losses that learn a matrix cannot come or go: the optimizer's state is in their order."""
    before, now = (
        [
            f"{loss['teacher']} {loss['layers']}"
            for loss in identity["losses"]
            if loss.get("projection") == "learned"
        ]
        for identity in (old, new)
    )
    return [] if before == now else [f"learned projections: {before} -> {now}"]


def _refuse_other_shapes(resume: Resume, shapes: dict[str, list[int]]) -> None:
    """Allowed changes may have brought a student, or stored hidden states, of another size."""
    found = differences(resume.shapes, shapes)
    if found:
        rest = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise TrainingError(
            f"checkpoint {resume.path} does not fit this training: its parameters have other "
            "shapes (old -> new):\n  "
            + "\n  ".join(found[:SHOWN] + rest)
            + "\nGo on with the models and scoring.features that it was written with, or choose "
            "another `name` for the run."
        )


def _is_allowed(line: str, job: TrainingSpec) -> bool:
    key = line.partition(":")[0]
    return any(f"{key}.".startswith(f"{name}.") for name in job.config.training.allow_resume_with)


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


def _rng_state() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_rng(states: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
