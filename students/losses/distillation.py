"""Distillation losses from hidden states and the LM head: closed-form gradients, bounded memory.

    hidden states -> logits of a chunk -> outcomes (`outcomes.py`) -> values and gradients of every
    loss (`divergences.py`) -> gradient of the logits, in their own memory (`chunk.py`) -> gradients
    of hidden states and LM head

Logits are formed for a few positions at a time, cast to float32 there, turned into gradients and
dropped: no `[positions, vocabulary]` buffer of a whole batch ever exists. This module and all
modules that it imports need torch alone.

Legend: P positions, C positions of one chunk, H hidden size, V vocabulary, F figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from students.losses.chunk import figure_names, losses_and_gradient_
from students.losses.divergences import DistributionLoss
from students.losses.inputs import LogitStep, Targets

CHUNK_ELEMENTS = 2**25
"""Numbers formed at a time; one float32 buffer of them takes 128 MiB."""
CHUNK_SHARE_OF_DEVICE = 128
"""Part of a GPU's memory, as its denominator, that one such buffer may take: every chunk reads the
LM head and adds to its gradient, which costs as much for few positions as for many.
"""
PLAIN = LogitStep()
"""The LM head's outputs are the logits."""
OUTCOME_BUFFERS = 16
"""About how many buffers of the size of the outcomes live at once in a chunk."""


@dataclass(frozen=True)
class LossSums:
    """Sums over positions.

    Attributes:
        total: weighted sum of the losses; the only one that carries a gradient.
        figures: [F], in the order of `figure_names`.
    """

    total: Tensor
    figures: Tensor


@dataclass(frozen=True)
class PositionFigures:
    """Figures of every position, without gradients.

    Attributes:
        figures: float[F, P], in the order of `figure_names`; the first is the negative
            log-probability of the gold token.
        argmax_ids: int64[P], the student's most probable token.
    """

    figures: Tensor
    argmax_ids: Tensor


def distillation_loss(
    hidden_PH: Tensor,
    lm_head_VH: Tensor,
    bias_V: Tensor | None,
    targets: Targets,
    losses: Sequence[DistributionLoss],
    step: LogitStep = PLAIN,
    chunk_positions: int | None = None,
) -> LossSums:
    """Sums of the losses over all positions, and their weighted total for the backward pass.

    With p_k = exp(logprob_k) of the kept ids, t the tail mass, q the student's probabilities at
    temperature 1 and q_t the student's mass outside the kept ids, teacher and student are compared
    on the kept ids and one bucket for all others (a coarser set of outcomes, hence a lower bound of
    every divergence here between the full distributions). `divergences.py` has the formulas, and
    the meaning of a temperature other than 1 for the bucket.

    Several teachers: `forward_kl` at temperature 1 is linear in the target, so each teacher keeps
    its own kept ids and bucket, and `sum_m w_m KL(p_m || q)` on these is exact. All other losses
    compare with the mixture `sum_m w_m p_m` on the union of the kept ids, see
    `OutcomeSets.of_union`.

    Stored numbers are used as they are: when sum_k p_k + t differs from 1 through float16
    rounding, nothing is renormalised at temperature 1. If the kept ids are the whole vocabulary,
    there is no bucket and t is taken as 0.

    One pass over a chunk gives all losses and one gradient. Gradients are computed along with the
    values, so the backward pass needs neither logits nor the LM head: under ZeRO-3 the LM head may
    be freed between the two.

    Args:
        hidden_PH: last hidden states at the positions, which are cast to the LM head's dtype: some
            bodies end in float32.
        lm_head_VH: weight of the LM head. Losses are computed in float32, or in float64 if it is
            float64.
        bias_V: bias of the LM head, if it has one.
        step: what follows the LM head on the way to the logits.
        chunk_positions: positions per chunk; by default as many as `chunk_elements` allows.
    """
    total, figures = _ChunkedLoss.apply(
        hidden_PH.to(lm_head_VH.dtype),
        lm_head_VH,
        bias_V,
        targets,
        tuple(losses),
        step,
        chunk_positions or _chunk_positions(lm_head_VH, targets),
    )
    return LossSums(total, figures)


@torch.no_grad()
def position_figures(
    hidden_PH: Tensor,
    lm_head_VH: Tensor,
    bias_V: Tensor | None,
    targets: Targets,
    losses: Sequence[DistributionLoss],
    step: LogitStep = PLAIN,
    chunk_positions: int | None = None,
) -> PositionFigures:
    """Figures of each position without training on it: losses without their weights, and the
    student's choice; arguments as in `distillation_loss`.
    """
    hidden_PH, num_positions = hidden_PH.to(lm_head_VH.dtype), hidden_PH.shape[0]
    figures_FP = hidden_PH.new_empty(
        (len(figure_names(losses)), num_positions), dtype=_dtype(hidden_PH)
    )
    argmax_P = torch.empty_like(targets.gold_ids)
    positions = chunk_positions or _chunk_positions(lm_head_VH, targets)
    for rows in _chunks(num_positions, positions):
        logits_CV, _ = _logits(hidden_PH[rows], lm_head_VH, bias_V, step)
        argmax_P[rows] = logits_CV.argmax(dim=-1)
        figures_FP[:, rows] = losses_and_gradient_(logits_CV, targets, rows, losses, gradient=False)
    return PositionFigures(figures_FP, argmax_P)


