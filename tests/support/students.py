"""Students beside transformers: the loss of each sequence alone, from the model's own logits.

It shares no computation with `students/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel

from students.data.examples import Example
from tests.support.architectures import VOCABULARY, Architecture

KEPT = 6
FIRST = 2
"""Index of the first token that is trained on."""


def save_config(architecture: Architecture, folder: Path, **options: Any) -> Path:
    """Writes the config of an architecture; options replace its own. Returns the folder."""
    config = AutoConfig.for_model(architecture.kind, **architecture.config | options)
    config.save_pretrained(folder)
    return folder


def example(length: int, seed: int) -> Example:
    """A random sequence with the most likely ids of a random teacher."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (length,), generator=generator)
    noise = torch.randn(1, length - FIRST, VOCABULARY, generator=generator)
    logprobs, token_ids = torch.log_softmax(2 * noise, dim=-1).topk(KEPT, dim=-1)
    tail_mass = 1 - logprobs.exp().sum(dim=-1)
    return Example(
        ids.int().numpy(),
        np.arange(FIRST - 1, length - 1),
        ids[FIRST:].numpy(),
        token_ids.int().numpy(),
        logprobs.numpy(),
        tail_mass.numpy(),
        np.ones((1, length - FIRST), np.float32),
    )


def loss_alone(
    model: PreTrainedModel, examples: Sequence[Example], text_weight: float
) -> torch.Tensor:
    """Forward KL on the kept ids and their bucket, and weighted cross-entropy; summed over all
    positions, each sequence in a forward of its own.
    """
    total = torch.zeros(())
    for each in examples:
        ids = torch.from_numpy(each.input_ids.astype(np.int64))
        logits_TV = model(input_ids=ids[None], use_cache=False).logits[0]
        dtype = torch.promote_types(logits_TV.dtype, torch.float32)
        log_q_PV = torch.log_softmax(logits_TV.to(dtype), dim=-1)[each.logit_indices]
        kept_PK = torch.from_numpy(each.token_ids[0]).long()
        log_p_PK, tail_P = (
            torch.from_numpy(x).to(dtype) for x in (each.logprobs[0], each.tail_mass[0])
        )
        rest_P = log_q_PV.scatter(1, kept_PK, -torch.inf).logsumexp(dim=1)
        kl = (log_p_PK.exp() * (log_p_PK - log_q_PV.gather(1, kept_PK))).sum()
        kl = kl + (tail_P * (tail_P.log() - rest_P)).sum()
        gold = log_q_PV.gather(1, torch.from_numpy(each.gold_ids)[:, None]).sum()
        total = total + kl - text_weight * gold
    return total


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """float64 gradients of all parameters; 0 of a parameter that the loss does not use."""
    model.zero_grad()
    loss.backward()
    return {
        name: torch.zeros_like(p, dtype=torch.float64) if p.grad is None else p.grad.double()
        for name, p in model.named_parameters()
    }


def distance(found: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients together."""
    return float(sum((found[name] - other[name]).square().sum() for name in other) ** 0.5)
