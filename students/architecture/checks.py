"""Checks of a model before it is trained."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from pipeline.errors import TrainingError
from students.architecture.body import body_hidden_states
from students.architecture.head import lm_head_of, logit_step

LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest difference between two ways to the same logits, relative to the largest logit."""


@torch.no_grad()
def check_architecture(model: PreTrainedModel, packing: bool) -> None:
    """Checks on a few tokens that LM head times last hidden state, soft-capped as in the model,
    gives the model's logits, and that sequences that are computed together do not see one another.

    Raises:
        TrainingError: logits differ; the message has the difference.
    """
    was_training = model.training
    model.eval()
    lm_head = lm_head_of(model)
    vocabulary = lm_head.out_features
    first, second = (torch.arange(n, device=model.device) * 7 % vocabulary for n in (5, 4))
    alone = torch.cat(
        [model(input_ids=ids[None], use_cache=False).logits[0] for ids in (first, second)]
    )
    if packing:
        places = torch.cat([torch.arange(len(ids), device=model.device) for ids in (first, second)])
        hidden_TH = body_hidden_states(model, torch.cat([first, second])[None], places[None])
    else:
        rows = torch.stack([first, torch.nn.functional.pad(second, (0, 1))])
        hidden_TH = body_hidden_states(model, rows, None)[:-1]
    step = logit_step(model)
    together = step.factor * lm_head(hidden_TH.to(lm_head.weight.dtype)).float()
    if step.softcap is not None:
        together = step.softcap * torch.tanh(together / step.softcap)
    difference = ((together - alone).abs().amax(dim=1) / alone.abs().max()).float().cpu()
    model.train(was_training)
    tolerance = LOGIT_TOLERANCE[model.dtype]
    if difference.max() <= tolerance:
        return
    size = f"by {difference.max():.3g} of the largest logit (tolerance {tolerance})"
    unsupported = "this architecture is not supported, choose another student.model"
    if difference[: len(first)].max() > tolerance:
        raise TrainingError(
            f"LM head times last hidden state of {type(model).__name__} differs from the model's "
            f"own logits {size}: {unsupported}"
        )
    raise TrainingError(
        f"{type(model).__name__} lets {'packed' if packing else 'padded'} sequences see one "
        f"another, since their logits differ from those of each sequence alone {size}: "
        + ("set training.packing: false" if packing else unsupported)
    )
