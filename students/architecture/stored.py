"""Weights on disk beside the model that shall load them, by names and shapes alone.

transformers draws a tensor that its file lacks at random, and goes on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from pipeline.config.student import StudentConfig
from pipeline.errors import TrainingError
from students.architecture.build import SHOWN, read_config, refuse_missing


def check_stored(student: StudentConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares the tensors that a pretrained student's files hold with those of its model.

    A class whose tensors are renamed or joined while they load is left to the training, which
    refuses missing ones too.

    Args:
        shapes: shapes of the stored tensors by name.

    Raises:
        TrainingError: a tensor has another shape, or is missing.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            read_config(student), trust_remote_code=student.trust_remote_code
        )
    known = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if get_model_conversion_mapping(model, add_legacy=False) or not known.keys() & shapes.keys():
        return
    misfits = [
        f"{name} has shape {shapes[name]}, the model's {known[name]}"
        for name in known
        if shapes.get(name, known[name]) != known[name]
    ]
    if misfits:
        more = f"\n  and {len(misfits) - SHOWN} more" if len(misfits) > SHOWN else ""
        raise TrainingError(
            f"the weights of student.model {student.model!r} do not fit its config.json:\n  "
            + "\n  ".join(misfits[:SHOWN])
            + more
            + "\nfetch config and weights again, from one revision"
        )
    if shapes.keys() <= known.keys():
        refuse_missing(student, _needed(model, shapes.keys()))


def _needed(model: PreTrainedModel, stored: Iterable[str]) -> list[str]:
    """Parameters of a model that no file holds, nor another name of theirs."""
    tied = model.all_tied_weights_keys
    tied = {*tied.keys(), *tied.values()}
    patterns = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    stored = set(stored)
    return [
        name
        for name, _ in model.named_parameters()
        if name not in stored
        and not (name in tied and tied & stored)
        and not any(pattern.search(name) for pattern in patterns)
    ]
