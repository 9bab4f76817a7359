"""Every loss of the list against its definition in float64: values by sets of ids, gradients by
autograd.
"""

import itertools
from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from pipeline.config.losses import HiddenStatesLoss, Loss
from students.losses.chunk import figure_names
from students.losses.distillation import (
    Targets,
    distillation_loss,
    position_figures,
    weighted_total,
)
from students.losses.divergences import (
    LOSSES,
    CrossEntropy,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SkewKL,
    TotalVariation,
    loss_from_config,
)
from students.losses.hidden_states import LAYER_LOSSES
from students.losses.inputs import LogitStep
from tests.support.loss_reference import reference_loss

P, H, V = 3, 3, 13
KINDS = {
    "forward_kl": ForwardKL,
    "reverse_kl": partial(ReverseKL, min_tail=1e-3),
    "jensen_shannon": partial(JensenShannon, beta=0.3),
    "skew_kl": partial(SkewKL, alpha=0.2, direction="forward"),
    "skew_rkl": partial(SkewKL, alpha=0.2, direction="reverse"),
    "total_variation": TotalVariation,
    "cross_entropy": CrossEntropy,
}
AGAINST_TEACHERS = [name for name in KINDS if name != "cross_entropy"]


def make_loss(name, temperature=1.0, weight=1.0):
    tempering = {} if name == "cross_entropy" else {"temperature": temperature}
    return KINDS[name](name=name, weight=weight, **tempering)


