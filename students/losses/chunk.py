"""All losses of one chunk of logits, and the gradient of their weighted sum in its place.

All ids that no teacher keeps have gradients proportional to their probabilities, whatever the
losses and however many the teachers. So the chunk is exponentiated once (`outcomes.py`), scaled
once by a factor per position, and overwritten at the kept ids.

Legend: C positions of the chunk, V vocabulary, M teachers, K entries, U = M K slots for the union
of the teachers' kept ids, O = U + 1 outcomes, S sets of outcomes, F figures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from students.losses.divergences import CrossEntropy, DistributionLoss, Divergence
from students.losses.inputs import Targets
from students.losses.outcomes import KeptIds, OutcomeSets, StudentChunk

UNION_ERROR_BOUND = "union_error_bound"


def figure_names(losses: Sequence[DistributionLoss]) -> tuple[str, ...]:
    """Names of the figures that `losses_and_gradient_` measures of every position: cross-entropy
    first, listed or not; then every other loss of the list; then the figures by which their
    approximations are judged.

    `union_error_bound` is the bound of the mass that `OutcomeSets.of_union` misplaces; the others
    are the `diagnostics` of each loss, such as `<reverse_kl>_floored`.
    """
    divergences = [loss for loss in losses if isinstance(loss, Divergence)]
    union = [UNION_ERROR_BOUND] if any(not loss.is_linear for loss in divergences) else []
    diagnostics = [f"{loss.name}_{name}" for loss in divergences for name in loss.diagnostics]
    return ("cross_entropy", *(loss.name for loss in divergences), *union, *diagnostics)


def losses_and_gradient_(
    logits_CV: Tensor,
    targets: Targets,
    rows: slice,
    losses: Sequence[DistributionLoss],
    *,
    gradient: bool,
) -> Tensor:
    """The figures of every position of a chunk, [F, C] in the order of `figure_names`.

    Overwrites the logits: with the gradient of the sum of all weighted losses if `gradient`, and
    otherwise with nothing of use.

    Args:
        rows: the chunk's positions among the `targets`.
    """
    divergences = [loss for loss in losses if isinstance(loss, Divergence)]
    gold_C = targets.gold_ids[rows]
    kept = _kept_ids(targets, rows, logits_CV.dtype) if divergences else None
    student = StudentChunk.of_(logits_CV, gold_C, kept)
    values, diagnostics, gradients = {}, {}, []
    for make_sets, linear in ((OutcomeSets.of_teachers, True), (OutcomeSets.of_union, False)):
        members = [loss for loss in divergences if loss.is_linear == linear]
        if not members:
            continue
        assert kept is not None
        sets = make_sets(targets, rows, kept, student)
        log_q_SCO, total_SCO = sets.outcomes.log_q_SCO, 0
        for loss in members:
            value_SC, gradient_SCO = loss.value_and_gradient(sets.outcomes)
            values[loss.name] = (sets.weights_SC * value_SC).sum(dim=0)
            total_SCO = total_SCO + loss.weight * sets.weights_SC[..., None] * gradient_SCO
            for name, figure_C in loss.diagnose(sets.outcomes).items():
                diagnostics[f"{loss.name}_{name}"] = figure_C
        if not linear:
            diagnostics[UNION_ERROR_BOUND] = sets.union_error_C
        gradients.append((log_q_SCO, total_SCO))
    values |= {"cross_entropy": -student.log_q_gold_C} | diagnostics
    if gradient:
        gold_weight = sum(loss.weight for loss in losses if isinstance(loss, CrossEntropy))
        _write_gradient_(student, gold_C, kept, gradients, gold_weight)
    return torch.stack([values[name] for name in figure_names(losses)])


def _kept_ids(targets: Targets, rows: slice, dtype: torch.dtype) -> KeptIds:
    """The kept ids of the teachers that have a weight."""
    absent_MC1 = targets.teacher_weights[:, rows, None] == 0
    logprobs_MCK = targets.logprobs[:, rows].to(dtype).masked_fill(absent_MC1, -torch.inf)
    return KeptIds.of(targets.token_ids[:, rows], logprobs_MCK)


def _write_gradient_(
    student: StudentChunk,
    gold_ids_C: Tensor,
    kept: KeptIds | None,
    gradients: list[tuple[Tensor, Tensor]],
    gold_weight: float,
) -> None:
    """Turns `student.rest_CV` into the gradient with respect to the logits.

    With g the gradients of `value_and_gradient`, G their sum over sets and outcomes less the weight
    of cross-entropy, and q_s the student's bucket of set s, logit i has the gradient

        sum over sets s of (g_si where s keeps i, else g_s,bucket q_i / q_s) - G q_i

    and the gold id has this gradient less the weight of cross-entropy. Kept ids are written and not
    corrected: where a bucket is almost empty for the student, g_s,bucket / q_s is large and would
    cancel.

    Args:
        gradients: the student's log-probabilities of the outcomes and the weighted sum of the
            losses' gradients, both [S, C, O]; a pair for each kind of sets.
        gold_weight: weight of cross-entropy.
    """
    total_C = torch.full_like(student.log_q_rest_C, -gold_weight)
    rest_C, at_kept_CU = torch.zeros_like(total_C), torch.zeros_like(student.log_q_CU)
    for log_q_SCO, gradient_SCO in gradients:
        total_C = total_C + gradient_SCO.sum(dim=(0, 2))
        tail_SC1, log_q_tail_SC1 = gradient_SCO[..., -1:], log_q_SCO[..., -1:]
        # no bucket, no gradient of it: any finite number will do
        log_q_tail_SC1 = torch.where(log_q_tail_SC1 > -torch.inf, log_q_tail_SC1, 0.0)
        kept_SCU = log_q_SCO[..., :-1] > -torch.inf
        shared_SCU = tail_SC1 * (student.log_q_CU - log_q_tail_SC1).exp()
        at_kept_CU += torch.where(kept_SCU, gradient_SCO[..., :-1], shared_SCU).sum(dim=0)
        share_SC = (student.log_q_rest_C - log_q_tail_SC1.squeeze(-1)).exp()
        rest_C += (tail_SC1.squeeze(-1) * share_SC).sum(dim=0)
    rest_C -= total_C * student.log_q_rest_C.exp()
    factor_C = torch.where(student.rest_sum_C > 0, rest_C / student.rest_sum_C, 0.0)
    grad_CV = student.rest_CV.mul_(factor_C[:, None])
    if kept is not None:
        at_kept_CU -= total_C[:, None] * student.log_q_CU.exp()
        at_first_C1 = at_kept_CU.gather(1, kept.first_C1)
        at_kept_CU = torch.where(kept.used_CU, at_kept_CU, at_first_C1)
        untouched_CU = grad_CV.gather(1, kept.ids_CU)
        written_CU = torch.where(kept.any_C1, at_kept_CU, untouched_CU)
        grad_CV.scatter_(1, kept.ids_CU, written_CU)
    if gold_weight:
        grad_CV.scatter_add_(
            1, gold_ids_C[:, None], torch.full_like(factor_C, -gold_weight)[:, None]
        )
