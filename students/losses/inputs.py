"""The inputs of losses beside the student's hidden states and LM head."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LogitStep:
    """The step from the outputs x of the LM head to the logits: `factor x`, or with a soft-cap
    `softcap tanh(factor x / softcap)`, as in Gemma 2 (arXiv 2408.00118).
    """

    factor: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Targets:
    """Tokens of the text and distributions of the teachers, against which positions are trained.

    Legend: P positions, M teachers, K kept ids.

    Attributes:
        gold_ids: int64[P].
        token_ids: int[M, P, K], kept ids of each teacher, no id twice in a position; any id where
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
    """The teachers' hidden states at the positions of a micro-batch, in their order. Facts about
    sequences stand in lists: reading them from a tensor would wait for the device.

    Legend: P positions of the micro-batch, L stored layers, D stored dimensions.

    Attributes:
        states: bfloat16[P, L, D] by teacher, at the indices whose logits are trained; 0 where the
            teacher has none.
        covered: bool[P] by teacher, whether it has hidden states at a position.
        sequences: numbers of the sequences that a teacher has hidden states of, by teacher.
        lengths: number of positions of every sequence.
        groups: group of every sequence; sequences of a group are compared with one another.
    """

    states: dict[str, Tensor]
    covered: dict[str, Tensor]
    sequences: dict[str, list[int]]
    lengths: list[int]
    groups: list[int]
