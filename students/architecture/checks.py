"""Measurements of a model before it is trained: its logits, and whether tokens see what they must
not.

No bound is guessed: forwards of the same sequence in a larger batch, and with inputs that differ by
the rounding of float32, say how far logits move by rounding alone. Deep models with large weights
amplify it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import TrainingError
from pipeline.rope import length_bounds
from students.architecture.body import body_hidden_states
from students.architecture.head import lm_head_of, logit_step

LENGTHS = (37, 23, 5)
"""Tokens of the sequences that are computed alone and together."""
NOISE = 10
"""Times that a difference may exceed the rounding that was measured. Sequences that see one another
differ by a hundredth and more of the largest logit, if the weights are not too small.
"""
LEAST_ROUNDINGS = 16
"""Roundings of float32 sums that are expected where none was seen."""


@torch.no_grad()
def check_architecture(model: PreTrainedModel, packing: bool) -> None:
    """Checks on three sequences that LM head times last hidden state, with its step, gives the
    model's logits, that tokens do not see later ones, and that sequences that are computed together
    do not see one another.

    Raises:
        TrainingError: logits differ; the message has the difference.
    """
    was_training = model.training
    model.eval()
    by_head = _head_of(model)
    sequences = _sequences(lm_head_of(model).out_features, model.device)
    alone = [model(input_ids=ids[None], use_cache=False).logits[0].float() for ids in sequences]
    own = by_head(body_hidden_states(model, sequences[0][None], None))
    longest, half = sequences[0].repeat(len(sequences), 1), len(sequences[0]) // 2
    longest[1, half:] = longest[1, half:].flip(0)
    with _last_row_perturbed(model):
        batched, with_other_end, perturbed = model(
            input_ids=longest, use_cache=False
        ).logits.float()
    together = _computed_together(model, by_head, sequences, packing)
    model.train(was_training)
    largest = max(logits.abs().max() for logits in alone)
    least = max(LEAST_ROUNDINGS * torch.finfo(torch.float32).eps, torch.finfo(model.dtype).eps)
    rounding = max(_distance(batched, alone[0]), _distance(perturbed, alone[0])) / largest
    tolerance = NOISE * max(rounding, least)
    size = "by {:.3g} of the largest logit" + f" (tolerance {tolerance:.2g})"
    unsupported = "this architecture is not supported, choose another student.model"
    if not (difference := _distance(own, alone[0]) / largest) <= tolerance:
        raise TrainingError(
            f"LM head times last hidden state of {type(model).__name__} differs from the model's "
            f"own logits {size.format(difference)}: {unsupported}"
        )
    if not (difference := _distance(with_other_end[:half], alone[0][:half]) / largest) <= tolerance:
        raise TrainingError(
            f"{type(model).__name__} lets tokens see those that follow, since logits differ with "
            f"these {size.format(difference)}, but a student must be causal: choose another "
            "student.model or config"
        )
    if not (difference := _distance(torch.cat(together), torch.cat(alone)) / largest) <= tolerance:
        raise TrainingError(
            f"{type(model).__name__} lets {'packed' if packing else 'padded'} sequences see one "
            "another, since their logits differ from those of each sequence alone "
            f"{size.format(difference)}: "
            + ("set training.packing: false" if packing else unsupported)
        )


@contextmanager
def _last_row_perturbed(model: PreTrainedModel) -> Iterator[None]:
    """Changes the embeddings of a batch's last row by up to the rounding of float32."""
    generator = torch.Generator().manual_seed(0)

    def perturb(_module: nn.Module, _arguments: object, states: Tensor) -> Tensor:
        share = 2 * torch.rand(states[-1].shape, generator=generator) - 1
        factor = 1 + torch.finfo(torch.float32).eps * share.to(states.device)
        return torch.cat([states[:-1], (states[-1:] * factor).to(states.dtype)])

    hook = model.get_input_embeddings().register_forward_hook(perturb)
    try:
        yield
    finally:
        hook.remove()


def _computed_together(
    model: PreTrainedModel,
    by_head: Callable[[Tensor], Tensor],
    sequences: Sequence[Tensor],
    packing: bool,
) -> list[Tensor]:
    """float32[T, V] of every sequence, in the micro-batches that a training would make."""
    bounds = length_bounds(model.config)
    sides = [bisect_left(bounds, len(ids)) for ids in sequences]
    found: dict[int, Tensor] = {}
    for side in set(sides):
        members = [i for i, of_sequence in enumerate(sides) if of_sequence == side]
        some = [sequences[i] for i in members]
        lengths = [len(ids) for ids in some]
        if packing:
            places = torch.cat([torch.arange(n, device=model.device) for n in lengths])
            hidden_TH = body_hidden_states(model, torch.cat(some)[None], places[None])
            parts = by_head(hidden_TH).split(lengths)
        else:
            rows = nn.utils.rnn.pad_sequence(some, batch_first=True)
            logits = by_head(body_hidden_states(model, rows, None))
            parts = [row[:n] for row, n in zip(logits.view(*rows.shape, -1), lengths, strict=True)]
        found |= dict(zip(members, parts, strict=True))
    return [found[i] for i in range(len(sequences))]


def _sequences(vocabulary: int, device: torch.device) -> list[Tensor]:
    """int64 ids of all sequences, without the lowest ones, which may mean padding."""
    generator = torch.Generator().manual_seed(0)
    lowest = min(3, vocabulary - 1)
    return [
        torch.randint(lowest, vocabulary, (length,), generator=generator).to(device)
        for length in LENGTHS
    ]


def _head_of(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """The function from hidden states [T, H] to logits float32[T, V], by LM head and step."""
    lm_head, step = lm_head_of(model), logit_step(model)

    def by_head(hidden_TH: Tensor) -> Tensor:
        logits_TV = step.factor * lm_head(hidden_TH.to(lm_head.weight.dtype)).float()
        if step.softcap is not None:
            logits_TV = step.softcap * torch.tanh(logits_TV / step.softcap)
        return logits_TV

    return by_head


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
