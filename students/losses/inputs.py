"""The tensors that losses read beside the student's hidden states and LM head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """What the positions are trained against.

    Attributes:
        gold_ids: int64[P].
        token_ids: int[M, P, K], kept ids of each teacher, no id twice in a position; any where
            `logprobs` is -inf.
        logprobs: float[M, P, K], at temperature 1, normalised over the full vocabulary; -inf marks
            padding.
        tail_mass: float[M, P], probability outside the kept ids.
        teacher_weights: float[M, P]; a teacher of weight 0 does not count at that position.
    """

    gold_ids: Tensor
    token_ids: Tensor
    logprobs: Tensor
    tail_mass: Tensor
    teacher_weights: Tensor


@dataclass(frozen=True)
class HiddenStatesBatch:
    """What the losses on hidden states need of a micro-batch; its positions in the same order. What
    is asked of sequences stands in lists: to ask a tensor would wait for the device.

    Legend: P positions of the micro-batch, L stored layers, D stored dimensions.

    Attributes:
        states: by teacher, bfloat16[P, L, D] at the indices whose logits are trained; 0 where the
            teacher has none.
        covered: by teacher, bool[P]: where it has states.
        sequences: by teacher, the sequences that it has states of, by their number.
        lengths: of every sequence, its positions.
        groups: of every sequence; sequences of a group are compared with one another.
    """

    states: dict[str, torch.Tensor]
    covered: dict[str, torch.Tensor]
    sequences: dict[str, list[int]]
    lengths: list[int]
    groups: list[int]
