"""The proof of an export: the folder, loaded as any user loads it, is the trained student.

Its weights are the trained ones in the export's dtype, bit by bit; its buffers have the dtypes that
they had in training; and its log-probabilities of a few sequences differ from those of the
training's own forward by rounding alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import PreTrainedModel

from pipeline import storage
from pipeline.errors import TrainingError
from pipeline.report.rounding import Agreement
from pipeline.run.training_spec import TrainingSpec
from pipeline.sequences import read_sequences
from students.architecture.dtypes import float_buffers
from students.reference import noisy_logprobs

SHOWN = 5
"""Most tensors that a message lists."""


def prove(spec: TrainingSpec, model: PreTrainedModel, folder: Path) -> Agreement:
    """Compares an exported model with the training.

    Args:
        model: the model as `folder` loads.

    Returns:
        The comparison of log-probabilities.

    Raises:
        TrainingError: the model is not the trained one; the message says where they differ.
    """
    refuse_other_weights(model, Path(spec.layout.final_weights(spec.student)), folder)
    probe = storage.read_json(spec.layout.probe(spec.student))
    refuse_other_buffers(spec, model, probe, folder)
    trained = probe["gold_logprobs"]
    sequences = [
        sequence
        for shard in probe["shards"]
        for sequence in read_sequences(storage.join(spec.layout.root, shard))
        if sequence.sequence_id in trained
    ]
    config = spec.config
    coarse = bool(config.training.resources.num_gpus or config.evaluation.resources.num_gpus)
    agreement = noisy_logprobs(model, sequences, coarse).agreement(trained)
    if not agreement.holds:
        raise TrainingError(
            f"the exported student in {folder} has the trained weights, but does not compute with "
            f"them what it computed in training: {agreement}; do not use the folder; "
            f"{_remedy(spec, probe)}"
        )
    return agreement


@torch.no_grad()
def refuse_other_weights(model: PreTrainedModel, trained: Path, folder: Path) -> None:
    """Compares parameters and saved buffers with the trained ones, cast to their dtype; a tensor at
    a time, so that memory holds the model once.

    Raises:
        TrainingError: a tensor has another value, is missing, or is not a trained one.
    """
    loaded, problems = model.state_dict(), []
    with safe_open(trained, framework="pt") as weights:
        names = set(weights.keys())
        for name in sorted(names):
            own, value = loaded.get(name), weights.get_tensor(name)
            if own is None:
                problems.append(f"{name} is missing")
            elif own.shape != value.shape:
                problems.append(f"{name} has shape {tuple(own.shape)}, not {tuple(value.shape)}")
            elif count := int((own.cpu() != value.to(own.dtype)).sum()):
                problems.append(f"{name} differs in {count:,} of {value.numel():,} values")
    # of tied parameters this names the one that a training saves
    untrained = [name for name, _ in model.named_parameters() if name not in names]
    problems += [f"{name} is not among the trained weights" for name in untrained]
    if problems:
        raise TrainingError(
            f"the exported student in {folder} does not hold the weights of {trained}: "
            f"{_listed(problems)}; do not use the folder; the trained weights are kept: run the "
            "same command again, which only exports anew; if that is refused too, transformers "
            f"{transformers.__version__} does not save a {type(model).__name__} faithfully, and "
            "another version must be installed"
        )


def refuse_other_buffers(
    spec: TrainingSpec, model: PreTrainedModel, probe: dict[str, Any], folder: Path
) -> None:
    """Compares the dtypes of all buffers with those in training, which earlier versions have not
    noted.

    Raises:
        TrainingError: a buffer has another dtype.
    """
    own = float_buffers(model)
    trained = {name: dtype for name, dtype in probe.get("buffers", {}).items() if name in own}
    problems = [
        f"{name} is {own[name]}, and was {dtype} in training"
        for name, dtype in trained.items()
        if own[name] != dtype
    ]
    if problems:
        raise TrainingError(
            f"the exported student in {folder} rounds otherwise than the trained one: "
            f"{_listed(problems)}; do not use the folder; {_remedy(spec, probe)}"
        )


def _listed(problems: list[str]) -> str:
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


def _remedy(spec: TrainingSpec, probe: dict[str, Any]) -> str:
    kept = f"the trained weights and checkpoints in {spec.folder} are kept:"
    trained, here = probe.get("transformers"), transformers.__version__
    if trained not in (None, here):
        return (
            f"{kept} install transformers {trained}, which trained them, in place of {here}, and "
            "run the same command again, which only exports anew"
        )
    packed = spec.config.training.packing
    setting = "training.packing: false" if packed else "student.attn_implementation: eager"
    return (
        f"{kept} give student.model the config and code that it had in training, and run the same "
        "command again, which only exports anew; if nothing has changed there, train under another "
        f"`name` with {setting}"
    )
