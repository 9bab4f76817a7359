"""What a training run is, and its complete checkpoints: DeepSpeed's ZeRO state plus everything else that resume needs.

    <training folder>/checkpoints/step-<n>/   zero/ (DeepSpeed)  rng-<rank>.pt  state.json  COMPLETE

`COMPLETE` is written last and only after every other file is on disk: a checkpoint without it does not exist. A
run resumes only from a checkpoint of the same training: same data, targets, student, losses and schedule.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pipeline import storage
from pipeline.config import ByDomainWeights, Config, Loss
from pipeline.errors import TrainingError
from pipeline.fingerprint import differences
from pipeline.layout import CacheLayout, Layout
from pipeline.targets import required_teachers

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

COMPLETE = "COMPLETE"
TAG = "zero"
NEUTRAL_TRAINING_KEYS = {
    "workers", "resources", "log_every_steps", "evaluate_every_steps", "checkpoint_every_steps", "keep_checkpoints",
    "max_failures", "cost_per_hour", "tokens_per_micro_batch", "losses",
}
"""Training keys that may change between two starts of one training; `losses` enters as those of the job."""
NEUTRAL_STUDENT_KEYS = {"cost_per_hour", "vllm"}


@dataclass(frozen=True)
class TrainingJob:
    """One training, as the launcher hands it to every worker.

    Attributes:
        student: `student` or `twin`: names the training folder.
        losses: of this training; a twin has cross-entropy alone.
        caches: by teacher; teachers that weigh nothing need none.
        cache_fingerprints: by teacher, of the recipe that filled its cache.
    """

    config: Config
    layout: Layout
    dataset_digest: str
    student: str
    losses: tuple[Loss, ...]
    caches: dict[str, CacheLayout]
    cache_fingerprints: dict[str, str]

    @property
    def folder(self) -> str:
        return self.layout.training_folder(self.student)

    @property
    def summary_path(self) -> str:
        """Written last of all: its existence means that the training is complete."""
        return storage.join(self.folder, "training.json")

    @property
    def uses_teachers(self) -> bool:
        return any(loss.type != "cross_entropy" for loss in self.losses)

    @property
    def zero_stage(self) -> int:
        return int(self.config.training.deepspeed.get("zero_optimization", {}).get("stage", 0))

    def identity(self) -> dict[str, Any]:
        """What decides the trained weights, as a JSON value."""
        config = self.config.model_dump(mode="json")
        used = used_teachers(self.config) if self.uses_teachers else []
        return {
            "seed": self.config.seed,
            "dataset_digest": self.dataset_digest,
            "caches": {
                name: {"fingerprint": self.cache_fingerprints[name], "generation": self.caches[name].generation}
                for name in used
                if name in self.caches
            },
            "combine": config["combine"] if self.uses_teachers else None,
            "student": {k: v for k, v in config["student"].items() if k not in NEUTRAL_STUDENT_KEYS},
            "losses": [loss.model_dump(mode="json") for loss in self.losses],
            "training": {k: v for k, v in config["training"].items() if k not in NEUTRAL_TRAINING_KEYS},
        }


def used_teachers(config: Config) -> list[str]:
    """The teachers that can weigh anything in any domain, in the config's order."""
    weights = config.combine.weights
    domains = list(weights.domains) if isinstance(weights, ByDomainWeights) else [""]
    used = {name for domain in domains for name in required_teachers(config.combine, list(config.teachers), domain)}
    return [name for name in config.teachers if name in used]


def latest_complete(folder: str) -> Path | None:
    """The complete checkpoint of the highest step below a training folder."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def check_resume(job: TrainingJob) -> dict[str, Any] | None:
    """The state of the newest complete checkpoint, or None when training starts from nothing.

    Raises:
        TrainingError: it belongs to another training, world size or ZeRO stage; all differences are listed.
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
            f"workers: {state['world_size']} -> {workers} (ZeRO stage {job.zero_stage} partitions its state over the "
            "workers; only stage 0 resumes on another number of them)"
        )
    if found:
        raise TrainingError(
            f"checkpoint {path} does not fit this training (old -> new):\n  " + "\n  ".join(found) + "\n"
            f"Restore these values, choose another `name` for the run, or remove {job.folder} to train from the start."
        )
    return state


def save_checkpoint(engine: DeepSpeedEngine, job: TrainingJob, state: dict[str, Any]) -> None:
    """Writes a complete checkpoint of `state["step"]` and then removes the oldest beyond those to keep.

    All ranks call it. `state` holds step, position in the data and sums; identity and world size are added.
    """
    path = Path(job.folder) / "checkpoints" / f"step-{state['step']:08d}"
    rank = dist.get_rank()
    if rank == 0 and path.exists():
        shutil.rmtree(path)
    dist.barrier()
    engine.save_checkpoint(str(path), tag=TAG, save_latest=False)
    torch.save(_rng_state(), path / f"rng-{rank}.pt")
    dist.barrier()
    if rank == 0:
        layout = {"world_size": dist.get_world_size(), "zero_stage": job.zero_stage}
        storage.write_json(str(path / "state.json"), {**state, **layout, "identity": job.identity()})
        _sync(path)
        storage.write_bytes(str(path / COMPLETE), b"")
        _prune(job.folder, job.config.training.keep_checkpoints)
    dist.barrier()


def load_checkpoint(engine: DeepSpeedEngine, job: TrainingJob) -> dict[str, Any] | None:
    """Restores engine and random state from the newest complete checkpoint; returns its state, None without one.

    Raises:
        TrainingError: the checkpoint belongs to another training, or DeepSpeed cannot load it.
    """
    state = check_resume(job)
    if state is None:
        return None
    path = latest_complete(job.folder)
    loaded, _ = engine.load_checkpoint(str(path), tag=TAG)
    if loaded is None:
        raise TrainingError(f"DeepSpeed could not load {path}: remove that folder to resume from the one before it")
    random_state = path / f"rng-{dist.get_rank()}.pt"
    if random_state.exists():  # a rank that the checkpoint did not have keeps its fresh seed
        _restore_rng(torch.load(random_state, weights_only=True))
    return state


def read_metrics(folder: str) -> list[dict[str, Any]]:
    """The lines of a training's `metrics.jsonl`; an unfinished last line is left out."""
    path = Path(folder, "metrics.jsonl")
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _complete(folder: str) -> list[Path]:
    found = Path(folder, "checkpoints").glob(f"step-*/{COMPLETE}")
    return sorted((marker.parent for marker in found), key=lambda path: int(path.name.removeprefix("step-")))


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