def make_student(seed=0, bias=True, dtype=torch.float64, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    hidden, head, offset = (
        (scale * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()
        for shape in ((P, H), (V, H), (V,))
    )
    return hidden, head, offset if bias else None


def make_targets(num_teachers, tail=True, ragged=True, ids="overlapping", seed=1):
    """Targets like those from a cache: rounded to float16, so that they do not sum to 1.

    `ids` of several teachers are `overlapping`, `disjoint` or the `same`.
    """
    generator = torch.Generator().manual_seed(seed)
    k = 4
    dense = torch.log_softmax(2 * torch.randn(num_teachers, P, V, generator=generator), -1)
    order = torch.stack([torch.randperm(V, generator=generator) for _ in range(P)])
    shift = {"overlapping": 2, "disjoint": k, "same": 0}[ids]
    token_ids = torch.stack([order[:, m * shift : m * shift + k] for m in range(num_teachers)])
    logprobs = dense.gather(2, token_ids)
    if ragged:
        counts = torch.randint(1, k + 1, (num_teachers, P, 1), generator=generator)
        padding = torch.arange(k) >= counts
        logprobs, token_ids = (
            logprobs.masked_fill(padding, -torch.inf),
            token_ids.masked_fill(padding, 0),
        )
    tail_mass = 1 - logprobs.exp().sum(-1)
    if not tail:
        logprobs, tail_mass = torch.log_softmax(logprobs, -1), torch.zeros_like(tail_mass)
    weights = torch.rand(num_teachers, P, generator=generator, dtype=torch.float64) + 0.1
    gold = torch.randint(0, V, (P,), generator=generator)
    return Targets(gold, token_ids, logprobs.half(), tail_mass.half(), weights / weights.sum(0))


def logits_of(student, step):
    logits = step.factor * torch.nn.functional.linear(*student)
    return logits if step.softcap is None else step.softcap * torch.tanh(logits / step.softcap)


def gradients(total, student):
    return torch.autograd.grad(total, [x for x in student if x is not None], retain_graph=True)


def assert_equal_losses(found, expected, student, **tolerance):
    torch.testing.assert_close(found.double(), expected.double(), **tolerance)
    for ours, theirs in zip(gradients(found, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), **tolerance)


EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.mark.parametrize("tail", [True, False], ids=["tail", "no tail"])
@pytest.mark.parametrize("num_teachers", [1, 2, 3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_are_those_of_the_definition(name, temperature, num_teachers, tail):
    if name == "cross_entropy" and temperature != 1:
        return
    loss = make_loss(name, temperature, weight=0.7)
    for ragged, ids, bias, step in [
        (True, "overlapping", True, LogitStep(0.6, 2.5)),
        (False, "overlapping", False, LogitStep()),
        (True, "disjoint", False, LogitStep(softcap=2.5)),
        (False, "disjoint", True, LogitStep(1.7)),
        (False, "same", True, LogitStep(softcap=2.5)),
    ]:
        student = make_student(bias=bias)
        targets = make_targets(num_teachers, tail, ragged, ids)
        found = distillation_loss(*student, targets, [loss], step=step)
        expected = reference_loss(loss, logits_of(student, step), targets)
        assert_equal_losses(found.total, 0.7 * expected, student, **EXACT)
        figures = dict(zip(figure_names([loss]), found.figures, strict=True))
        torch.testing.assert_close(figures[name], expected.detach(), **EXACT)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("num_teachers", [1, 3])
@pytest.mark.parametrize("name", AGAINST_TEACHERS)
def test_with_every_entry_kept_it_is_the_dense_divergence(name, num_teachers, temperature):
    """Equal also at a temperature, to the softmaxes of tempered logits, and for any weights."""
    generator = torch.Generator().manual_seed(3)
    dense = torch.randn(num_teachers, P, V, generator=generator, dtype=torch.float64).log_softmax(2)
    order = torch.argsort(torch.rand(num_teachers, P, V, generator=generator), -1)
    weights = torch.rand(num_teachers, P, generator=generator, dtype=torch.float64).softmax(0)
    nothing = torch.zeros(num_teachers, P)
    gold = torch.zeros(P, dtype=torch.int64)
    targets = Targets(gold, order, dense.gather(2, order), nothing, weights)
    student, loss = make_student(), make_loss(name, temperature)
    # forward KL at temperature 1 sums over teachers, which differs from KL(mixture) by a constant
    apart = name == "forward_kl" and temperature == 1
    mixed = (weights[..., None].log() + dense).logsumexp(0)
    p = torch.softmax((dense if apart else mixed[None]) / temperature, -1)
    q = torch.softmax(logits_of(student, LogitStep()) / temperature, -1).expand_as(p)
    log = torch.log
    value = {
        "forward_kl": lambda: p * log(p / q),
        "reverse_kl": lambda: q * log(q / p),
        "jensen_shannon": lambda: (
            0.3 * p * log(p / (0.3 * p + 0.7 * q)) + 0.7 * q * log(q / (0.3 * p + 0.7 * q))
        ),
        "skew_kl": lambda: p * log(p / (0.2 * p + 0.8 * q)),
        "skew_rkl": lambda: q * log(q / (0.8 * p + 0.2 * q)),
        "total_variation": lambda: (p - q).abs() / 2,
    }[name]()
    value = value * weights[..., None] if apart else value
    found = distillation_loss(*student, targets, [loss])
    assert_equal_losses(found.total, temperature**2 * value.sum(), student, **EXACT)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"type": "forward_kl", "temperature": 2.0}, ForwardKL(name="n", weight=3, temperature=2)),
        (
            {"type": "reverse_kl"},
            ReverseKL(name="n", weight=3, temperature=1, min_tail=1e-4),
        ),
        (
            {"type": "jensen_shannon", "beta": 0.3},
            JensenShannon(name="n", weight=3, temperature=1, beta=0.3),
        ),
        (
            {"type": "skew_kl", "alpha": 0.1, "direction": "reverse"},
            SkewKL(name="n", weight=3, temperature=1, alpha=0.1, direction="reverse"),
        ),
        ({"type": "total_variation"}, TotalVariation(name="n", weight=3, temperature=1)),
        ({"type": "cross_entropy"}, CrossEntropy(name="n", weight=3)),
    ],
    ids=lambda value: value["type"] if isinstance(value, dict) else "",
)
def test_the_config_of_a_loss_gives_its_parameters(settings, expected):
    section = TypeAdapter(Loss).validate_python({**settings, "weight": 3.0})
    assert loss_from_config("n", section.model_dump()) == expected


def test_every_loss_of_the_config_has_a_class():
    sections = get_args(get_args(Loss)[0])
    types = {section: get_args(section.model_fields["type"].annotation) for section in sections}
    on_hidden_states = {
        types[section][0] for section in sections if issubclass(section, HiddenStatesLoss)
    }
    assert on_hidden_states == LAYER_LOSSES.keys()
    assert {name for names in types.values() for name in names} - on_hidden_states == LOSSES.keys()


def mixed_list():
    return [
        make_loss("cross_entropy", weight=0.3),
        make_loss("reverse_kl", 2.0, weight=0.5),
        replace(make_loss("jensen_shannon", weight=0.2), name="jsd_a"),
        replace(make_loss("jensen_shannon", weight=0.4), name="jsd_b", beta=0.8),
        make_loss("forward_kl", weight=0.6),
    ]


def test_a_list_gives_each_loss_apart_and_one_gradient():
    student, targets, losses = make_student(), make_targets(3), mixed_list()
    found = distillation_loss(*student, targets, losses, step=LogitStep(softcap=4.0))
    expected = [
        reference_loss(loss, logits_of(student, LogitStep(softcap=4.0)), targets) for loss in losses
    ]
    total = sum(loss.weight * value for loss, value in zip(losses, expected, strict=True))
    assert_equal_losses(found.total, total, student, **EXACT)
    names = figure_names(losses)
    assert names == (
        "cross_entropy", "reverse_kl", "jsd_a", "jsd_b", "forward_kl",
        "union_error_bound", "reverse_kl_floored",
    )  # fmt: skip
    torch.testing.assert_close(found.figures[:5], torch.stack(expected).detach(), **EXACT)
    torch.testing.assert_close(weighted_total(found.figures, losses), found.total.detach())


