"""Randomness that a model's own config brings into training: dropout, layer drop, jitter."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

NEVER_SWITCHED = {"router_jitter_noise"}
"""Attributes that PhiMoE's router reads in evaluation too, so that without them the exported model
would be another one than the trained one.
"""
OTHER_HEADS = ("summary_", "classifier_")
"""Beginnings of settings for heads that are not a language model's."""
Setting = tuple[dict[str, Any], str, str]
"""Where a value above 0 stands, its key there, and its name."""


def active_noise(model: PreTrainedModel) -> dict[str, float]:
    """Size of everything random that acts while the model trains, by its name in the config, or in
    the model where the config does not name it.
    """
    found = _of_config(model) or _of_modules(model)
    return {name: owner[key] for owner, key, name in found}


def switch_off_noise(model: PreTrainedModel) -> None:
    """Sets dropout and jitter to 0, in this model and not in the config that is exported."""
    modules = [each for each in _of_modules(model) if each[1] not in NEVER_SWITCHED]
    for owner, key, _ in [*modules, *_of_config(model)]:
        owner[key] = 0.0


def _of_modules(model: PreTrainedModel) -> list[Setting]:
    found: list[Setting] = []
    for path, module in model.named_modules():
        values = vars(module)
        if isinstance(module, nn.modules.dropout._DropoutNd):
            found += [(values, "p", path.rpartition(".")[2])] if module.p > 0 else []
        else:
            found += [(values, key, key) for key in values if _is_noise(key, values[key])]
    return found


def _of_config(model: PreTrainedModel) -> list[Setting]:
    """Settings of the language model; Falcon, GPT-J and GPT-Neo read them in every forward."""
    values = vars(model.config.get_text_config())
    return [
        (values, key, key)
        for key in values
        if _is_noise(key, values[key]) and not key.startswith(OTHER_HEADS)
    ]


def _is_noise(key: str, value: Any) -> bool:
    return ("drop" in key or "jitter" in key) and isinstance(value, float) and value > 0
