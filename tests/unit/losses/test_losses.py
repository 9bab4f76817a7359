"""The losses against oracles that share no code with them: dense `kl_div`, autograd, and an
explicit bucket.
"""

from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from students.losses.distillation import (
    Targets,
    chunk_elements,
    distillation_loss,
    position_figures,
)
from students.losses.divergences import CrossEntropy, ForwardKL, ReverseKL

P, H, V = 7, 5, 23


def losses_of(**weights):
    classes = {
        "forward_kl": ForwardKL,
        "cross_entropy": CrossEntropy,
        "reverse_kl": partial(ReverseKL, min_tail=0.0),
    }
    return [classes[name](name=name, weight=weight) for name, weight in weights.items()]


BOTH = losses_of(forward_kl=1.0, cross_entropy=1.0)


def _student(dtype=torch.float32, seed=0, bias=False):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(P, H, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    offset = torch.randn(V, generator=generator).to(dtype).requires_grad_() if bias else None
    return hidden, head, offset


def _teachers(num_entries, seed=1, num_teachers=1, ragged=False):
    """Targets with exact tails, and the dense float64 teachers they were cut from."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.log_softmax(
        3 * torch.randn(num_teachers, P, V, generator=generator, dtype=torch.float64), -1
    )
    logprobs, token_ids = dense.topk(num_entries, dim=-1)
    if ragged:
        counts = torch.randint(1, num_entries + 1, (num_teachers, P, 1), generator=generator)
        padding = torch.arange(num_entries) >= counts
        logprobs, token_ids = (
            logprobs.masked_fill(padding, -torch.inf),
            token_ids.masked_fill(padding, 0),
        )
    tail = (1 - logprobs.exp().sum(-1)).clamp(min=0)
    if num_entries == V and not ragged:
        tail = torch.zeros_like(tail)
    weights = torch.rand(num_teachers, P, generator=generator, dtype=torch.float64)
    weights = weights / weights.sum(0)
    gold = torch.randint(0, V, (P,), generator=generator)
    return Targets(gold, token_ids, logprobs, tail, weights), dense


def _bucket_oracle(logits, targets):
    """The definition, written with sets and float64, one position at a time: K + 1 outcomes."""
    q = torch.softmax(logits.double(), -1)
    total = torch.zeros((), dtype=torch.float64)
    for m in range(targets.token_ids.shape[0]):
        for j in range(len(targets.gold_ids)):
            kept = {
                int(i): lp.double()
                for i, lp in zip(targets.token_ids[m, j], targets.logprobs[m, j], strict=True)
                if lp > -np.inf
            }
            p = torch.stack([lp.exp() for lp in kept.values()])
            ids = list(kept)
            kl = (p * (p.log() - q[j, ids].log())).sum()
            others = [i for i in range(V) if i not in kept]
            t = targets.tail_mass[m, j].double()
            if others and t > 0:
                kl = kl + t * (t.log() - q[j, others].sum().log())
            total = total + targets.teacher_weights[m, j].double() * kl
    return total


def _gradients(total, tensors):
    return torch.autograd.grad(total, [t for t in tensors if t is not None], retain_graph=True)


def _assert_same_loss(student, targets, losses, expected, rtol=1e-5, atol=1e-5, **options):
    found = distillation_loss(*student, targets, losses, **options)
    torch.testing.assert_close(found.total.double(), expected.double(), rtol=rtol, atol=atol)
    for ours, theirs in zip(
        _gradients(found.total, student), _gradients(expected, student), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=rtol, atol=atol)


def test_all_entries_kept_equals_dense_kl_div():
    student, (targets, dense) = _student(), _teachers(V)
    logits = student[0] @ student[1].T
    expected = torch.nn.functional.kl_div(
        torch.log_softmax(logits.double(), -1), dense[0], log_target=True, reduction="sum"
    )
    _assert_same_loss(student, targets, losses_of(forward_kl=1.0), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("num_teachers", [1, 3])
def test_bucket_matches_explicit_outcomes(num_teachers, ragged, bias):
    student, (targets, _) = (
        _student(bias=bias),
        _teachers(6, num_teachers=num_teachers, ragged=ragged),
    )
    logits = torch.nn.functional.linear(*student)
    losses = losses_of(forward_kl=0.7, cross_entropy=0.4)
    ce = torch.nn.functional.cross_entropy(logits, targets.gold_ids, reduction="sum")
    expected = 0.7 * _bucket_oracle(logits, targets) + 0.4 * ce
    _assert_same_loss(student, targets, losses, expected)
    found = distillation_loss(*student, targets, losses)
    figures = torch.stack([ce, _bucket_oracle(logits, targets)]).detach()
    torch.testing.assert_close(found.figures.double(), figures.double(), rtol=1e-5, atol=1e-5)


def test_cross_entropy_alone_equals_torch():
    student, (targets, _) = _student(), _teachers(3)
    expected = torch.nn.functional.cross_entropy(
        student[0] @ student[1].T, targets.gold_ids, reduction="sum"
    )
    _assert_same_loss(student, targets, losses_of(cross_entropy=1.0), expected)


def test_teachers_add_up_and_their_order_does_not_matter():
    student, (targets, _) = _student(), _teachers(5, num_teachers=2, ragged=True)
    losses = losses_of(forward_kl=1.0)
    both = distillation_loss(*student, targets, losses)

    def part(order):
        return Targets(
            targets.gold_ids,
            *(
                x[order]
                for x in (
                    targets.token_ids,
                    targets.logprobs,
                    targets.tail_mass,
                    targets.teacher_weights,
                )
            ),
        )

    alone = [distillation_loss(*student, part([m]), losses) for m in range(2)]
    torch.testing.assert_close(both.total, alone[0].total + alone[1].total)
    torch.testing.assert_close(both.total, distillation_loss(*student, part([1, 0]), losses).total)
    for k, gradient in enumerate(_gradients(both.total, student)):
        parts = [_gradients(loss.total, student)[k] for loss in alone]
        torch.testing.assert_close(gradient, parts[0] + parts[1])


def test_numbers_are_used_as_stored_without_renormalisation():
    student, (targets, _) = _student(), _teachers(6)
    rounded = Targets(
        targets.gold_ids,
        targets.token_ids,
        targets.logprobs.half(),
        targets.tail_mass.half(),
        targets.teacher_weights.float(),
    )
    mass = rounded.logprobs.double().exp().sum(-1) + rounded.tail_mass.double()
    assert (mass - 1).abs().max() > 1e-5
    expected = _bucket_oracle(student[0] @ student[1].T, rounded)
    _assert_same_loss(student, rounded, losses_of(forward_kl=1.0), expected)


def test_a_vanishing_student_tail_keeps_value_and_gradient_finite():
    logits = torch.full((1, V), -150.0)
    logits[0, 3] = 150.0
    hidden = logits.clone().requires_grad_()
    head = torch.eye(V, requires_grad=True)
    targets = Targets(
        torch.tensor([3]),
        torch.tensor([[[3]]]),
        torch.tensor([[[np.log(0.9)]]]),
        torch.tensor([[0.1]]),
        torch.ones(1, 1),
    )
    found = distillation_loss(hidden, head, None, targets, losses_of(forward_kl=1.0))
    # log q_t = -300 + log(22); the tail's gradient pushes the other logits up by t / 22 each
    expected = 0.9 * np.log(0.9) + 0.1 * np.log(0.1) + 0.1 * (300 - np.log(V - 1))
    assert found.total.item() == pytest.approx(expected, rel=1e-5)
    gradient = _gradients(found.total, [hidden])[0][0]
    assert gradient[3].item() == pytest.approx(0.1, rel=1e-5)
    assert gradient[4].item() == pytest.approx(-0.1 / (V - 1), rel=1e-4)


def test_kept_whole_vocabulary_with_a_rounded_tail_has_no_bucket():
    student, (targets, _) = _student(), _teachers(V)
    leftover = Targets(
        targets.gold_ids,
        targets.token_ids,
        targets.logprobs,
        targets.tail_mass + 3e-4,
        targets.teacher_weights,
    )
    losses = losses_of(forward_kl=1.0)
    torch.testing.assert_close(
        distillation_loss(*student, leftover, losses).total,
        distillation_loss(*student, targets, losses).total,
    )


def test_an_absent_teacher_of_weight_zero_changes_nothing():
    student, (targets, _) = _student(), _teachers(4)
    padded = Targets(
        targets.gold_ids,
        torch.cat([targets.token_ids, torch.zeros_like(targets.token_ids)]),
        torch.cat([targets.logprobs, torch.full_like(targets.logprobs, -torch.inf)]),
        torch.cat([targets.tail_mass, torch.zeros_like(targets.tail_mass)]),
        torch.cat([targets.teacher_weights, torch.zeros_like(targets.teacher_weights)]),
    )
    losses = losses_of(forward_kl=1.0)
    _assert_same_loss(student, padded, losses, distillation_loss(*student, targets, losses).total)


def test_no_positions_give_zero_loss_and_zero_gradients():
    hidden, head, _ = _student()
    empty = Targets(
        torch.zeros(0, dtype=torch.long),
        torch.zeros(1, 0, 1, dtype=torch.int32),
        torch.zeros(1, 0, 1),
        torch.zeros(1, 0),
        torch.zeros(1, 0),
    )
    found = distillation_loss(hidden[:0], head, None, empty, BOTH)
    found.total.backward()
    assert found.total.item() == 0
    assert head.grad.abs().max() == 0


def test_bfloat16_stays_near_float32():
    targets, _ = _teachers(6, num_teachers=2)
    losses = losses_of(forward_kl=1.0, cross_entropy=1.0)
    low, full = _student(torch.bfloat16), None
    full = [None if t is None else t.detach().float().requires_grad_() for t in low]
    found, expected = (distillation_loss(*student, targets, losses) for student in (low, full))
    # bfloat16 keeps 8 bits: logits of size ~5 are off by up to 0.02
    torch.testing.assert_close(found.total, expected.total, rtol=2e-2, atol=0)
    for ours, theirs in zip(
        _gradients(found.total, low), _gradients(expected.total, full), strict=True
    ):
        assert ours.dtype == torch.bfloat16
        assert (ours.float() - theirs).norm() / theirs.norm() < 2e-2


def test_the_upstream_factor_scales_the_gradient():
    student, (targets, _) = _student(), _teachers(4)
    total = distillation_loss(*student, targets, losses_of(forward_kl=1.0)).total
    for once, thrice in zip(
        _gradients(total, student), _gradients(3 * total, student), strict=True
    ):
        torch.testing.assert_close(3 * once, thrice)


def test_position_figures_agree_with_the_loss():
    student, (targets, _) = _student(), _teachers(5, num_teachers=2, ragged=True)
    found = position_figures(*student, targets, BOTH, chunk_positions=3)
    sums = distillation_loss(*student, targets, BOTH)
    torch.testing.assert_close(found.figures.sum(1), sums.figures)
    assert torch.equal(found.argmax_ids, (student[0] @ student[1].T).argmax(-1))


def test_a_chunk_grows_with_the_memory_of_a_gpu(monkeypatch):
    """A chunk takes a 128th of the memory in float32, and is never smaller than on a CPU."""

    def elements(gibibytes):
        memory = SimpleNamespace(total_memory=gibibytes * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
        return chunk_elements(torch.device("cuda", 0))

    assert chunk_elements(torch.device("cpu")) == elements(4) == 2**25
    assert elements(80) == 80 * 2**30 // 128 // 4


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_on_a_gpu_are_those_on_a_cpu(dtype, device="cuda"):
    """The sums are in another order: tolerances are a few times the resolution of the dtype."""
    targets, _ = _teachers(6, num_teachers=2, ragged=True)
    losses = losses_of(forward_kl=0.7, reverse_kl=0.2, cross_entropy=0.4)
    moved = Targets(*(getattr(targets, field.name).to(device) for field in fields(targets)))
    found = []
    for place, theirs in (("cpu", targets), (device, moved)):
        student = [t.detach().to(place).requires_grad_() for t in _student(dtype)[:2]]
        loss = distillation_loss(*student, None, theirs, losses)
        found.append([loss.figures, *_gradients(loss.total, student)])
    close = (
        {"rtol": 5e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, **close)
