"""From a chunk of logits and the cached targets to outcomes, and from their gradient back to the
logits, in place.

All ids that no teacher keeps have gradients proportional to their probabilities, whatever the
losses and however many the teachers. So the chunk of logits is exponentiated once, scaled once by
a factor per position, and overwritten at the kept ids; all else has the size of the kept ids.

Legend: P positions, C positions of one chunk, V vocabulary, M teachers, K entries, U = M K slots
for the union of the teachers' kept ids, O = U + 1 outcomes, S sets of outcomes, L losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from students.losses.divergences import LossTerm, Outcomes, value_and_gradient
from students.losses.inputs import Targets

UNUSED = 2**40
"""Above any token id."""
UNION_ERROR_BOUND = "union_error_bound"


@dataclass(frozen=True)
class KeptIds:
    """The union of the teachers' kept ids in one chunk: in ascending order, or as one teacher has
    them.

    Attributes:
        ids_CU: int64; unused slots repeat the first used id, or hold 0 where there is none.
        used_CU: bool.
        first_C1: int64, the first used slot, or 0.
        any_C1: bool, whether there is one.
        logprobs_MCU: of each teacher on the union; -inf where it has not kept the id.
    """

    ids_CU: Tensor
    used_CU: Tensor
    first_C1: Tensor
    any_C1: Tensor
    logprobs_MCU: Tensor

    @classmethod
    def of(cls, token_ids_MCK: Tensor, logprobs_MCK: Tensor) -> KeptIds:
        """By a sort of every position's ids, so that the teachers' order does not matter; of one
        teacher as they are.
        """
        if len(token_ids_MCK) == 1:
            return cls._of_one(token_ids_MCK[0].long(), logprobs_MCK)
        num_teachers, num_positions, num_entries = token_ids_MCK.shape
        padded_MCK = token_ids_MCK.long().masked_fill_(logprobs_MCK == -torch.inf, UNUSED)
        sorted_CU, order_CU = padded_MCK.movedim(0, 1).flatten(1).sort(dim=1, stable=True)
        starts_CU = torch.zeros_like(sorted_CU)
        starts_CU[:, 1:] = sorted_CU[:, 1:] != sorted_CU[:, :-1]
        slots_CU = starts_CU.cumsum(dim=1)
        ids_CU = torch.full_like(sorted_CU, UNUSED).scatter_(1, slots_CU, sorted_CU)
        used_CU = ids_CU != UNUSED
        first_C1 = torch.where(used_CU[:, :1], ids_CU[:, :1], 0)
        slots_MCK = (
            torch.empty_like(slots_CU)
            .scatter_(1, order_CU, slots_CU)
            .view(num_positions, num_teachers, num_entries)
            .movedim(1, 0)
        )
        logprobs_MCU = logprobs_MCK.new_full((num_teachers, *ids_CU.shape), -torch.inf)
        logprobs_MCU.scatter_(2, slots_MCK, logprobs_MCK)
        return cls(
            torch.where(used_CU, ids_CU, first_C1),
            used_CU,
            torch.zeros_like(first_C1),
            used_CU[:, :1],
            logprobs_MCU,
        )

    @classmethod
    def _of_one(cls, token_ids_CK: Tensor, logprobs_1CK: Tensor) -> KeptIds:
        used_CK = logprobs_1CK[0] > -torch.inf
        first_C1 = used_CK.byte().argmax(dim=1, keepdim=True)
        any_C1 = used_CK.gather(1, first_C1)
        first_id_C1 = torch.where(any_C1, token_ids_CK.gather(1, first_C1), 0)
        ids_CK = torch.where(used_CK, token_ids_CK, first_id_C1)
        return cls(ids_CK, used_CK, first_C1, any_C1, logprobs_1CK)


@dataclass(frozen=True)
class StudentChunk:
    """The student's side of one chunk; `rest_CV` uses the memory of the logits.

    Attributes:
        rest_CV: exp(logit - highest logit outside the kept ids), and 0 at the kept ids.
        rest_sum_C: its sums, 0 where the kept ids are the whole vocabulary.
        log_q_gold_C: log-probability of the gold ids.
        log_q_CU: of the kept ids, -inf in unused slots.
        log_q_rest_C: of all ids outside the union; from their own log-sum-exp, since 1 - sum q
            cancels.
    """

    rest_CV: Tensor
    rest_sum_C: Tensor
    log_q_gold_C: Tensor
    log_q_CU: Tensor
    log_q_rest_C: Tensor

    @classmethod
    def of_(cls, logits_CV: Tensor, gold_ids_C: Tensor, kept: KeptIds | None) -> StudentChunk:
        gold_C = logits_CV.gather(1, gold_ids_C[:, None]).squeeze(1)
        kept_CU = gold_C.new_zeros((len(gold_C), 0))
        if kept is not None:
            kept_CU = logits_CV.gather(1, kept.ids_CU)
            logits_CV.scatter_(1, kept.ids_CU, torch.where(kept.any_C1, -torch.inf, kept_CU))
            kept_CU = torch.where(kept.used_CU, kept_CU, -torch.inf)
        highest_C = logits_CV.amax(dim=1)
        shift_C = torch.where(highest_C > -torch.inf, highest_C, 0.0)
        rest_CV = logits_CV.sub_(shift_C[:, None]).exp_()
        rest_sum_C = rest_CV.sum(dim=1)
        lse_rest_C = shift_C + rest_sum_C.log()
        lse_C = torch.cat([kept_CU, lse_rest_C[:, None]], dim=1).logsumexp(dim=1)
        log_q_CU = kept_CU - lse_C[:, None]
        return cls(rest_CV, rest_sum_C, gold_C - lse_C, log_q_CU, lse_rest_C - lse_C)


@dataclass(frozen=True)
class OutcomeSets:
    """Sets of outcomes on the slots of one union: each keeps some of its ids and puts the others
    into its bucket.

    Attributes:
        weights_SC: factor of a set in the losses that use it.
        union_error_C: bound of what the sets misplace, see `of_union`.
    """

    outcomes: Outcomes
    weights_SC: Tensor
    union_error_C: Tensor

    @classmethod
    def of_teachers(
        cls, targets: Targets, rows: slice, kept: KeptIds, student: StudentChunk
    ) -> OutcomeSets:
        """One set for every teacher: its own kept ids and its own bucket. That of a single teacher
        is all that lies outside the union.
        """
        dtype = student.log_q_CU.dtype
        if len(kept.logprobs_MCU) == 1:
            log_q_MCU, log_q_tail_MC = student.log_q_CU[None], student.log_q_rest_C[None]
        else:
            is_kept_MCU = kept.logprobs_MCU > -torch.inf
            others_MCU = torch.where(is_kept_MCU, -torch.inf, student.log_q_CU)
            rest_MC1 = student.log_q_rest_C.expand(len(others_MCU), -1)[..., None]
            log_q_tail_MC = torch.cat([others_MCU, rest_MC1], dim=-1).logsumexp(dim=-1)
            log_q_MCU = torch.where(is_kept_MCU, student.log_q_CU, -torch.inf)
        tail_MC = targets.tail_mass[:, rows].to(dtype)
        outcomes = _outcomes(kept.logprobs_MCU, tail_MC, log_q_MCU, log_q_tail_MC)
        weights_MC = targets.teacher_weights[:, rows].to(dtype)
        return cls(outcomes, weights_MC, torch.zeros_like(student.log_q_rest_C))

    @classmethod
    def of_union(
        cls, targets: Targets, rows: slice, kept: KeptIds, student: StudentChunk
    ) -> OutcomeSets:
        """One set: the mixture of the teachers on the union of their kept ids.

        An id that only some teachers keep counts with their probabilities alone; what the others
        give to it lies in their tails and stays in the bucket. Where several teachers have a
        weight, at most `sum_m w_m tail_m` of the mixture is misplaced so.
        """
        weights_MC = targets.teacher_weights[:, rows].to(student.log_q_CU.dtype)
        tail_C = (weights_MC * targets.tail_mass[:, rows]).sum(dim=0)
        mixture_CU = (kept.logprobs_MCU + weights_MC.log()[..., None]).logsumexp(dim=0)
        outcomes = _outcomes(
            mixture_CU[None], tail_C[None], student.log_q_CU[None], student.log_q_rest_C[None]
        )
        several_C = (weights_MC > 0).sum(dim=0) > 1
        return cls(outcomes, torch.ones_like(tail_C)[None], torch.where(several_C, tail_C, 0.0))


def _outcomes(
    log_p_SCU: Tensor, tail_SC: Tensor, log_q_SCU: Tensor, log_q_tail_SC: Tensor
) -> Outcomes:
    """Puts the buckets last; one without ids does not exist, and its tail is taken as 0."""
    log_tail_SC = torch.where(log_q_tail_SC > -torch.inf, tail_SC.log(), -torch.inf)
    return Outcomes(
        torch.cat([log_p_SCU, log_tail_SC[..., None]], dim=-1),
        torch.cat([log_q_SCU, log_q_tail_SC[..., None]], dim=-1),
    )


def figure_names(terms: Sequence[LossTerm]) -> tuple[str, ...]:
    """Names of what `losses_and_gradient_` measures of every position: cross-entropy first, listed
    or not; then every other loss of the list; then what its approximations need to be judged.

    `union_error_bound` is the bound of the mass that `OutcomeSets.of_union` misplaces;
    `<reverse_kl>_floored` is 1 where the target's bucket was raised to `min_tail`.
    """
    named = [term for term in terms if term.uses_teachers]
    floored = [f"{term.name}_floored" for term in named if term.type == "reverse_kl"]
    union = [UNION_ERROR_BOUND] if any(not term.is_linear for term in named) else []
    return ("cross_entropy", *(term.name for term in named), *union, *floored)


def losses_and_gradient_(
    logits_CV: Tensor, targets: Targets, rows: slice, terms: Sequence[LossTerm], *, gradient: bool
) -> Tensor:
    """The figures of every position of a chunk, [F, C] in the order of `figure_names`.

    Overwrites the logits: with the gradient of the sum of all weighted losses if `gradient`, and
    otherwise with nothing of use.
    """
    named = [term for term in terms if term.uses_teachers]
    gold_C = targets.gold_ids[rows]
    kept = None
    if named:
        logprobs_MCK = targets.logprobs[:, rows].to(logits_CV.dtype)
        absent_MC1 = targets.teacher_weights[:, rows, None] == 0
        kept = KeptIds.of(
            targets.token_ids[:, rows], logprobs_MCK.masked_fill(absent_MC1, -torch.inf)
        )
    student = StudentChunk.of_(logits_CV, gold_C, kept)
    values, extra, gradients = {}, {}, []
    for make_sets, linear in ((OutcomeSets.of_teachers, True), (OutcomeSets.of_union, False)):
        members = [term for term in named if term.is_linear == linear]
        if not members:
            continue
        assert kept is not None
        sets = make_sets(targets, rows, kept, student)
        log_q_SCO, total_SCO = sets.outcomes.log_q_SCO, 0
        for term in members:
            value_SC, gradient_SCO = value_and_gradient(term, sets.outcomes)
            values[term.name] = (sets.weights_SC * value_SC).sum(dim=0)
            total_SCO = total_SCO + term.weight * sets.weights_SC[..., None] * gradient_SCO
            if term.type == "reverse_kl":
                extra[f"{term.name}_floored"] = _is_floored(sets.outcomes, term.min_tail)
        if not linear:
            extra[UNION_ERROR_BOUND] = sets.union_error_C
        gradients.append((log_q_SCO, total_SCO))
    values |= {"cross_entropy": -student.log_q_gold_C} | extra
    if gradient:
        gold_weight = sum(term.weight for term in terms if not term.uses_teachers)
        _write_gradient_(student, gold_C, kept, gradients, gold_weight)
    return torch.stack([values[name] for name in figure_names(terms)])


def _is_floored(outcomes: Outcomes, min_tail: float) -> Tensor:
    tail_C = outcomes.log_p_SCO[0, :, -1].exp()
    exists_C = outcomes.log_q_SCO[0, :, -1] > -torch.inf
    return (exists_C & (tail_C < min_tail)).to(tail_C.dtype)


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

    and the gold id the weight of cross-entropy less. Kept ids are written and not corrected: where
    a bucket is almost empty for the student, g_s,bucket / q_s is large and would cancel.
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