@pytest.mark.parametrize("chunk_positions", [1, 2, 3, 100])
def test_chunk_size_does_not_matter(chunk_positions):
    student, targets, losses = make_student(), make_targets(3), mixed_list()
    whole = distillation_loss(*student, targets, losses, chunk_positions=P)
    cut = distillation_loss(*student, targets, losses, chunk_positions=chunk_positions)
    assert_equal_losses(cut.total, whole.total, student, **EXACT)
    torch.testing.assert_close(cut.figures, whole.figures, **EXACT)
    by_position = position_figures(*student, targets, losses, chunk_positions=chunk_positions)
    torch.testing.assert_close(by_position.figures.sum(1), whole.figures, **EXACT)


def test_what_the_union_misplaces_is_bounded_and_reported():
    """The reference is the dense mixture, put on the union's outcomes."""
    generator = torch.Generator().manual_seed(5)
    dense = torch.randn(3, P, V, generator=generator, dtype=torch.float64).log_softmax(2)
    logprobs, token_ids = dense.topk(3, -1)
    tail = 1 - logprobs.exp().sum(-1)
    weights = torch.rand(3, P, generator=generator, dtype=torch.float64).softmax(0)
    weights[:, 0] = torch.tensor([0.0, 1.0, 0.0])
    targets = Targets(torch.zeros(P, dtype=torch.int64), token_ids, logprobs, tail, weights)
    losses, student = [make_loss("jensen_shannon")], make_student()
    assert figure_names(losses)[-1] == "union_error_bound"
    bound = position_figures(*student, targets, losses).figures[-1].detach()
    mixture = (weights[..., None] * dense.exp()).sum(0)
    for j in range(P):
        used = [m for m in range(3) if weights[m, j] > 0]
        union = sorted({int(i) for m in used for i in token_ids[m, j]})
        counted = sum(
            float(weights[m, j] * dense[m, j, i].exp()) for m in used for i in token_ids[m, j]
        )
        missing = float(mixture[j, union].sum()) - counted
        assert missing + 1e-12 >= 0 and missing <= float(bound[j]) + 1e-12
        if len(used) > 1:
            assert missing > 0.01
            assert float(bound[j]) == pytest.approx(float((weights[:, j] * tail[:, j]).sum()))
        else:
            assert float(bound[j]) == 0


@pytest.mark.parametrize("name", AGAINST_TEACHERS)
def test_the_ids_of_a_teacher_without_weight_refine_nothing(name):
    student, two = make_student(), make_targets(2)
    two.teacher_weights.copy_(torch.tensor([[1.0], [0.0]]))
    one = Targets(
        two.gold_ids, two.token_ids[:1], two.logprobs[:1], two.tail_mass[:1], torch.ones(1, P)
    )
    found, expected = (distillation_loss(*student, t, [make_loss(name)]).total for t in (two, one))
    assert_equal_losses(found, expected, student, **EXACT)


def test_a_tail_that_is_too_small_for_reverse_kl_is_raised_and_counted():
    targets, student = make_targets(2, tail=False), make_student()
    targets.tail_mass[:, 1:] = 0.05
    names = figure_names([make_loss("reverse_kl")])
    found = position_figures(*student, targets, [make_loss("reverse_kl")]).figures
    assert found[names.index("reverse_kl_floored")].tolist() == [1, 0, 0]
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("step", "chunk_positions"),
    [(LogitStep(), None), (LogitStep(), 1), (LogitStep(0.5, 4.0), 2)],
    ids=["plain", "a position a chunk", "two steps"],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", KINDS)
