"""Checkpoints on other workers or at another ZeRO stage, by DeepSpeed's universal checkpoints.

ZeRO stages 1 to 3 spread their state over the workers, so that their checkpoints load as they are
only on workers that partition the state the same way. For all other workers a checkpoint is
converted once, into

    <checkpoint>/universal/   zero/ (DeepSpeed): every parameter's state in full

which any number of workers can cut anew. The folder is renamed into place when it is complete: a
killed conversion leaves a hidden folder, which the next conversion removes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config.training import TrainingConfig
from pipeline.errors import TrainingError

TAG = "zero"
UNIVERSAL = "universal"
RESUMES_AT = {0: (0,), 1: (1, 2), 2: (1, 2), 3: (3,)}
"""Stages at which a checkpoint of each stage resumes; DeepSpeed fails at the others."""
LINES_OF_FAILURE = 20
"""Last lines of DeepSpeed's output that the message of a failed conversion has."""


@dataclass(frozen=True)
class Partitioning:
    """Spread of a training's state: the number of workers, and DeepSpeed's own block."""

    workers: int
    zero_optimization: dict[str, Any]

    @property
    def stage(self) -> int:
        return int(self.zero_optimization.get("stage", 0))

    @property
    def offloads_optimizer(self) -> bool:
        """Whether DeepSpeed keeps and steps the optimizer on the CPU."""
        offload = self.zero_optimization.get("offload_optimizer") or {}
        return offload.get("device", "none") != "none"


def partitioning(training: TrainingConfig) -> Partitioning:
    """The partitioning that a training's config asks for."""
    return Partitioning(training.workers, training.deepspeed.get("zero_optimization", {}))


def stored_partitioning(state: dict[str, Any], checkpoint: str | Path) -> Partitioning:
    """The partitioning of the training that wrote a checkpoint, from its `state.json`.

    Raises:
        TrainingError: `state.json` lacks it.
    """
    refuse_other_version(state, ("partitioning",), checkpoint)
    return Partitioning(**state["partitioning"])


def refuse_other_version(
    state: dict[str, Any], needed: Sequence[str], checkpoint: str | Path
) -> None:
    """Refuses a checkpoint whose `state.json` lacks a needed key.

    Raises:
        TrainingError: a key is missing; the message names it.
    """
    if missing := [key for key in needed if key not in state]:
        raise TrainingError(
            f"checkpoint {checkpoint} lacks {', '.join(missing)} in its state.json, so another "
            "version of polystill wrote it: go on with that version, or remove the checkpoint to "
            "resume from the one before it or to train from the start"
        )


def refused_changes(old: Partitioning, new: Partitioning) -> list[str]:
    """Reasons why a checkpoint of one partitioning cannot be loaded into another, a line each."""
    lines = []
    if new.stage not in RESUMES_AT[old.stage]:
        stages = " or ".join(str(stage) for stage in RESUMES_AT[old.stage])
        lines.append(
            f"zero_optimization.stage: {old.stage} -> {new.stage} (DeepSpeed loads a checkpoint of "
            f"stage {old.stage} at stage {stages} only, there on any number of workers)"
        )
    if old.offloads_optimizer != new.offloads_optimizer:
        offloads = [p.zero_optimization.get("offload_optimizer") for p in (old, new)]
        lines.append(
            f"zero_optimization.offload_optimizer: {offloads[0]} -> {offloads[1]} (the optimizers "
            "on the device and on the CPU keep different states)"
        )
    return lines


def needs_conversion(old: Partitioning, new: Partitioning) -> bool:
    """Whether a checkpoint of one partitioning loads into another only in universal form."""
    return old.stage > 0 and old != new


def convert(checkpoint: Path) -> None:
    """Writes the universal form into a checkpoint, unless it is there; needs CPUs alone.

    Raises:
        TrainingError: DeepSpeed could not convert it; the message has DeepSpeed's last lines.
    """
    target = checkpoint / UNIVERSAL
    if target.exists():
        return
    for abandoned in checkpoint.glob(f".{UNIVERSAL}-{'[0-9a-f]' * 8}"):
        if not abandoned.is_symlink():
            shutil.rmtree(abandoned)
    scratch = checkpoint / f".{UNIVERSAL}-{uuid.uuid4().hex[:8]}"
    scratch.mkdir()
    # a process of its own: it needs no accelerator, and its memory is given back
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(checkpoint / TAG), "--output_folder", str(scratch / TAG)]
    # transformers' models do not declare what Megatron's do
    command += ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    finished = subprocess.run(
        command,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if finished.returncode != 0:
        shutil.rmtree(scratch)
        last = "\n".join(finished.stdout.splitlines()[-LINES_OF_FAILURE:])
        raise TrainingError(
            f"DeepSpeed could not convert checkpoint {checkpoint}: resume with the number of "
            f"workers and the ZeRO stage that wrote it; DeepSpeed's last lines:\n{last}"
        )
    storage.sync_folder(scratch)
    os.rename(scratch, target)
