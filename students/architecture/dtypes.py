"""Number formats of a model's tensors."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def as_loaded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The float32 model as `from_pretrained(dtype=dtype)` loads its weights.

    An architecture has tensors that stay float32 in every training: the frequencies of rotary
    positions, and what its class lists, such as the correction biases of routers. `model.to(dtype)`
    would round them, and the student would be another model than the one that vLLM serves from the
    same folder. So transformers itself loads the weights, here from memory.
    """
    if dtype == torch.float32:
        return model
    config, weights = model.config, model.state_dict()
    return type(model).from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def float_buffers(model: PreTrainedModel) -> dict[str, str]:
    """Number format of every buffer of floating-point numbers, by name; rotary frequencies are
    such.
    """
    return {
        name: str(value.dtype).removeprefix("torch.")
        for name, value in model.named_buffers()
        if value.is_floating_point()
    }
