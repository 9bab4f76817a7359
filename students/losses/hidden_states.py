"""Losses on hidden states: the student's against a teacher's, and relations among them.

Every loss gives a value at each position, so that it sums over micro-batches and ranks as the other
losses do: that of a sequence, or of a group of sequences, stands at all its positions. Where a
teacher has no states it is 0. Groups are runs of a step's batch, so no value depends on packing or
on the number of workers.

Legend: P positions, S sequences, G sequences of one group, N positions of one sequence, H student's
hidden size, D teacher's stored dimensions, E losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize, smooth_l1_loss

from pipeline.config.losses import HiddenState, Loss, StateLoss
from students.losses.inputs import HiddenStatesBatch

SMALLEST = 1e-12
"""Lengths below it count as this much, so that equal states give no division by 0."""


@dataclass(frozen=True)
class HiddenStatesTerm:
    """One loss of the list.

    Attributes:
        name: under which its values are logged.
        kind: a key of `OF_POSITIONS`, `OF_SEQUENCES` or `OF_GROUPS`.
        weight: its factor in the total.
        pairs: index of the teacher's layer among the stored ones, and the student's layer.
        is_projected: whether the student's states pass through a learned matrix.
    """

    name: str
    kind: str
    weight: float
    teacher: str
    pairs: tuple[tuple[int, int], ...]
    is_projected: bool


def hidden_states_terms(
    losses: Sequence[Loss], stored_layers: Mapping[str, tuple[int, ...]]
) -> tuple[HiddenStatesTerm, ...]:
    """Those of a training's losses that are on hidden states.

    Args:
        stored_layers: by teacher.
    """
    return tuple(
        HiddenStatesTerm(
            loss.name,
            loss.measure if isinstance(loss, HiddenState) else loss.relation,
            loss.weight,
            loss.teacher,
            tuple((stored_layers[loss.teacher].index(t), s) for t, s in loss.layers.items()),
            isinstance(loss, HiddenState) and loss.projection == "learned",
        )
        for loss in losses
        if isinstance(loss, StateLoss)
    )


def mse(student_PD: Tensor, teacher_PD: Tensor) -> Tensor:
    """[P]: mean over dimensions of the squared difference (FitNets, arXiv 1412.6550)."""
    return (student_PD - teacher_PD).square().mean(dim=-1)


def cosine(student_PD: Tensor, teacher_PD: Tensor) -> Tensor:
    """[P]: 1 - cosine of the angle between both (DistilBERT, arXiv 1910.01108)."""
    return 1 - cosine_similarity(student_PD, teacher_PD, dim=-1)


def token_similarity(student_NH: Tensor, teacher_ND: Tensor) -> Tensor:
    """Mean over pairs of tokens of the squared difference of their cosines; 0 for a single token.

    Similarity-preserving distillation (arXiv 1907.09682) with the tokens of a sequence in the place
    of the samples of a batch.
    """
    num_pairs = max(len(student_NH) * (len(student_NH) - 1), 1)
    cosines = [states @ states.T for states in map(_unit, (student_NH, teacher_ND))]
    return (cosines[0] - cosines[1]).square().fill_diagonal_(0).sum() / num_pairs


def distance(student_GH: Tensor, teacher_GD: Tensor) -> Tensor:
    """RKD-D (arXiv 1904.05068): Huber loss of the distances of all pairs, each side divided by its
    mean distance; mean over pairs.
    """
    first, second = torch.triu_indices(len(student_GH), len(student_GH), 1)
    lengths = [(x[first] - x[second]).norm(dim=-1) for x in (student_GH, teacher_GD)]
    student, teacher = (each / each.mean().clamp_min(SMALLEST) for each in lengths)
    return smooth_l1_loss(student, teacher)


def angle(student_GH: Tensor, teacher_GD: Tensor) -> Tensor:
    """RKD-A (arXiv 1904.05068): Huber loss of the cosines of the angles that each sequence sees
    between two others; mean over these triples.
    """
    corner, one, other = torch.combinations(torch.arange(len(student_GH)), 3).T
    triples = [
        torch.cat([corner, one, other]),  # each of the three at the corner once
        torch.cat([one, corner, corner]),
        torch.cat([other, other, one]),
    ]
    student, teacher = (
        (_unit(x[triples[1]] - x[triples[0]]) * _unit(x[triples[2]] - x[triples[0]])).sum(dim=-1)
        for x in (student_GH, teacher_GD)
    )
    return smooth_l1_loss(student, teacher)


OF_POSITIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": mse, "cosine": cosine}
OF_SEQUENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"token_similarity": token_similarity}
OF_GROUPS = {"distance": (2, distance), "angle": (3, angle)}
"""With the least number of sequences; smaller groups weigh nothing."""


class HiddenStatesLosses(nn.Module):
    """All losses on hidden states, with the matrices that they learn; those are trained along and
    not exported.
    """

    def __init__(
        self,
        terms: tuple[HiddenStatesTerm, ...],
        hidden_size: int,
        widths: Mapping[str, int],
        seed: int,
    ) -> None:
        """The matrices depend on the seed alone, not on the rank.

        Args:
            hidden_size: H.
            widths: by teacher, D.
        """
        super().__init__()
        self.terms = terms
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.projections = nn.ModuleList(
                nn.Linear(hidden_size, widths[term.teacher], bias=False)
                for term in terms
                if term.is_projected
                for _ in term.pairs
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The student's layers that are looked at, in ascending order."""
        return tuple(sorted({layer for term in self.terms for _, layer in term.pairs}))

    def forward(self, student: Mapping[int, Tensor], batch: HiddenStatesBatch) -> Tensor:
        """[E, P]: the value of every loss at every position, without its weight.

        Args:
            student: by layer, [P, H] in the order of the batch.
        """
        projections, values = iter(self.projections), []
        for term in self.terms:
            of_pairs = []
            for stored, layer in term.pairs:
                states_PH = student[layer]
                if term.is_projected:
                    projection = next(projections)
                    states_PH = projection(states_PH.to(projection.weight.dtype))
                dtype = torch.promote_types(states_PH.dtype, torch.float32)
                teacher_PD = batch.states[term.teacher][:, stored].to(dtype)
                of_pairs.append(_values(term, states_PH.to(dtype), teacher_PD, batch))
            values.append(torch.stack(of_pairs).mean(dim=0))
        return torch.stack(values)


