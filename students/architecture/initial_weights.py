"""Weights that a training starts from: those of a complete checkpoint or of a Hugging Face folder.

Only the weights are taken over: steps, optimizer state and data order start anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline import storage
from pipeline.errors import TrainingError
from pipeline.messages import foreign
from pipeline.run.training_spec import is_complete_checkpoint
from students.checkpoints.ranks import missing_ranks
from students.checkpoints.universal import TAG, stored_partitioning

MODEL = "model."
"""Prefix of the model's parameters in a checkpoint: `StudentModule` holds the model beside the
matrices that only its losses need.
"""
SHOWN = 10
"""Most differences that a message lists."""


def load_initial_weights(model: PreTrainedModel, source: str, trust_remote_code: bool) -> None:
    """Gives a student the weights of a complete checkpoint or of a folder in Hugging Face format.

    Raises:
        TrainingError: the folder is neither, or its weights differ from the student's in name or
            shape.
    """
    folder = Path(source)
    if is_complete_checkpoint(source):
        fit_weights(model, checkpoint_weights(folder), source)
        return
    try:
        # pickled weights are never read, since others may have published them
        other = AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise TrainingError(
            f"student.initial_weights {source} is neither a complete checkpoint nor a Hugging Face "
            f"folder with safetensors: {foreign(error, 1000)}"
        ) from error
    fit_weights(model, other.state_dict(), source)


def checkpoint_weights(folder: Path) -> dict[str, torch.Tensor]:
    """float32 weights of a complete checkpoint, by their name in the Hugging Face model; at ZeRO
    stage 0 in the training's dtype.

    DeepSpeed reads ZeRO's own files, and unpickles them.

    Raises:
        TrainingError: the checkpoint lacks the files of a worker.
    """
    stored = storage.read_json(str(folder / "state.json"), dict[str, Any])
    partitioning = stored_partitioning(stored, folder)
    if partitioning.stage == 0:
        path = folder / TAG / "mp_rank_00_model_states.pt"
        states = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights: dict[str, torch.Tensor] = states["module"]
    else:
        if missing := missing_ranks(folder, partitioning):
            raise TrainingError(
                f"checkpoint {folder} lacks the files of rank {', '.join(map(str, missing))}: the "
                "node of that rank did not mount the folder; look for the files under the same "
                "path there, or name another checkpoint"
            )
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag=TAG) or {}
    return {
        name.removeprefix(MODEL): value for name, value in weights.items() if name.startswith(MODEL)
    }


@torch.no_grad()
def fit_weights(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Loads weights by name; second names of tied weights may be left out.

    Raises:
        TrainingError: a name is missing or superfluous, a shape differs, or the source has two
            matrices where the student has one.
    """
    refuse_misfits(model, weights, source)
    model.load_state_dict(weights, strict=False)
    loaded = model.state_dict()
    _refuse(
        model,
        source,
        [
            f"{name} is tied to another matrix in the student"
            for name, value in weights.items()
            if not torch.equal(loaded[name], value.to(loaded[name]))
        ],
    )


def refuse_misfits(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor], source: str
) -> None:
    """Compares names and shapes of weights with those of a model, which may lie on the meta device;
    second names of tied weights may be left out.

    Raises:
        TrainingError: a name is missing or superfluous, or a shape differs.
    """
    own = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    known = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    misfits = [f"{name} is missing" for name in own if name not in weights]
    for name, value in weights.items():
        if name not in known:
            misfits.append(f"{name} is not in the student")
        elif known[name] != tuple(value.shape):
            misfits.append(f"{name} has shape {tuple(value.shape)}, the student's {known[name]}")
    _refuse(model, source, misfits)


def _refuse(model: PreTrainedModel, source: str, misfits: list[str]) -> None:
    if misfits:
        rest = f"\n  and {len(misfits) - SHOWN} more" if len(misfits) > SHOWN else ""
        raise TrainingError(
            f"the weights in {source} do not fit the student, a {type(model).__name__}:\n  "
            + "\n  ".join(misfits[:SHOWN])
            + rest
            + "\nchoose weights with the architecture and the shapes of student.model"
        )
