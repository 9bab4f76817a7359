"""Losses on hidden states: against loops in float64, in value and gradient, however sequences are
computed together.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.losses import HiddenState, Relation
from students.losses.hidden_states import HiddenStatesLosses, layer_loss_from_config
from students.losses.inputs import HiddenStatesBatch

H, D, LAYERS = 5, 7, (2, 6)
KINDS = ["mse", "cosine", "token_similarity", "distance", "angle"]


def loss(kind, layers=None, weight=1.0, projection="learned"):
    fields = {"teacher": "t", "layers": layers or {6: 1}, "weight": weight}
    if kind in ("mse", "cosine"):
        return HiddenState(type="hidden_state", measure=kind, projection=projection, **fields)
    sequences = None if kind == "token_similarity" else 3
    return Relation(type="relation", relation=kind, sequences=sequences, **fields)


def module_of(*losses, width=D):
    parameters = tuple(
        layer_loss_from_config(loss.name, loss.model_dump(), LAYERS) for loss in losses
    )
    return HiddenStatesLosses(parameters, H, {"t": width}, seed=3).double()


def states_of(lengths, seed=0, width=D):
    """Hidden states by sequence: the student's of layers 0 and 1, the teacher's of both layers."""
    rng = np.random.default_rng(seed)
    student = [torch.tensor(rng.normal(size=(n, 2, H))) for n in lengths]
    teacher = [torch.tensor(rng.normal(size=(n, 2, width))).bfloat16() for n in lengths]
    return student, teacher


def batch_of(members, teacher, groups, uncovered=()):
    lengths = [len(teacher[i]) for i in members]
    none = torch.zeros(0, 2, teacher[0].shape[-1], dtype=torch.bfloat16)
    covered = [torch.full((len(teacher[i]),), i not in uncovered) for i in members]
    return HiddenStatesBatch(
        {"t": torch.cat([none, *(teacher[i] * (i not in uncovered) for i in members)])},
        {"t": torch.cat([torch.zeros(0, dtype=torch.bool), *covered])},
        {"t": [place for place, i in enumerate(members) if i not in uncovered]},
        lengths,
        [groups[i] for i in members],
    )


def layers_of(members, student):
    together = torch.cat(
        [torch.zeros(0, 2, H, dtype=torch.float64), *(student[i] for i in members)]
    )
    return {0: together[:, 0], 1: together[:, 1]}


def norm(v):
    return math.sqrt(sum(x * x for x in v))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def cos(a, b):
    return dot(a, b) / (norm(a) * norm(b))


def huber(x, y):
    d = abs(x - y)
    return d * d / 2 if d < 1 else d - 0.5


def mean(values):
    return sum(values) / len(values)


def mean_state(rows):
    return [mean(column) for column in zip(*rows, strict=True)]


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def oracle(kind, student, teacher, projection):
    """Plain Python over lists: the sum over the positions of one group of sequences.

    Args:
        student, teacher: a list of states for each sequence.
        projection: a matrix as a list of rows, or None.
    """
    if projection is not None:
        student = [[[dot(row, state) for row in projection] for state in s] for s in student]
    pairs = [p for s, t in zip(student, teacher, strict=True) for p in zip(s, t, strict=True)]
    if kind == "mse":
        return sum(mean([(x - y) ** 2 for x, y in zip(s, t, strict=True)]) for s, t in pairs)
    if kind == "cosine":
        return sum(1 - cos(s, t) for s, t in pairs)
    if kind == "token_similarity":
        total = 0.0
        for s, t in zip(student, teacher, strict=True):
            both = list(itertools.permutations(range(len(s)), 2))
            if both:
                value = mean([(cos(s[i], s[j]) - cos(t[i], t[j])) ** 2 for i, j in both])
                total += value * len(s)
        return total
    num_positions = len(pairs)
    s, t = ([mean_state(sequence) for sequence in side] for side in (student, teacher))
    if kind == "distance":
        both = list(itertools.combinations(range(len(s)), 2))
        lengths = [[norm(minus(x[i], x[j])) for i, j in both] for x in (s, t)]
        relative = [[d / mean(side) for d in side] for side in lengths]
        return num_positions * mean([huber(a, b) for a, b in zip(*relative, strict=True)])
    angles = [
        [
            cos(minus(x[i], x[j]), minus(x[k], x[j]))
            for j in range(len(x))
            for i, k in itertools.combinations([n for n in range(len(x)) if n != j], 2)
        ]
        for x in (s, t)
    ]
    return num_positions * mean([huber(a, b) for a, b in zip(*angles, strict=True)])


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_of_a_group(kind):
    lengths = [3, 1, 4]
    student, teacher = states_of(lengths)
    module = module_of(loss(kind))
    batch = batch_of(range(3), teacher, [0, 0, 0])
    together = layers_of(range(3), student)
    free = together[1].clone().requires_grad_()
    value = module({0: together[0], 1: free}, batch)[0].sum()
    value.backward()

    weights = [w.weight.tolist() for w in module.projections]
    projection = weights[0] if weights else None
    targets = [t[:, 1].double().tolist() for t in teacher]

    def measured(flat):
        rows = iter(flat.reshape(-1, H).tolist())
        sequences = [[next(rows) for _ in range(n)] for n in lengths]
        return oracle(kind, sequences, targets, projection)

    start = free.detach().numpy().ravel()
    assert value.item() == pytest.approx(measured(start), rel=1e-12)
    step = 1e-6
    numeric = [
        (measured(start + step * e) - measured(start - step * e)) / (2 * step)
        for e in np.eye(len(start))
    ]
    np.testing.assert_allclose(free.grad.numpy().ravel(), numeric, rtol=1e-5, atol=1e-8)


def test_the_learned_matrix_gets_its_gradient():
    student, teacher = states_of([4])
    module = module_of(loss("mse"))
    batch, together = batch_of([0], teacher, [0]), layers_of([0], student)
    matrix = module.projections[0].weight
    module(together, batch)[0].sum().backward()
    expected = (
        torch.einsum(
            "pd,ph->dh", together[1] @ matrix.T - teacher[0][:, 1].double(), student[0][:, 1]
        )
        * 2
        / D
    )
    torch.testing.assert_close(matrix.grad, expected.detach())


def test_several_layers_are_averaged():
    student, teacher = states_of([3, 2, 2])
    batch, together = batch_of(range(3), teacher, [0] * 3), layers_of(range(3), student)
    for kind in ("token_similarity", "distance", "angle"):
        both = module_of(loss(kind, {6: 1, 2: 0}))(together, batch)
        parts = [module_of(loss(kind, layers))(together, batch) for layers in ({6: 1}, {2: 0})]
        torch.testing.assert_close(both, (parts[0] + parts[1]) / 2)


@settings(max_examples=30, deadline=None)
@given(data=st.data(), kind=st.sampled_from(KINDS))
def test_the_sum_does_not_depend_on_what_is_computed_together(data, kind):
    """Groups in any order, spread over any micro-batches, some of them empty."""
    num_groups = data.draw(st.integers(1, 4))
    lengths = data.draw(
        st.lists(st.integers(1, 4), min_size=3 * num_groups, max_size=3 * num_groups)
    )
    uncovered = data.draw(st.sets(st.sampled_from(range(len(lengths))), max_size=3))
    student, teacher = states_of(lengths)
    groups = [i // 3 for i in range(len(lengths))]
    module = module_of(loss(kind))

    def total(members):
        batch = batch_of(members, teacher, groups, uncovered)
        return module(layers_of(members, student), batch).sum()

    order = data.draw(st.permutations(range(num_groups)))
    cuts = sorted(data.draw(st.lists(st.integers(0, num_groups), max_size=2)))
    parts = [order[a:b] for a, b in itertools.pairwise([0, *cuts, num_groups])]
    spread = [[i for g in part for i in range(3 * g, 3 * g + 3)] for part in parts]
    whole = total(list(range(len(lengths))))
    torch.testing.assert_close(sum(total(members) for members in spread), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_without_states_weighs_nothing(kind):
    student, teacher = states_of([3, 2, 4, 2])
    module = module_of(loss(kind))
    everyone = module(layers_of(range(4), student), batch_of(range(4), teacher, [0] * 4, {1}))
    rest = [0, 2, 3]
    without = module(layers_of(rest, student), batch_of(rest, teacher, [0] * 4))
    assert (everyone[0, 3:5] == 0).all()
    torch.testing.assert_close(everyone.sum(), without.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_equal_states_cost_nothing_and_have_finite_gradients(kind):
    """Also where all states are the same, so that every distance is 0."""
    for same in (False, True):
        student, _ = states_of([2, 2, 2], width=H)
        student = [s.bfloat16().double() for s in student]
        if same:
            student = [torch.ones_like(s) for s in student]
        teacher = [s.bfloat16() for s in student]
        module = module_of(loss(kind, projection="none"), width=H)
        together = layers_of(range(3), student)
        together[1].requires_grad_()
        value = module(together, batch_of(range(3), teacher, [0] * 3)).sum()
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-12)
        assert torch.isfinite(together[1].grad).all()


def test_an_empty_micro_batch_keeps_the_learned_matrix_in_the_graph():
    student, teacher = states_of([2])
    module = module_of(loss("mse"), loss("distance"))
    values = module(layers_of([], student), batch_of([], teacher, []))
    assert values.shape == (2, 0)
    values.sum().backward()
    assert (module.projections[0].weight.grad == 0).all()


def test_relations_do_not_change_when_states_are_scaled_and_shifted():
    """This makes them comparable between models of different sizes (arXiv 1904.05068)."""
    student, teacher = states_of([2, 3, 2])
    batch = batch_of(range(3), teacher, [0] * 3)
    module = module_of(loss("distance"), loss("angle"))
    together = layers_of(range(3), student)
    moved = {layer: 3 * x + 2 for layer, x in together.items()}
    torch.testing.assert_close(module(together, batch), module(moved, batch))
