"""Distillation losses from hidden states and the LM head: closed-form gradients, bounded memory.

Logits are formed for a few positions at a time, cast to float32 there, turned into losses and
gradients, and dropped: no `[positions, vocabulary]` buffer of a whole batch ever exists.

Legend: P positions, C positions of one chunk, H hidden size, V vocabulary, M teachers, K entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 2**25
"""Logits formed at a time; one float32 buffer of them takes 128 MiB."""


@dataclass(frozen=True)
class Targets:
    """What the positions are trained against.

    Attributes:
        gold_ids: int64[P].
        token_ids: int[M, P, K], kept ids of each teacher; padded with 0 where `logprobs` is -inf.
        logprobs: float[M, P, K], at temperature 1, normalised over the full vocabulary; -inf marks
            padding.
        tail_mass: float[M, P], probability outside the kept ids.
        teacher_weights: float[M, P].
    """

    gold_ids: Tensor
    token_ids: Tensor
    logprobs: Tensor
    tail_mass: Tensor
    teacher_weights: Tensor


@dataclass(frozen=True)
class LossWeights:
    """Factor of each loss in the total; a loss of weight 0 is not computed."""

    forward_kl: float = 0.0
    cross_entropy: float = 0.0


@dataclass(frozen=True)
class LossSums:
    """Sums over positions; `total` is their weighted sum and alone carries a gradient."""

    total: Tensor
    forward_kl: Tensor
    cross_entropy: Tensor


@dataclass(frozen=True)
class PositionFigures:
    """Per position, without gradients.

    Attributes:
        gold_logprobs: float32[P], the student's log-probability of the gold token.
        forward_kl: float32[P], as in `distillation_loss`.
        argmax_ids: int64[P], the student's most probable token.
    """

    gold_logprobs: Tensor
    forward_kl: Tensor
    argmax_ids: Tensor


def distillation_loss(
    hidden_PH: Tensor,
    head_VH: Tensor,
    bias_V: Tensor | None,
    targets: Targets,
    weights: LossWeights,
    chunk_positions: int | None = None,
) -> LossSums:
    """Sums of the losses over all positions, and their weighted total for the backward pass.

    With p_k = exp(logprob_k) of the kept ids, t the tail mass, q the student's probabilities at
    temperature 1 and q_t the student's mass outside the kept ids, the two losses of a position are

        forward_kl    = sum_m w_m (sum_k p_mk log(p_mk / q_k) + t_m log(t_m / q_tm))
        cross_entropy = -log q_gold

    The first is the KL divergence from teacher to student after both put everything outside the
    teacher's kept ids into one bucket (Hinton et al., arXiv 1503.02531, on a coarser set of
    outcomes, hence a lower bound of the full KL). Each teacher has its own kept set, so that the
    sum equals sum_m w_m KL(p_m || q) on those outcomes. The stored numbers are used as they are:
    when sum_k p_k + t = S differs from 1 through float16 rounding, nothing is renormalised. Where
    the kept ids are the whole vocabulary there is no bucket and t is taken as 0.

    The gradient with respect to logit i is, for each teacher, `S q_i - p_i` for a kept id and
    `S q_i - t exp(z_i - lse_tail)` for any other, lse_tail being the log-sum-exp of the logits
    outside the kept ids (for S = 1 this is `q_i (1 - t / q_t)`). Log q_t comes from the same
    log-sum-exp and not from `1 - sum q`, which cancels.

    Gradients are computed along with the values, so the backward pass needs neither logits nor the
    head: under ZeRO-3 the head may be freed between the two.

    Args:
        hidden_PH: last hidden states at the positions, in the model's dtype.
        head_VH: weight of the LM head.
        chunk_positions: positions per chunk; by default as many as `CHUNK_ELEMENTS` logits allow.
    """
    total, forward_kl, cross_entropy = _ChunkedLoss.apply(
        hidden_PH,
        head_VH,
        bias_V,
        targets,
        weights,
        chunk_positions or _chunk_positions(head_VH.shape[0]),
    )
    return LossSums(total, forward_kl, cross_entropy)


@torch.no_grad()
def position_figures(
    hidden_PH: Tensor,
    head_VH: Tensor,
    bias_V: Tensor | None,
    targets: Targets,
    chunk_positions: int | None = None,
) -> PositionFigures:
    """What is known of each position without training on it; `forward_kl` as in
    `distillation_loss`.
    """
    num_positions = hidden_PH.shape[0]
    gold_P, kl_P = hidden_PH.new_zeros((2, num_positions), dtype=torch.float32)
    argmax_P = torch.zeros_like(targets.gold_ids)
    for rows in _chunks(num_positions, chunk_positions or _chunk_positions(head_VH.shape[0])):
        logits_CV = torch.nn.functional.linear(hidden_PH[rows], head_VH, bias_V).float()
        lse_C = logits_CV.logsumexp(dim=-1)
        gold_P[rows] = logits_CV.gather(1, targets.gold_ids[rows, None]).squeeze(1) - lse_C
        argmax_P[rows] = logits_CV.argmax(dim=-1)
        for m in range(targets.token_ids.shape[0]):
            bucketed = _Bucketed.of(targets, m, rows, logits_CV)
            kl_P[rows] += targets.teacher_weights[m, rows].float() * bucketed.divergence(
                logits_CV, lse_C
            )
    return PositionFigures(gold_P, kl_P, argmax_P)


class _ChunkedLoss(torch.autograd.Function):
    """Values and gradients in one pass over chunks of positions."""

    @staticmethod
    def forward(ctx, hidden_PH, head_VH, bias_V, targets, weights, chunk_positions):
        wants_head = ctx.needs_input_grad[1]
        ctx.hidden_grad = torch.empty_like(hidden_PH)
        # float32, since a bfloat16 sum over many chunks would lose the later ones
        ctx.head_grad = torch.zeros_like(head_VH, dtype=torch.float32) if wants_head else None
        ctx.bias_grad = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        ctx.dtypes = (head_VH.dtype, None if bias_V is None else bias_V.dtype)
        kl_sum, ce_sum = hidden_PH.new_zeros(2, dtype=torch.float32)
        for rows in _chunks(hidden_PH.shape[0], chunk_positions):
            hidden_CH = hidden_PH[rows]
            logits_CV = torch.nn.functional.linear(hidden_CH, head_VH, bias_V).float()
            kl, ce, grad_CV = _losses_and_gradient(logits_CV, targets, rows, weights)
            kl_sum, ce_sum = kl_sum + kl, ce_sum + ce
            if ctx.bias_grad is not None:
                ctx.bias_grad += grad_CV.sum(dim=0)
            grad_CV = grad_CV.to(hidden_CH.dtype)
            ctx.hidden_grad[rows] = grad_CV @ head_VH
            if wants_head:
                ctx.head_grad += grad_CV.T @ hidden_CH
        ctx.mark_non_differentiable(kl_sum, ce_sum)
        return weights.forward_kl * kl_sum + weights.cross_entropy * ce_sum, kl_sum, ce_sum

    @staticmethod
    @once_differentiable
    def backward(ctx, total_grad, *_):
        head_dtype, bias_dtype = ctx.dtypes
        head_grad = None if ctx.head_grad is None else (ctx.head_grad * total_grad).to(head_dtype)
        bias_grad = None if ctx.bias_grad is None else (ctx.bias_grad * total_grad).to(bias_dtype)
        return (
            (ctx.hidden_grad * total_grad).to(ctx.hidden_grad.dtype),
            head_grad,
            bias_grad,
            None,
            None,
            None,
        )


@dataclass(frozen=True)
class _Bucketed:
    """One teacher's kept ids and tail in one chunk, beside the student's logits outside the kept
    ids.
    """

    token_ids_CK: Tensor
    probabilities_CK: Tensor
    entropy_term_C: Tensor
    tail_C: Tensor
    outside_CV: Tensor
    outside_lse_C: Tensor

    @classmethod
    def of(cls, targets: Targets, m: int, rows: slice, logits_CV: Tensor) -> _Bucketed:
        logprobs_CK = targets.logprobs[m, rows].float()
        kept_CK = logprobs_CK > -torch.inf
        token_ids_CK = targets.token_ids[m, rows].long()
        # padding points at a kept id of its own position, so that it hides no other
        token_ids_CK = torch.where(kept_CK, token_ids_CK, token_ids_CK[:, :1])
        probabilities_CK = logprobs_CK.exp()
        outside_CV = logits_CV.scatter(1, token_ids_CK, -torch.inf)
        outside_lse_C = outside_CV.logsumexp(dim=-1)
        tail_C = torch.where(outside_lse_C > -torch.inf, targets.tail_mass[m, rows].float(), 0.0)
        plogp_CK = torch.where(kept_CK, probabilities_CK * logprobs_CK, 0.0)
        entropy_term_C = plogp_CK.sum(dim=-1) + torch.special.xlogy(tail_C, tail_C)
        return cls(
            token_ids_CK, probabilities_CK, entropy_term_C, tail_C, outside_CV, outside_lse_C
        )

    def divergence(self, logits_CV: Tensor, lse_C: Tensor) -> Tensor:
        """float32[C]: sum p log p - p log q over the kept ids and the bucket."""
        log_q_CK = logits_CV.gather(1, self.token_ids_CK) - lse_C[:, None]
        inside_C = (self.probabilities_CK * log_q_CK).sum(dim=-1)
        log_q_tail_C = torch.where(self.tail_C > 0, self.outside_lse_C - lse_C, 0.0)
        return self.entropy_term_C - inside_C - self.tail_C * log_q_tail_C

    def add_gradient(self, grad_CV: Tensor, factor_C: Tensor) -> None:
        """Adds `factor` times the part of the gradient without `S q`."""
        tail_factor_C = torch.where(self.tail_C > 0, factor_C * self.tail_C, 0.0)
        outside_lse_C = torch.where(self.tail_C > 0, self.outside_lse_C, 0.0)
        # kept ids are -inf in outside_CV and get nothing here
        share_CV = self.outside_CV.sub_(outside_lse_C[:, None]).exp_().mul_(tail_factor_C[:, None])
        grad_CV.sub_(share_CV)
        grad_CV.scatter_add_(1, self.token_ids_CK, -factor_C[:, None] * self.probabilities_CK)

    @property
    def total_mass_C(self) -> Tensor:
        """float32[C]: S, which is 1 up to the rounding of the stored numbers."""
        return self.probabilities_CK.sum(dim=-1) + self.tail_C


def _losses_and_gradient(
    logits_CV: Tensor, targets: Targets, rows: slice, weights: LossWeights
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of both losses over a chunk and the gradient of their weighted total, float32[C, V]."""
    lse_C = logits_CV.logsumexp(dim=-1)
    gold_C1 = targets.gold_ids[rows, None]
    kl_C, mass_C = torch.zeros_like(lse_C), torch.full_like(lse_C, weights.cross_entropy)
    grad_CV = torch.zeros_like(logits_CV)
    if weights.forward_kl:
        for m in range(targets.token_ids.shape[0]):
            teacher_C = targets.teacher_weights[m, rows].float()
            bucketed = _Bucketed.of(targets, m, rows, logits_CV)
            kl_C += teacher_C * bucketed.divergence(logits_CV, lse_C)
            mass_C += weights.forward_kl * teacher_C * bucketed.total_mass_C
            bucketed.add_gradient(grad_CV, weights.forward_kl * teacher_C)
    ce_C = lse_C - logits_CV.gather(1, gold_C1).squeeze(1)
    probabilities_CV = logits_CV.sub_(lse_C[:, None]).exp_()
    grad_CV.add_(probabilities_CV.mul_(mass_C[:, None]))
    if weights.cross_entropy:
        grad_CV.scatter_add_(1, gold_C1, torch.full_like(ce_C, -weights.cross_entropy)[:, None])
    return kl_C.sum(), ce_C.sum(), grad_CV


def _chunk_positions(vocabulary: int) -> int:
    return max(1, CHUNK_ELEMENTS // vocabulary)


def _chunks(num_positions: int, chunk_positions: int) -> Iterator[slice]:
    for start in range(0, num_positions, chunk_positions):
        yield slice(start, min(start + chunk_positions, num_positions))
