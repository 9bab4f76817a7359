"""The body of a model: hidden states of sequences that are computed together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import TrainingError


def body_of(model: PreTrainedModel) -> nn.Module:
    """The part of a model that computes hidden states.

    Raises:
        TrainingError: there is none beside the whole model.
    """
    if (body := model.base_model) is not model:
        return body
    # such as Llama 4, which names its body otherwise than its `base_model_prefix`
    bodies = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(bodies) != 1:
        raise TrainingError(
            f"the student {type(model).__name__} has {len(bodies)} models inside and no body apart "
            "from its LM head: this architecture is not supported, choose another student.model"
        )
    return bodies[0]


def body_hidden_states(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """[R T, H]: last hidden states, see `body_layers`."""
    return body_layers(model, input_ids, position_ids, ())[0]


def body_layers(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    layers: Sequence[int],
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """[R T, H]: last hidden states of one packed row, or of padded rows one after another; and the
    hidden states after each of `layers`, as transformers counts them.

    For a packed row transformers builds the block-diagonal mask from `position_ids`, but only
    without a cache of keys and values: with `use_cache=True` its sequences would see one another.
    """
    body = body_of(model)
    options: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
    if layers:
        options["output_hidden_states"] = True
    output = body(input_ids=input_ids, use_cache=False, **options)
    by_layer = {layer: output.hidden_states[layer].flatten(0, 1) for layer in layers}
    return output.last_hidden_state.flatten(0, 1), by_layer