class _ChunkedLoss(torch.autograd.Function):
    """Values and gradients in one pass over chunks of positions."""

    @staticmethod
    def forward(ctx, hidden_PH, lm_head_VH, bias_V, targets, losses, step, chunk_positions):
        dtype = _dtype(hidden_PH)
        ctx.hidden_grad = torch.empty_like(hidden_PH)
        # at least float32, since a bfloat16 sum over many chunks would lose the later ones
        wants_lm_head = ctx.needs_input_grad[1]
        ctx.lm_head_grad = torch.zeros_like(lm_head_VH, dtype=dtype) if wants_lm_head else None
        ctx.bias_grad = None if bias_V is None else torch.zeros_like(bias_V, dtype=dtype)
        ctx.dtypes = (lm_head_VH.dtype, None if bias_V is None else bias_V.dtype)
        figures_F = hidden_PH.new_zeros(len(figure_names(losses)), dtype=dtype)
        for rows in _chunks(hidden_PH.shape[0], chunk_positions):
            hidden_CH = hidden_PH[rows]
            grad_CV, slope = _logits(hidden_CH, lm_head_VH, bias_V, step)
            figures_FC = losses_and_gradient_(grad_CV, targets, rows, losses, gradient=True)
            figures_F += figures_FC.sum(dim=1)
            if slope is not None:
                grad_CV.mul_(slope)
            if ctx.bias_grad is not None:
                ctx.bias_grad += grad_CV.sum(dim=0)
            grad_CV = grad_CV.to(hidden_CH.dtype)
            ctx.hidden_grad[rows] = grad_CV @ lm_head_VH
            if ctx.lm_head_grad is not None:
                _add_product_(ctx.lm_head_grad, grad_CV.T, hidden_CH)
        ctx.mark_non_differentiable(figures_F)
        return weighted_total(figures_F, losses), figures_F

    @staticmethod
    @once_differentiable
    def backward(ctx, total_grad, *_):
        lm_head_dtype, bias_dtype = ctx.dtypes
        lm_head_grad = None
        if ctx.lm_head_grad is not None:
            # straight into its dtype: on a GPU no float32 product of the LM head's size exists
            lm_head_grad = torch.empty_like(ctx.lm_head_grad, dtype=lm_head_dtype)
            torch.mul(ctx.lm_head_grad, total_grad, out=lm_head_grad)
        bias_grad = None if ctx.bias_grad is None else (ctx.bias_grad * total_grad).to(bias_dtype)
        hidden_grad = (ctx.hidden_grad * total_grad).to(ctx.hidden_grad.dtype)
        return hidden_grad, lm_head_grad, bias_grad, None, None, None, None


def weighted_total(figures_F: Tensor, losses: Sequence[DistributionLoss]) -> Tensor:
    """The weighted sum of the losses among figures of shape [F] or [F, P]."""
    names = figure_names(losses)
    weights = dict.fromkeys(names, 0.0)
    for loss in losses:
        weights[loss.name] += loss.weight
    return torch.stack([weights[name] * figures_F[i] for i, name in enumerate(names)]).sum(dim=0)


def _logits(
    hidden_CH: Tensor, lm_head_VH: Tensor, bias_V: Tensor | None, step: LogitStep
) -> tuple[Tensor, Tensor | float | None]:
    """The logits of a chunk, and their derivative by the LM head's outputs unless it is 1."""
    logits_CV = torch.nn.functional.linear(hidden_CH, lm_head_VH, bias_V).to(_dtype(hidden_CH))
    if step.factor != 1:
        logits_CV.mul_(step.factor)
    if step.softcap is None:
        return logits_CV, None if step.factor == 1 else step.factor
    capped_CV = logits_CV.div_(step.softcap).tanh_()
    slope_CV = capped_CV.square().neg_().add_(1)
    if step.factor != 1:
        slope_CV.mul_(step.factor)
    return capped_CV.mul_(step.softcap), slope_CV


def _add_product_(sum_VH: Tensor, grad_VC: Tensor, hidden_CH: Tensor) -> None:
    if sum_VH.dtype == hidden_CH.dtype:
        sum_VH.addmm_(grad_VC, hidden_CH)
    else:
        sum_VH += grad_VC @ hidden_CH


def _dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def chunk_elements(device: torch.device) -> int:
    """Numbers that are formed at a time on a device."""
    if device.type != "cuda":
        return CHUNK_ELEMENTS
    num_bytes = torch.cuda.get_device_properties(device).total_memory
    return max(CHUNK_ELEMENTS, num_bytes // (4 * CHUNK_SHARE_OF_DEVICE))


def _chunk_positions(lm_head_VH: Tensor, targets: Targets) -> int:
    num_teachers, _, num_entries = targets.token_ids.shape
    outcomes = num_teachers * (num_teachers * num_entries + 1)
    elements_per_position = lm_head_VH.shape[0] + OUTCOME_BUFFERS * outcomes
    return max(1, chunk_elements(lm_head_VH.device) // elements_per_position)


def _chunks(num_positions: int, chunk_positions: int) -> Iterator[slice]:
    for start in range(0, num_positions, chunk_positions):
        yield slice(start, min(start + chunk_positions, num_positions))