def test_lower_precision_stays_near(name, temperature, step, chunk_positions, dtype):
    """Tolerances are relative to the largest entry of each gradient.

    float32 keeps 24 bits, of which sums of gradients that cancel lose a few. bfloat16 keeps 8 bits:
    logits of size 5 are off by 0.02, gradients of logits by 0.4 %. Total variation changes sign
    where target and student are that close, so it is not asked there.
    """
    if (name, dtype) == ("total_variation", torch.bfloat16) or (
        name == "cross_entropy" and temperature != 1
    ):
        return
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype]
    low = make_student(dtype=dtype, scale=1.0)
    full = [x.detach().double().requires_grad_() for x in low]
    loss, targets = make_loss(name, temperature), make_targets(3)
    found = distillation_loss(*low, targets, [loss], step, chunk_positions).total
    expected = distillation_loss(*full, targets, [loss], step).total
    assert found.dtype == torch.float32
    assert abs(found.item() / expected.item() - 1) < tolerance
    for ours, theirs in zip(gradients(found, low), gradients(expected, full), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() < tolerance * theirs.abs().max()


@pytest.mark.parametrize("name", KINDS)
def test_float32_holds_where_the_students_bucket_almost_vanishes(name):
    """t / q_t is 1e8 and more: a gradient by correction, or q_t as 1 - sum q, would be lost."""
    for num_teachers, spread in itertools.product((1, 3), (20.0, 60.0)):
        targets = make_targets(num_teachers)
        logits = torch.randn(P, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        union = targets.token_ids.movedim(0, 1).flatten(1)
        logits.scatter_add_(1, union, torch.full_like(union, spread, dtype=torch.float64))
        full, low = logits.requires_grad_(), logits.detach().float().requires_grad_()
        head, loss = torch.eye(V, dtype=torch.float64), make_loss(name)
        expected = distillation_loss(full, head, None, targets, [loss]).total
        found = distillation_loss(low, head.float(), None, targets, [loss]).total
        assert found.isfinite()
        (ours,), (theirs,) = (
            torch.autograd.grad(t, x) for t, x in ((found, low), (expected, full))
        )
        # float32 logits of size 60 are off by 4e-6, and probabilities by that share
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-5, atol=2e-5)


def sparse_targets(p_PV, num_entries):
    logprobs, token_ids = p_PV.log().topk(num_entries, -1)
    kept_all = num_entries == p_PV.shape[1]
    tail = torch.zeros(1, len(p_PV)) if kept_all else 1 - logprobs.exp().sum(-1)[None]
    gold = torch.zeros(len(p_PV), dtype=torch.int64)
    return Targets(
        gold, token_ids[None], logprobs[None], tail, torch.ones(1, len(p_PV), dtype=torch.float64)
    )


def of_distributions(loss, p_PV, q_PV, num_entries=V):
    eye = torch.eye(p_PV.shape[1], dtype=torch.float64)
    targets = sparse_targets(p_PV, num_entries)
    return distillation_loss(q_PV.log(), eye, None, targets, [loss]).total


distributions = st.lists(
    st.lists(st.floats(-6, 6), min_size=V, max_size=V), min_size=2, max_size=2
).map(lambda rows: torch.softmax(torch.tensor(rows, dtype=torch.float64), -1)[:, None])
temperatures = st.sampled_from([1.0, 0.5, 3.0])


@pytest.mark.parametrize("name", AGAINST_TEACHERS)
@settings(max_examples=25, deadline=None)
@given(pair=distributions, temperature=temperatures, num_entries=st.integers(1, V))
def test_never_negative_and_zero_between_equals(name, pair, temperature, num_entries):
    loss = make_loss(name, temperature)
    if name == "reverse_kl":
        loss = replace(loss, min_tail=1e-12)
    p, q = pair
    assert of_distributions(loss, p, q, num_entries) >= -1e-12
    assert of_distributions(loss, p, p, num_entries) == pytest.approx(0, abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(pair=distributions, share=st.floats(0.05, 0.95), temperature=temperatures)
def test_symmetries(pair, share, temperature):
    p, q = pair
    jsd = make_loss("jensen_shannon", temperature)
    forward, reverse = (
        replace(make_loss(name, temperature), alpha=share) for name in ("skew_kl", "skew_rkl")
    )
    for one, other in [
        (replace(jsd, beta=share), replace(jsd, beta=1 - share)),
        (forward, reverse),
        (make_loss("total_variation", temperature), make_loss("total_variation", temperature)),
        (make_loss("forward_kl", temperature), make_loss("reverse_kl", temperature)),
    ]:
        there, back = of_distributions(one, p, q), of_distributions(other, q, p)
        torch.testing.assert_close(there, back, rtol=1e-9, atol=1e-11)
    assert of_distributions(replace(jsd, beta=0.5, temperature=1.0), p, q) <= 0.6931471805599454


@pytest.mark.parametrize("name", AGAINST_TEACHERS)
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(3)), seed=st.integers(0, 99), temperature=temperatures)
def test_the_order_of_teachers_does_not_matter(name, order, seed, temperature):
    targets, student = make_targets(3, seed=seed), make_student()
    order = torch.tensor(order)
    moved = replace(
        targets,
        **{
            field: getattr(targets, field)[order]
            for field in ("token_ids", "logprobs", "tail_mass", "teacher_weights")
        },
    )
    loss = make_loss(name, temperature)
    found, expected = (distillation_loss(*student, t, [loss]).total for t in (moved, targets))
    assert_equal_losses(found, expected, student, rtol=1e-12, atol=1e-12)
