"""A packed micro-batch as tensors: what the student's forward takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from students.outcomes import Targets
from students.packing import PackedBatch


@dataclass(frozen=True)
class FeatureBatch:
    """What the losses on hidden states need of a micro-batch; its positions in the same order.

    Legend: P positions of the micro-batch, S its sequences, L stored layers, D stored dimensions.

    Attributes:
        states: by teacher, bfloat16[P, L, D] at the indices whose logits are trained; 0 where the
            teacher has none.
        covered: by teacher, bool[P]: where it has states.
        sequences: int64[P], number of the position's sequence in the micro-batch.
        groups: int64[S], of each sequence; sequences of a group are compared with one another.
    """

    states: dict[str, torch.Tensor]
    covered: dict[str, torch.Tensor]
    sequences: torch.Tensor
    groups: torch.Tensor


@dataclass(frozen=True)
class MicroBatch:
    """Several sequences: packed into one row, or each in a row that is padded behind it.

    Attributes:
        input_ids: int64[R, T].
        position_ids: int64[1, T] of a packed row, from 0 again with each sequence; None for padded
            rows. A causal model needs no mask for padding that lies behind.
        logit_indices: int64[P], into the rows one after another.
        features: the teachers' hidden states, where a loss needs them.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    logit_indices: torch.Tensor
    targets: Targets
    features: FeatureBatch | None = None

    @classmethod
    def of(cls, packed: PackedBatch, device: torch.device | str = "cpu") -> MicroBatch:
        """Shares its memory on the CPU."""

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
            features=None
            if packed.features is None
            else FeatureBatch(
                {
                    teacher: tensor(bits.view(np.int16)).view(torch.bfloat16)
                    for teacher, bits in packed.features.states.items()
                },
                {teacher: tensor(mask) for teacher, mask in packed.features.covered.items()},
                tensor(packed.features.sequences),
                tensor(packed.features.groups),
            ),
        )
