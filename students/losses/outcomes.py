"""Outcomes that divergences compare, from a chunk of logits and the cached targets.

The logits are exponentiated once, in their own memory; all else has the size of the kept ids.

Legend: C positions of one chunk, V vocabulary, M teachers, K entries, U = M K slots for the union
of the teachers' kept ids, O = U + 1 outcomes, S sets of outcomes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from students.losses.divergences import Outcomes
from students.losses.inputs import Targets

UNUSED = 2**40
"""Id of an unused slot while ids are sorted: above any token id."""


@dataclass(frozen=True)
class KeptIds:
    """The union of the teachers' kept ids in one chunk: in ascending order, or in the order of a
    single teacher.

    Attributes:
        ids_CU: int64; unused slots repeat the first used id, or hold 0 where no slot is used.
        used_CU: bool, whether a slot holds a kept id.
        first_C1: int64, the first used slot, or 0.
        any_C1: bool, whether any slot is used.
        logprobs_MCU: log-probabilities of each teacher on the union; -inf where it has not kept the
            id.
    """

    ids_CU: Tensor
    used_CU: Tensor
    first_C1: Tensor
    any_C1: Tensor
    logprobs_MCU: Tensor

    @classmethod
    def of(cls, token_ids_MCK: Tensor, logprobs_MCK: Tensor) -> KeptIds:
        """Sorts the ids of every position, so that the teachers' order does not matter; keeps the
        ids of a single teacher as they are.
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
        rest_sum_C: sums of `rest_CV`, 0 where the kept ids are the whole vocabulary.
        log_q_gold_C: log-probability of the gold ids.
        log_q_CU: log-probabilities of the kept ids, -inf in unused slots.
        log_q_rest_C: log-probability of all ids outside the union; from their own log-sum-exp,
            since 1 - sum q cancels.
    """

    rest_CV: Tensor
    rest_sum_C: Tensor
    log_q_gold_C: Tensor
    log_q_CU: Tensor
    log_q_rest_C: Tensor

    @classmethod
    def of_(cls, logits_CV: Tensor, gold_ids_C: Tensor, kept: KeptIds | None) -> StudentChunk:
        """Overwrites the logits; `kept` is None if no loss compares with the teachers."""
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
        union_error_C: bound of the mass that the sets misplace, see `of_union`.
    """

    outcomes: Outcomes
    weights_SC: Tensor
    union_error_C: Tensor

    @classmethod
    def of_teachers(
        cls, targets: Targets, rows: slice, kept: KeptIds, student: StudentChunk
    ) -> OutcomeSets:
        """One set for every teacher: its own kept ids and its own bucket. The bucket of a single
        teacher is all that lies outside the union.
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

        An id that only some teachers keep counts with their probabilities alone; the mass that the
        other teachers give to it lies in their tails and stays in the bucket. If several teachers
        have a weight, at most `sum_m w_m tail_m` of the mixture is misplaced in this way.
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
    """Puts the buckets last; a bucket without ids does not exist, and its tail is taken as 0."""
    log_tail_SC = torch.where(log_q_tail_SC > -torch.inf, tail_SC.log(), -torch.inf)
    return Outcomes(
        torch.cat([log_p_SCU, log_tail_SC[..., None]], dim=-1),
        torch.cat([log_q_SCU, log_q_tail_SC[..., None]], dim=-1),
    )
