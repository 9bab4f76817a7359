"""The checkpoint that a training resumes from, and the refusal of one that does not fit.

A run resumes only from a checkpoint of the same training: same data, targets, student, losses and
schedule, except for the keys that `training.allow_resume_with` names. Such changes are kept in

    <training folder>/changes.json   [{"step": n, "differences": [...]}, ...]
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from pipeline import storage
from pipeline.errors import TrainingError
from pipeline.fingerprint import differences
from pipeline.run.training_spec import COMPLETE, TrainingSpec
from students.checkpoints.agreement import from_rank_0
from students.checkpoints.ranks import missing_ranks
from students.checkpoints.removal import step_of
from students.checkpoints.universal import (
    convert,
    needs_conversion,
    partitioning,
    refuse_other_version,
    refused_changes,
    stored_partitioning,
)

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SHOWN = 10
"""Most parameters that a message lists."""


@dataclass(frozen=True)
class TrainingState:
    """Progress of a training: optimizer steps, their sequences and tokens, seconds spent in all
    starts. The number of sequences is the place in the order of the data, whatever the batches of
    earlier starts were.
    """

    step: int
    sequences: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Resume:
    """A checkpoint that fits a training.

    Attributes:
        path: folder of the checkpoint.
        state: progress of the training.
        universal: whether the checkpoint is loaded in its universal form.
        shapes: shape of each parameter, by name.
        changes: differences from the training that wrote it, all of them allowed.
    """

    path: Path
    state: TrainingState
    universal: bool
    shapes: dict[str, list[int]]
    changes: list[str]


def marked_checkpoints(folder: str) -> list[Path]:
    """The checkpoints below a training folder that have the marker, in the order of their steps."""
    markers = Path(folder, "checkpoints").glob(f"step-*/{COMPLETE}")
    found = {marker.parent: step_of(marker.parent) for marker in markers}
    steps = {path: step for path, step in found.items() if step is not None}
    return sorted(steps, key=lambda path: steps[path])


def complete_checkpoints(folder: str) -> list[Path]:
    """The complete checkpoints below a training folder, in the order of their steps: those that
    have the marker and the files of all workers.
    """
    return [path for path in marked_checkpoints(folder) if not lacking_ranks(path)]


def lacking_ranks(checkpoint: Path) -> list[int]:
    """Ranks whose files a checkpoint lacks in spite of its marker: versions before this one wrote
    the marker without a look at them.
    """
    stored = storage.read_json(str(checkpoint / "state.json"))
    if "partitioning" not in stored:  # a checkpoint of another version, which is refused for that
        return []
    return missing_ranks(checkpoint, stored_partitioning(stored, checkpoint))


def latest_complete(folder: str) -> Path | None:
    """The complete checkpoint of the highest step below a training folder."""
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def check_training(spec: TrainingSpec) -> None:
    """Checks, without starting anything, that the files in a training's folder belong to it.

    Raises:
        TrainingError: the folder holds another training, or a checkpoint that does not fit.
    """
    if storage.exists(spec.summary_path):
        finished_summary(spec)
    else:
        check_resume(spec)


class TrainingSummary(TypedDict):
    """Summary of a complete training, as far as it is compared and counted."""

    identity: dict[str, Any]
    seconds: float


def finished_summary(spec: TrainingSpec) -> dict[str, Any]:
    """The summary of a training that is complete.

    Raises:
        TrainingError: it was trained with other settings.
    """
    summary = storage.read_json(spec.summary_path, TrainingSummary)
    changes = differences(summary["identity"], spec.identity())
    if changes:
        raise TrainingError(
            f"{spec.folder} holds a finished training with other settings (old -> new):\n  "
            + "\n  ".join(changes)
            + "\nto keep it, restore the old values; to train anew, choose another `name` for the "
            "run or remove that folder"
        )
    return summary


def check_resume(spec: TrainingSpec) -> Resume | None:
    """The newest complete checkpoint, or None when training starts from nothing.

    Raises:
        TrainingError: the checkpoint belongs to another training, or DeepSpeed cannot load it at
            this ZeRO stage; the message lists all differences.
    """
    path = latest_complete(spec.folder)
    _tell_incomplete(spec, path)
    if path is None:
        return None
    stored = storage.read_json(str(path / "state.json"), dict[str, Any])
    needed = [*(field.name for field in fields(TrainingState)), "shapes"]
    refuse_other_version(stored, needed, path)
    old, new = stored_partitioning(stored, path), partitioning(spec.config.training)
    changes = differences(stored["identity"], spec.identity())
    allowed = [line for line in changes if _is_allowed(line, spec)]
    refused = [line for line in changes if line not in allowed] + refused_changes(old, new)
    refused += _other_matrices(stored["identity"], spec.identity())
    if refused:
        raise TrainingError(
            f"checkpoint {path} belongs to a training with other settings (old -> new):\n  "
            + "\n  ".join(refused)
            + "\nto resume from it, restore the old values, or allow other data, targets, losses "
            "or schedule by name (--allow NAME, or training.allow_resume_with); to train from the "
            f"start, choose another `name` for the run or remove {spec.folder}"
        )
    state = TrainingState(**{field.name: stored[field.name] for field in fields(TrainingState)})
    if state.step > spec.config.training.steps:
        raise TrainingError(
            f"checkpoint {path} is at step {state.step}, which is beyond the last step, since "
            f"training.steps is {spec.config.training.steps}: raise it to at least {state.step}"
        )
    return Resume(path, state, needs_conversion(old, new), stored["shapes"], allowed)


def agreed_resume(spec: TrainingSpec, device: torch.device) -> Resume | None:
    """`check_resume` as rank 0 sees it, on every rank: a shared file system may show its nodes the
    newest checkpoint at different times. All ranks call it.

    Raises:
        TrainingError: as `check_resume`.
    """
    return from_rank_0(lambda: check_resume(spec), device)


def prepare_resume(spec: TrainingSpec) -> Resume | None:
    """`check_resume`, and the universal form of the checkpoint if the workers need it; one process
    calls it before the workers start.

    Raises:
        TrainingError: the checkpoint does not fit, or cannot be converted.
    """
    resume = check_resume(spec)
    if resume is not None and resume.universal:
        convert(resume.path)
    return resume


def seconds_before(spec: TrainingSpec) -> float:
    """Seconds that earlier starts of a training took, up to their last checkpoint or their end.

    Raises:
        TrainingError: its checkpoint belongs to another training.
    """
    if storage.exists(spec.summary_path):
        return storage.read_json(spec.summary_path, TrainingSummary)["seconds"]
    resume = check_resume(spec)
    return resume.state.seconds if resume is not None else 0.0


def allowed_changes(folder: str) -> list[dict[str, Any]]:
    """Changes to a training between its starts, in order: the step and the differences of each."""
    path = Path(folder, "changes.json")
    return storage.read_json(str(path), list[dict[str, Any]]) if path.exists() else []


def keep_changes(folder: str, resume: Resume) -> None:
    """Adds the changes of this start; drops those of starts whose steps were lost."""
    before = allowed_changes(folder)
    changes = [change for change in before if change["step"] < resume.state.step]
    if resume.changes:
        changes.append({"step": resume.state.step, "differences": resume.changes})
    if changes != before:
        storage.write_json(str(Path(folder, "changes.json")), changes)


def refuse_other_shapes(resume: Resume, shapes: dict[str, list[int]]) -> None:
    """Refuses a checkpoint whose parameters have other shapes than the training's: allowed changes
    may have brought a student, or stored hidden states, of another size.

    Raises:
        TrainingError: the message names the parameters.
    """
    changed = differences(resume.shapes, shapes)
    if changed:
        rest = [f"and {len(changed) - SHOWN} more"] if len(changed) > SHOWN else []
        raise TrainingError(
            f"checkpoint {resume.path} does not fit this training: its parameters have other "
            "shapes (old -> new):\n  "
            + "\n  ".join(changed[:SHOWN] + rest)
            + "\nto resume from it, restore the models and the scoring.features that it was "
            "written with; to train from the start, choose another `name` for the run"
        )


def _tell_incomplete(spec: TrainingSpec, resumed: Path | None) -> None:
    """Names the checkpoints that lack the files of a worker, and are newer than the one that the
    training resumes from.

    Raises:
        TrainingError: there is no other checkpoint.
    """
    marked = marked_checkpoints(spec.folder)
    newer = marked if resumed is None else marked[marked.index(resumed) + 1 :]
    for path in newer:
        if not (ranks := lacking_ranks(path)):
            continue
        files = f"checkpoint {path} lacks the files of rank {', '.join(map(str, ranks))}"
        if resumed is None:
            raise TrainingError(
                f"{files}, and there is no complete checkpoint: the node of that rank did not "
                "mount the folder, so look for the files under the same path there and copy them "
                f"here, or remove {path} to train from the start"
            )
        logger.warning("%s, so training resumes from the complete %s", files, resumed.name)


def _other_matrices(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Refused changes of losses that learn a matrix: they cannot come or go, since the optimizer's
    state is in their order.
    """
    before, now = (
        [
            f"{loss['teacher']} {loss['layers']}"
            for loss in identity["losses"]
            if loss.get("projection") == "learned"
        ]
        for identity in (old, new)
    )
    return [] if before == now else [f"learned projections: {before} -> {now}"]


def _is_allowed(line: str, spec: TrainingSpec) -> bool:
    key = line.partition(":")[0]
    return any(f"{key}.".startswith(f"{name}.") for name in spec.config.training.allow_resume_with)
