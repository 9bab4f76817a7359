"""Losses on hidden states: the student's against a teacher's, and relations among them.

Every loss gives a value at each position, so that it sums over micro-batches and ranks as the other
losses do: the value of a sequence, or of a group of sequences, stands at all its positions. It is 0
where the teacher has no states. Groups are runs of a step's batch, so no value depends on packing
or on the number of workers.

A new loss needs a class here, a line in `LAYER_LOSSES`, and a model in `pipeline/config/losses.py`
whose fields have the same names; nothing else.

Legend: P positions, S sequences, G sequences of one group, N positions of one sequence, H student's
hidden size, D teacher's stored dimensions, E losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize, smooth_l1_loss

from students.losses.inputs import HiddenStatesBatch

SMALLEST = 1e-12
"""Lengths below it count as this much, so that equal states give no division by 0."""


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
    distances = [(x[first] - x[second]).norm(dim=-1) for x in (student_GH, teacher_GD)]
    student, teacher = (side / side.mean().clamp_min(SMALLEST) for side in distances)
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


MEASURES = {"mse": mse, "cosine": cosine}
GROUP_RELATIONS = {"distance": (2, distance), "angle": (3, angle)}
"""Least number of sequences of a group, and the relation; smaller groups weigh nothing."""


@dataclass(frozen=True, kw_only=True)
class LayerLoss(ABC):
    """A loss on pairs of a teacher's and a student's layer: the mean over these pairs.

    Attributes:
        name: name under which its values are logged.
        weight: factor in the total.
        teacher: name of the teacher.
        pairs: index of the teacher's layer among the stored layers, and the student's layer.
    """

    name: str
    weight: float
    teacher: str
    pairs: tuple[tuple[int, int], ...]

    @property
    def is_projected(self) -> bool:
        """Whether the student's states pass through a learned matrix."""
        return False

    @abstractmethod
    def values(self, student_PH: Tensor, teacher_PD: Tensor, batch: HiddenStatesBatch) -> Tensor:
        """[P]: the loss on one pair of layers, without its weight."""


@dataclass(frozen=True, kw_only=True)
class HiddenState(LayerLoss):
    """Distance of the student's hidden state from the teacher's at every position.

    Attributes:
        measure: a key of `MEASURES`.
        projection: `learned` if the student's states pass through a matrix that is trained along.
    """

    measure: Literal["mse", "cosine"]
    projection: Literal["learned", "none"]

    @property
    def is_projected(self) -> bool:
        """Whether the student's states pass through a learned matrix."""
        return self.projection == "learned"

    def values(self, student_PH: Tensor, teacher_PD: Tensor, batch: HiddenStatesBatch) -> Tensor:
        """See `LayerLoss`."""
        return MEASURES[self.measure](student_PH, teacher_PD) * batch.covered[self.teacher]


@dataclass(frozen=True, kw_only=True)
class Relation(LayerLoss):
    """Distance of relations: between the tokens of a sequence, or the sequences of a group.

    Attributes:
        relation: `token_similarity`, or a key of `GROUP_RELATIONS`.
        sequences: size of a group; the batches are cut into groups where they are packed.
    """

    relation: Literal["distance", "angle", "token_similarity"]
    sequences: int | None = None

    def values(self, student_PH: Tensor, teacher_PD: Tensor, batch: HiddenStatesBatch) -> Tensor:
        """See `LayerLoss`."""
        values_P = student_PH.new_zeros(len(student_PH))
        for rows, value in self._values_of_rows(student_PH, teacher_PD, batch):
            values_P = values_P.index_put((rows,), value)
        return values_P

    def _values_of_rows(
        self, student_PH: Tensor, teacher_PD: Tensor, batch: HiddenStatesBatch
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Positions of each sequence or group, and its value."""
        if not len(student_PH):
            return
        places = torch.arange(len(student_PH), device=student_PH.device).split(batch.lengths)
        kept = [s for s in batch.sequences[self.teacher] if batch.lengths[s]]
        if self.relation == "token_similarity":
            for s in kept:
                yield places[s], token_similarity(student_PH[places[s]], teacher_PD[places[s]])
            return
        least, relation = GROUP_RELATIONS[self.relation]
        groups: dict[int, list[int]] = {}
        for s in kept:
            groups.setdefault(batch.groups[s], []).append(s)
        for members in groups.values():
            if len(members) >= least:
                means = [
                    torch.stack([states[places[s]].mean(dim=0) for s in members])
                    for states in (student_PH, teacher_PD)
                ]
                yield torch.cat([places[s] for s in members]), relation(*means)


LAYER_LOSSES: dict[str, type[LayerLoss]] = {"hidden_state": HiddenState, "relation": Relation}
"""The class of each `type` in the config."""


def layer_loss_from_config(
    name: str, settings: Mapping[str, Any], stored_layers: Sequence[int]
) -> LayerLoss:
    """The parameter object of a loss on hidden states in the config.

    Args:
        name: name under which its values are logged.
        settings: the config's fields of the loss: `type`, `layers` and the parameters.
        stored_layers: the teacher's layers in the order in which they are stored.
    """
    parameters = dict(settings)
    loss, layers = LAYER_LOSSES[parameters.pop("type")], parameters.pop("layers")
    pairs = tuple((stored_layers.index(teacher), student) for teacher, student in layers.items())
    return loss(name=name, pairs=pairs, **parameters)


class HiddenStatesLosses(nn.Module):
    """The losses on hidden states, with the matrices that they learn: these are trained along with
    the student and not exported.
    """

    def __init__(
        self,
        losses: tuple[LayerLoss, ...],
        hidden_size: int,
        widths: Mapping[str, int],
        seed: int,
    ) -> None:
        """The matrices depend on the seed alone, not on the rank.

        Args:
            hidden_size: H.
            widths: D by teacher.
        """
        super().__init__()
        self.losses = losses
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.projections = nn.ModuleList(
                nn.Linear(hidden_size, widths[loss.teacher], bias=False)
                for loss in losses
                if loss.is_projected
                for _ in loss.pairs
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The student's layers that the losses read, in ascending order."""
        return tuple(sorted({layer for loss in self.losses for _, layer in loss.pairs}))

    def forward(self, student: Mapping[int, Tensor], batch: HiddenStatesBatch) -> Tensor:
        """[E, P]: the value of every loss at every position, without its weight.

        Args:
            student: [P, H] by layer, in the order of the batch.
        """
        projections, values = iter(self.projections), []
        for loss in self.losses:
            of_pairs = []
            for stored, layer in loss.pairs:
                states_PH = student[layer]
                if loss.is_projected:
                    projection = next(projections)
                    states_PH = projection(states_PH.to(projection.weight.dtype))
                dtype = torch.promote_types(states_PH.dtype, torch.float32)
                teacher_PD = batch.states[loss.teacher][:, stored].to(dtype)
                of_pairs.append(loss.values(states_PH.to(dtype), teacher_PD, batch))
            values.append(torch.stack(of_pairs).mean(dim=0))
        return torch.stack(values)


def _unit(states: Tensor) -> Tensor:
    return normalize(states, dim=-1, eps=SMALLEST)
