"""A packed micro-batch as tensors: the input of the student's forward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from students.data.hidden_states import PackedHiddenStates
from students.data.packing import PackedBatch
from students.losses.inputs import HiddenStatesBatch, Targets


@dataclass(frozen=True)
class MicroBatch:
    """Several sequences: packed into one row, or each in a row that is padded behind it.

    Attributes:
        input_ids: int64[R, T].
        position_ids: int64[1, T] of a packed row, from 0 again with each sequence; None for padded
            rows. A causal model needs no mask for padding that lies behind.
        logit_indices: int64[P], into the rows one after another.
        targets: tokens of the text and distributions of the teachers.
        hidden_states: the teachers' hidden states, if a loss needs them.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    logit_indices: torch.Tensor
    targets: Targets
    hidden_states: HiddenStatesBatch | None = None

    @classmethod
    def of(cls, packed: PackedBatch, device: torch.device | str = "cpu") -> MicroBatch:
        """The tensors of a packed batch; on the CPU they share the arrays' memory."""

        def tensor(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        return cls(
            input_ids=tensor(packed.input_ids),
            position_ids=None if packed.position_ids is None else tensor(packed.position_ids),
            logit_indices=tensor(packed.logit_indices),
            targets=Targets(
                gold_ids=tensor(packed.gold_ids),
                token_ids=tensor(packed.token_ids),
                logprobs=tensor(packed.logprobs),
                tail_mass=tensor(packed.tail_mass),
                teacher_weights=tensor(packed.teacher_weights),
            ),
            hidden_states=None
            if packed.hidden_states is None
            else hidden_states_batch(packed.hidden_states, device),
        )


def hidden_states_batch(
    packed: PackedHiddenStates, device: torch.device | str = "cpu"
) -> HiddenStatesBatch:
    """The teachers' hidden states as tensors; on the CPU they share the arrays' memory."""
    states = {
        teacher: torch.from_numpy(bits.view(np.int16)).to(device, non_blocking=True)
        for teacher, bits in packed.states.items()
    }
    masks = {
        teacher: torch.from_numpy(np.repeat(np.array(covered, bool), packed.lengths))
        for teacher, covered in packed.covered.items()
    }
    return HiddenStatesBatch(
        states={teacher: bits.view(torch.bfloat16) for teacher, bits in states.items()},
        covered={teacher: mask.to(device, non_blocking=True) for teacher, mask in masks.items()},
        sequences={
            teacher: [s for s, is_covered in enumerate(covered) if is_covered]
            for teacher, covered in packed.covered.items()
        },
        lengths=packed.lengths,
        groups=packed.groups,
    )