def _values(
    term: HiddenStatesTerm, student_PH: Tensor, teacher_PD: Tensor, batch: HiddenStatesBatch
) -> Tensor:
    """[P]: one loss on one pair of layers."""
    covered_P = batch.covered[term.teacher]
    if term.kind in OF_POSITIONS:
        return OF_POSITIONS[term.kind](student_PH, teacher_PD) * covered_P
    values_P = student_PH.new_zeros(len(student_PH))
    if not len(values_P):
        return values_P
    places = torch.arange(len(values_P), device=values_P.device).split(batch.lengths)
    kept = [s for s in batch.sequences[term.teacher] if batch.lengths[s]]
    if term.kind in OF_SEQUENCES:
        for s in kept:
            rows = places[s]
            value = OF_SEQUENCES[term.kind](student_PH[rows], teacher_PD[rows])
            values_P = values_P.index_put((rows,), value)
        return values_P
    least, of_group = OF_GROUPS[term.kind]
    groups: dict[int, list[int]] = {}
    for s in kept:
        groups.setdefault(batch.groups[s], []).append(s)
    for members in groups.values():
        if len(members) >= least:
            means = [
                torch.stack([states[places[s]].mean(dim=0) for s in members])
                for states in (student_PH, teacher_PD)
            ]
            rows = torch.cat([places[s] for s in members])
            values_P = values_P.index_put((rows,), of_group(*means))
    return values_P


def _unit(states: Tensor) -> Tensor:
    return normalize(states, dim=-1, eps=SMALLEST)
