"""The training loop of `benchmarks/quality.py`, for teachers and students alike: plain torch around
the product's module, losses and batches.

Legend: P positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.records import CombinedTargets, TokenSequence
from students.architecture.body import body_hidden_states
from students.architecture.head import lm_head_of
from students.data.examples import Example, example_of
from students.data.packing import pack, plan_micro_batches
from students.losses.divergences import CrossEntropy, ForwardKL
from students.micro_batch import MicroBatch
from students.model import StudentModule

CROSS_ENTROPY = (CrossEntropy(name="cross_entropy", weight=1.0),)
FORWARD_KL = (ForwardKL(name="forward_kl", weight=1.0),)
WARMUP_SHARE = 0.05
POOLED_GROUPS = 8
"""Sequences of so many groups are sorted by length before they are grouped, to pad less."""
TOKENS_AT_ONCE = 4096

Step = list[tuple[str, MicroBatch]]
"""Of each domain a micro-batch."""


def text_alone(sequence: TokenSequence) -> Example:
    """A sequence without teachers."""
    return example_of(CombinedTargets(sequence, (), np.zeros((0, sequence.num_positions))))


def steps(
    examples: Mapping[str, Sequence[Example]], group: int, seed: int
) -> Iterator[tuple[int, Step]]:
    """For ever: positions of a step, and `group` sequences of each domain, epoch after epoch."""
    endless = {
        domain: _groups(members, group, np.random.default_rng([seed, place]))
        for place, (domain, members) in enumerate(sorted(examples.items()))
    }
    while True:
        chosen = {domain: next(groups) for domain, groups in endless.items()}
        yield (
            sum(len(example.gold_ids) for members in chosen.values() for example in members),
            [(domain, micro_batch(members)) for domain, members in chosen.items()],
        )


def micro_batch(examples: Sequence[Example]) -> MicroBatch:
    """In padded rows: attention over a long packed row would cost these small models most."""
    return MicroBatch.of(pack(examples, padded=True))


def _groups(
    members: Sequence[Example], size: int, generator: np.random.Generator
) -> Iterator[list[Example]]:
    while True:
        order, groups = generator.permutation(len(members)), []
        for start in range(0, len(order), size * POOLED_GROUPS):
            pool = order[start : start + size * POOLED_GROUPS]
            pool = sorted(pool, key=lambda i: len(members[i].input_ids))
            groups += [pool[i : i + size] for i in range(0, len(pool), size)]
        for place in generator.permutation(len(groups)):
            yield [members[i] for i in groups[place]]


def train(
    module: StudentModule,
    batches: Iterator[tuple[int, Step]],
    loss_of: Callable[[str, MicroBatch], Tensor],
    budget: int,
    learning_rate: float,
) -> float:
    """Trains until `budget` positions are spent; the learning rate follows the positions.

    Args:
        loss_of: the sum of a micro-batch's losses, by its domain.

    Returns:
        The mean loss of the last tenth.
    """
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    module.train()
    done, last = 0, [0.0, 0]
    for positions, step in batches:
        if done >= budget:
            break
        share = done / budget
        warm = min(1.0, (done + positions) / budget / WARMUP_SHARE)
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate * warm * 0.5 * (1 + math.cos(math.pi * share))
        value = 0.0
        for domain, batch in step:
            loss = loss_of(domain, batch)
            (loss / positions).backward()
            value += loss.item()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += positions
        if share >= 0.9 or done >= budget:
            last = [last[0] + value, last[1] + positions]
    return last[0] / last[1]


def dense_kl(student: PreTrainedModel, teacher: PreTrainedModel, batch: MicroBatch) -> Tensor:
    """The sum over positions of KL(teacher || student) on the whole vocabulary, by torch alone."""
    with torch.no_grad():
        teacher_PV = torch.log_softmax(_logits(teacher, batch), dim=-1)
    student_PV = torch.log_softmax(_logits(student, batch), dim=-1)
    return torch.nn.functional.kl_div(student_PV, teacher_PV, log_target=True, reduction="sum")


@torch.no_grad()
def text_loss(model: PreTrainedModel, sequences: Sequence[TokenSequence]) -> float:
    """Mean cross-entropy with the text, in nats per position."""
    module = StudentModule(model, CROSS_ENTROPY).eval()
    total, positions = 0.0, 0
    for members in together(sequences):
        figures_FP, _ = module(micro_batch([text_alone(sequences[i]) for i in members]))
        total += float(figures_FP[0].double().sum())
        positions += figures_FP.shape[1]
    return total / positions


@torch.no_grad()
def logprobs_of(
    model: PreTrainedModel, sequences: Sequence[TokenSequence]
) -> Iterator[tuple[int, Tensor]]:
    """Place of each sequence and the model's log-probabilities, float32[P, V], in any order."""
    for members in together(sequences):
        chosen = [sequences[i] for i in members]
        logits_PV = _logits(model, micro_batch([text_alone(each) for each in chosen]))
        sizes = [each.num_positions for each in chosen]
        found = torch.log_softmax(logits_PV.float(), dim=-1).split(sizes)
        yield from zip(members, found, strict=True)


def together(sequences: Sequence[TokenSequence]) -> list[list[int]]:
    """Places of the sequences that are computed at once."""
    lengths = [len(each.input_ids) for each in sequences]
    (groups,) = plan_micro_batches(lengths, TOKENS_AT_ONCE, 1, padded=True)
    return groups


def _logits(model: PreTrainedModel, batch: MicroBatch) -> Tensor:
    hidden_TH = body_hidden_states(model, batch.input_ids, batch.position_ids)
    return lm_head_of(model)(hidden_TH[batch.logit_indices])
