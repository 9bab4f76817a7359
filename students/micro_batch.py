"""A packed micro-batch as tensors: what the student's forward takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from students.outcomes import Targets
from students.packing import PackedBatch


@dataclass(frozen=True)
class MicroBatch:
    """Several sequences: packed into one row, or each in a row that is padded behind it.

    Attributes:
        input_ids: int64[R, T].
        position_ids: int64[1, T] of a packed row, from 0 again with each sequence; None for padded
            rows. A causal model needs no mask for padding that lies behind.
        logit_indices: int64[P], into the rows one after another.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    logit_indices: torch.Tensor
    targets: Targets

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
        )
