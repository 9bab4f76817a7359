"""Selections that draw: unbiased, reproducible, and used only where that holds.

Statistical bounds: a mean of n independent draws differs from its expectation by more than 5
standard errors once in 1.7 million; the seeds are fixed, so a test that passes once passes always.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.cache.manifest import publish
from pipeline.cache.row_checks import check_row
from pipeline.cache.selection import draw, draw_variance, probabilities, select, without_padding
from pipeline.cache.shard import read_shard, write_shard
from pipeline.config.checks import check_draws
from pipeline.config.load import load_config
from pipeline.config.losses import ForwardKL, Loss, LossSection, ReverseKL, TeacherLoss
from pipeline.config.scoring import HeadAndSampled, Sampled, ScoringConfig, Selection, TopK, TopP
from pipeline.errors import CacheError, ConfigError
from pipeline.fingerprint import digest_ids
from pipeline.layout import CacheLayout
from pipeline.records import CombinedTargets, SparseLogprobs, TokenSequence
from students.data.examples import example_of
from students.data.packing import pack
from students.losses import divergences
from students.losses.distillation import distillation_loss
from students.micro_batch import MicroBatch

ROOT = Path(__file__).resolve().parents[3]
P, V, K = 5, 40, 12
SIGMAS = 5
FORWARD_KL = (divergences.ForwardKL(name="forward_kl", weight=1.0),)


def sampled(draws: int = 12, **options) -> Sampled:
    return Sampled(type="sampled", num_draws=draws, **options)


def headed(mass: float = 0.5, most: int = 6, draws: int = 12, **options) -> HeadAndSampled:
    return HeadAndSampled(
        type="head_and_sampled", head_mass=mass, max_head_entries=most, num_draws=draws, **options
    )


RULES = [sampled(), headed(), sampled(renormalise=True), headed(renormalise=True)]
NAMES = ["sampled", "head", "sampled, renormalised", "head, renormalised"]


@cache
def capture(width: int = K) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities of the `width` likeliest of V, flat enough to lose some mass."""
    logits = np.random.default_rng(0).normal(0, 1.7, (P, V))
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-logs, axis=1)[:, :width]
    return ids, np.take_along_axis(logs, ids, 1).astype(np.float32)


def row_of(rule: Selection, name: str, width: int = K, teacher: str = "t") -> SparseLogprobs:
    ids, logs = capture(width=width)
    return select(name, ids, logs, logs[:, 1], rule, teacher=teacher)


def dense(row: SparseLogprobs) -> np.ndarray:
    """float64[P, V]: what a row says of every id; what it has not is 0."""
    found = np.zeros((row.num_positions, V))
    positions = np.repeat(np.arange(row.num_positions), row.num_entries)
    np.add.at(found, (positions, row.token_ids), probabilities(row))
    return found


def captured_distribution(rule: Selection) -> np.ndarray:
    """float64[P, V]: what draws estimate, written by hand; the head as float16 stores it."""
    ids, logs = capture()
    expected = np.zeros((P, V))
    for j in range(P):
        p = np.exp(logs[j].astype(np.float64))
        tail = float(np.float16(1 - p.sum()))
        num_head, head = 0, np.exp(logs[j].astype(np.float16).astype(np.float64))
        if isinstance(rule, HeadAndSampled):
            while num_head < rule.max_head_entries and head[:num_head].sum() < rule.head_mass:
                num_head += 1
        rest = p[num_head:] / p[num_head:].sum() * (1 - tail - head[:num_head].sum())
        values = np.concatenate([head[:num_head], rest])
        expected[j, ids[j]] = values / (1 - tail) if rule.renormalise else values
    return expected


def deviation(draws: np.ndarray, expected: np.ndarray, rounding: float = 1e-12) -> float:
    """Largest distance of the mean from what is expected, in standard errors."""
    error = draws.std(axis=0) / np.sqrt(len(draws))
    return float((np.abs(draws.mean(axis=0) - expected) / (error + rounding)).max())


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_mean_target_is_the_captured_distribution(rule: Selection) -> None:
    draws = np.stack([dense(row_of(rule, f"s{n}")) for n in range(1000)])
    expected = captured_distribution(rule)
    assert deviation(draws, expected) < SIGMAS
    # a tail that was lost is not made up for, unless the config says so
    lost = 1 - expected.sum(axis=1)
    assert (np.abs(lost) < 1e-9).all() if rule.renormalise else (lost > 1e-3).all()
    # and the bound would show an error of a tenth
    assert deviation(draws, expected * 1.1) > SIGMAS


SEQUENCE = TokenSequence(
    "s", np.arange(P + 1, dtype=np.int32), ((1, P + 1),), "p", "d", ("t",), "stop"
)
LOGITS = torch.randn(P, V, generator=torch.Generator().manual_seed(0))


def gradients(rows: list[SparseLogprobs]) -> np.ndarray:
    """float64[rows, P, V]: of forward KL to the student's logits, through the steps of training.

    The head is the identity, so that hidden states are logits.
    """
    weights = np.ones((1, P), np.float32)
    examples = [example_of(CombinedTargets(SEQUENCE, (row,), weights)) for row in rows]
    logits = LOGITS.repeat(len(rows), 1).requires_grad_()
    targets = MicroBatch.of(pack(examples)).targets
    loss = distillation_loss(logits, torch.eye(V), None, targets, FORWARD_KL)
    (found,) = torch.autograd.grad(loss.total, logits)
    return found.double().reshape(len(rows), P, V).numpy()


def dense_gradient(target_PV: np.ndarray) -> np.ndarray:
    """float64[P, V]: of cross-entropy with a dense target of any mass, by autograd."""
    logits = LOGITS.double().requires_grad_()
    loss = -(torch.from_numpy(target_PV) * torch.log_softmax(logits, dim=-1)).sum()
    return torch.autograd.grad(loss, logits)[0].numpy()


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_mean_gradient_is_that_of_the_captured_distribution(rule: Selection) -> None:
    found = gradients([row_of(rule, f"s{n}") for n in range(1000)])
    # float32 leaves up to 1e-6 of gradients below 1
    assert deviation(found, dense_gradient(captured_distribution(rule)), 1e-6) < SIGMAS


def with_a_bucket(row: SparseLogprobs) -> SparseLogprobs:
    """The same entries as exact ones, and what was not captured in a bucket."""
    logprobs = np.log(probabilities(row)).astype(np.float16)
    nothing = np.zeros(0, np.uint8)
    return replace(row, logprobs=logprobs, counts=nothing, num_head=nothing)


def test_a_bucket_beside_draws_would_be_biased() -> None:
    found = gradients([with_a_bucket(row_of(sampled(), f"s{n}")) for n in range(1000)])
    assert deviation(found, dense_gradient(captured_distribution(sampled())), 1e-6) > 2 * SIGMAS


def test_draws_are_systematic() -> None:
    """The whole part of n p is certain, its fraction f a coin; positions are independent."""
    weights = np.array([[0.47, 0.31, 0.17, 0.05], [1.0, 1.0, 0.0, 2.0]])
    expected = 10 * weights / weights.sum(1, keepdims=True)
    counts = np.stack([draw(weights, 10, f"s{n}", "t") for n in range(4000)])
    assert (counts.sum(axis=2) == 10).all() and not counts[:, 1, 2].any()
    assert (np.abs(counts - expected) < 1).all()
    coin = np.modf(expected)[0]
    error = np.sqrt(coin * (1 - coin) / 4000)
    assert (np.abs(counts.mean(axis=0) - expected) <= SIGMAS * error + 1e-9).all()
    between = np.corrcoef(counts[:, 0, 0], counts[:, 1, 0])[0, 1]
    assert abs(between) < SIGMAS / np.sqrt(4000)


def test_the_stated_variance_bounds_that_of_the_estimates() -> None:
    for rule in RULES:
        rows = [row_of(rule, f"s{n}") for n in range(1000)]
        found = np.stack([dense(row) for row in rows]).var(axis=0).sum(axis=1)
        stated = np.mean([draw_variance(row) for row in rows], axis=0)
        assert (found <= stated).all()


def assert_same(a: SparseLogprobs, b: SparseLogprobs) -> None:
    for name, value in vars(a).items():
        np.testing.assert_array_equal(getattr(b, name), value, err_msg=name)


def test_draws_depend_on_sequence_teacher_and_position_alone() -> None:
    ids, logs = (np.tile(array[:1], (P, 1)) for array in capture())
    whole = select("s", ids, logs, logs[:, 0], sampled(), teacher="t")
    assert_same(whole, select("s", ids, logs, logs[:, 0], sampled(), teacher="t"))
    # positions that come later move none before them
    part = select("s", ids[:3], logs[:3], logs[:3, 0], sampled(), teacher="t")
    num_entries = int(whole.num_entries[:3].sum())
    np.testing.assert_array_equal(part.token_ids, whole.token_ids[:num_entries])
    np.testing.assert_array_equal(part.counts, whole.counts[:num_entries])
    # what another position captured neither
    changed = logs.copy()
    changed[0] = np.log(np.full(K, 1 / K))
    other = select("s", ids, changed, logs[:, 0], sampled(), teacher="t")
    np.testing.assert_array_equal(dense(other)[1:], dense(whole)[1:])
    # equal distributions at other positions, sequences and teachers are drawn from anew
    found = dense(whole)
    assert all((found[j] != found[0]).any() for j in range(1, P))
    for name, teacher in (("s2", "t"), ("s", "t2")):
        again = select(name, ids, logs, logs[:, 0], sampled(), teacher=teacher)
        assert (dense(again) != found).any()


@pytest.mark.parametrize("rule", [*RULES, TopP(type="top_p", mass=0.9, max_entries=9)], ids=str)
def test_shards_round_trip_and_equal_rows_give_equal_bytes(rule: Selection, tmp_path: Path) -> None:
    rows = [row_of(rule, f"s{n}") for n in range(4)]
    for name in ("a", "b"):
        write_shard(str(tmp_path / name), [row_of(rule, f"s{n}") for n in range(4)], "f")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for written, read in zip(rows, read_shard(str(tmp_path / "a")), strict=True):
        assert_same(written, read)
        np.testing.assert_array_equal(probabilities(read), probabilities(written))


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(1, 30),
    positions=st.integers(1, 6),
    steep=st.floats(0.0, 40.0),
    masked=st.integers(0, 29),
    rule=st.sampled_from(
        [sampled(2), sampled(255), headed(1.0, 1, 2), headed(1.0, 30, 4), headed(0.3, 200, 55)]
    ),
)
def test_any_capture_gives_a_row_that_can_be_written(
    seed: int, width: int, positions: int, steep: float, masked: int, rule: Selection
) -> None:
    rng = np.random.default_rng(seed)
    logits = -np.sort(-rng.normal(0, 1, (positions, width)) * steep, axis=1)
    logs = logits - np.log(np.exp(logits - logits.max()).sum(1, keepdims=True)) - logits.max()
    logs = np.where(np.arange(width) < max(1, width - masked), logs, -np.inf).astype(np.float32)
    ids = np.stack([rng.permutation(30)[:width] for _ in range(positions)])
    if not np.exp(logs.astype(np.float64)).sum(axis=1).min() > 1e-3:
        return
    row = select("s", ids, logs, logs[:, 0], rule, teacher="t")
    check_row(row)
    found = dense(row)
    captured = 1 - row.tail_mass.astype(np.float64)
    # float16 may lift a head above the captured mass by 255 roundings
    np.testing.assert_allclose(found.sum(axis=1), captured, atol=5e-3)
    assert (row.num_entries <= rule.max_entries).all()
    allowed = np.zeros_like(found, dtype=bool)
    np.put_along_axis(allowed, ids, np.isfinite(logs), axis=1)
    assert not (found[~allowed] > 0).any()


def test_one_captured_entry_is_the_whole_estimate() -> None:
    ids, logs = np.array([[7], [3]]), np.log(np.array([[1.0], [0.25]])).astype(np.float32)
    row = select("s", ids, logs, logs[:, 0], sampled(9), teacher="t")
    assert row.token_ids.tolist() == [7, 3] and row.counts.tolist() == [9, 9]
    np.testing.assert_allclose(probabilities(row), [1.0, 0.25], rtol=1e-3)
    np.testing.assert_allclose(row.tail_mass, [0.0, 0.75])
    np.testing.assert_allclose(draw_variance(row), 0)


def test_a_head_that_holds_all_leaves_nothing_to_draw() -> None:
    ids, logs = np.array([[7, 3], [5, 6]]), np.log([[0.9, 0.1], [0.5, 0.25]]).astype(np.float32)
    row = select("s", ids, logs, logs[:, 0], headed(1.0, 2, 4), teacher="t")
    assert row.num_entries.tolist() == row.num_head.tolist() == [2, 2]
    assert len(row.counts) == 0 and row.is_drawn
    np.testing.assert_allclose(probabilities(row), [0.9, 0.1, 0.5, 0.25], rtol=2e-3)


def test_masked_entries_are_never_drawn() -> None:
    logs = np.array([[np.log(0.6), np.log(0.4), -np.inf, -np.inf]], np.float32)
    row = select("s", np.arange(4)[None], logs, logs[:, 0], sampled(255), teacher="t")
    assert row.token_ids.tolist() == [0, 1] and row.counts.sum(dtype=int) == 255


def test_a_capture_of_next_to_no_mass_is_refused() -> None:
    logs = np.full((1, 4), np.log(1e-6), np.float32)
    with pytest.raises(CacheError, match=r"position 0 .* raise scoring.num_logprobs"):
        select("s", np.arange(4)[None], logs, logs[:, 0], sampled(), teacher="t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": np.array([1, 2], np.uint8)}, "0 entries are drawn|2 counts"),
        ({"counts": np.array([0], np.uint8)}, "number of draws"),
        ({"num_head": np.array([3], np.uint8)}, "of them exact"),
        ({"num_head": np.array([1, 1], np.uint8)}, "of them exact|different lengths"),
    ],
)
def test_a_drawn_row_that_breaks_an_invariant_is_never_written(
    change: dict, message: str, tmp_path: Path
) -> None:
    half = np.array([0.5], np.float16)
    fine = SparseLogprobs(
        "s",
        num_entries=np.array([2], np.uint8),
        token_ids=np.array([5, 6], np.uint32),
        logprobs=-half,
        counts=np.array([4], np.uint8),
        gold_logprobs=-half,
        tail_mass=half / 8,
        entropies=half,
        num_head=np.array([1], np.uint8),
    )
    write_shard(str(tmp_path / "fine"), [fine], "f")
    with pytest.raises(CacheError, match=message):
        write_shard(str(tmp_path / "broken"), [replace(fine, **change)], "f")
    with pytest.raises(CacheError, match="several selections"):
        write_shard(str(tmp_path / "mixed"), [fine, row_of(TOP_P, "s2")], "f")


def test_positions_drawn_from_unequally_often_are_refused(tmp_path: Path) -> None:
    row = row_of(sampled(), "s")
    counts = row.counts.copy()
    counts[0] += 1
    with pytest.raises(CacheError, match=r"number of draws: \[12, 13\]"):
        write_shard(str(tmp_path / "shard"), [replace(row, counts=counts)], "f")


TOP_P = TopP(type="top_p", mass=0.8, max_entries=6)


def test_totals_state_what_the_selection_costs(tmp_path: Path) -> None:
    found = {}
    for name, rule in (("drawn", sampled()), ("kept", TOP_P)):
        layout = CacheLayout(str(tmp_path / name), 1)
        write_shard(layout.shard(digest_ids(["a", "b"])), [row_of(rule, n) for n in "ab"], "f")
        found[name] = publish(layout, {}, {}).totals
    rows = [row_of(sampled(), n) for n in "ab"]
    assert found["drawn"].tail_nats is None and "tail_nats" not in found["drawn"].model_dump()
    assert found["kept"].draw_variance is found["kept"].lost_mass is None
    tails = np.concatenate([row.tail_mass for row in rows]).astype(np.float64)
    assert found["drawn"].lost_mass == pytest.approx(tails.mean())
    assert found["drawn"].kept_mass == pytest.approx(1 - tails.mean())
    variances = np.concatenate([draw_variance(row) for row in rows])
    assert found["drawn"].draw_variance == pytest.approx(variances.mean())
    assert found["kept"].tail_nats == pytest.approx(-np.log(found["kept"].kept_mass))


def test_drawn_and_kept_teachers_share_a_mixture() -> None:
    """Against the definition in float64: a bucket for the one, none for the other."""
    student = tuple(torch.randn(n, 4).requires_grad_() for n in (P, V))
    weights = np.array([[0.25] * P, [0.75] * P], np.float32)
    drawn, kept = row_of(headed(), "s"), row_of(TOP_P, "s", teacher="u")
    example = example_of(CombinedTargets(SEQUENCE, (drawn, kept), weights))
    assert example.is_estimate and not example.tail_mass[0].any()
    np.testing.assert_array_equal(example.tail_mass[1], kept.tail_mass)
    found = distillation_loss(*student, None, MicroBatch.of(pack([example])).targets, FORWARD_KL)
    hidden, head = (s.detach().double().requires_grad_() for s in student)
    q = torch.softmax(hidden @ head.T, dim=-1)
    expected = torch.zeros((), dtype=torch.float64)
    p_drawn, p_kept = torch.from_numpy(dense(drawn)), torch.from_numpy(dense(kept))
    for j in range(P):
        ids = p_drawn[j] > 0
        expected = expected + 0.25 * (p_drawn[j, ids] * (p_drawn[j, ids] / q[j, ids]).log()).sum()
        ids, tail = p_kept[j] > 0, float(kept.tail_mass[j])
        bucket = tail * (np.log(tail) - q[j, ~ids].sum().log())
        inside = (p_kept[j, ids] * (p_kept[j, ids] / q[j, ids]).log()).sum()
        expected = expected + 0.75 * (inside + bucket)
    torch.testing.assert_close(found.total.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(found.total, student),
        torch.autograd.grad(expected, (hidden, head)),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


QUICKSTART = ROOT / "examples/quickstart/config.yaml"
SAMPLED = "scoring.selection={type: sampled, num_draws: 8}"


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("{type: sampled, num_draws: 256}", "255"),
        ("{type: sampled, num_draws: 1}", "2"),
        (
            "{type: head_and_sampled, head_mass: 1, max_head_entries: 16, num_draws: 240}",
            "max_head_entries + num_draws is 256",
        ),
        (
            "{type: head_and_sampled, head_mass: 1, max_head_entries: 90, num_draws: 8}",
            "selection.max_head_entries (90) exceeds num_logprobs",
        ),
    ],
)
def test_more_than_a_byte_counts_is_refused(selection: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, [f"scoring.selection={selection}"])
    assert message in str(caught.value)


def test_draws_are_accepted_where_they_are_unbiased() -> None:
    config = load_config(QUICKSTART, [SAMPLED, "scoring.num_logprobs=4"])
    assert isinstance(config.scoring, ScoringConfig) and config.scoring.selection.max_entries == 8


class InventedLater(TeacherLoss):
    """A loss that does not exist yet and does not say whether it takes draws."""

    type: Literal["invented_later"] = "invented_later"


def _check_loss(loss: LossSection) -> None:
    """Checks a config whose sections are valid and whose only loss is the given one."""
    config = load_config(QUICKSTART, [SAMPLED])
    training = config.training.model_copy(update={"losses": [loss]})
    check_draws(config.scoring, training, config.combine)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (ReverseKL(type="reverse_kl", weight=1), r"only in losses .* linear .* 'reverse_kl' needs"),
        (InventedLater(weight=1), r"'invented_later' needs"),
        (
            ForwardKL(type="forward_kl", weight=1, temperature=2),
            r"at temperature 1; 'forward_kl' at temperature 2",
        ),
    ],
    ids=["not linear", "invented later", "tempered"],
)
def test_losses_that_are_not_linear_are_refused(loss: LossSection, message: str) -> None:
    _check_loss(ForwardKL(type="forward_kl", weight=1))
    with pytest.raises(ValueError, match=message):
        _check_loss(loss)


def test_every_loss_but_the_linear_ones_is_refused() -> None:
    """The losses on hidden states take draws, since they do not use distributions at all."""
    takes_draws = {kind.__name__ for kind in get_args(get_args(Loss)[0]) if kind.takes_draws}
    assert takes_draws == {"ForwardKL", "CrossEntropy", "HiddenState", "Relation"}


def test_combinations_that_are_not_sums_are_refused() -> None:
    config = load_config(QUICKSTART, [SAMPLED])
    product = config.combine.model_copy(update={"method": "product"})
    with pytest.raises(ValueError, match=r"combine.method 'product' is no sum"):
        check_draws(config.scoring, config.training, product)
    check_draws(load_config(QUICKSTART).scoring, config.training, product)


def test_a_recipe_without_draws_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="num_draws"):
        ScoringConfig.model_validate({"num_logprobs": 8, "selection": {"type": "sampled"}})


@pytest.mark.parametrize("rule", [*RULES, TopK(type="top_k", max_entries=6)])
def test_ids_that_no_tokenizer_has_are_part_of_the_tail(rule: Selection) -> None:
    """Both where rows are selected, and where stored rows are read."""
    ids, logs = capture()
    padding = sorted({int(ids[0, 0]), int(ids[1, 3]), int(ids[2, K - 1])})
    new_id = np.full(V, -1)  # the padding gets the last ids
    new_id[np.argsort([i in padding for i in range(V)], kind="stable")] = np.arange(V)
    ids = new_id[ids]
    known = V - len(padding)
    is_padding = ids >= known
    assert is_padding.any(axis=1)[:3].all()
    stored = select("s", ids, logs, logs[:, 1], rule, teacher="t")
    selected = select("s", ids, logs, logs[:, 1], rule, teacher="t", vocabulary=known)
    read = without_padding(stored, known)
    check_row(selected)
    for row in (selected, read):
        assert row.token_ids.max() < known
        shown = dense(row).sum(axis=1) * (1 - row.tail_mass if row.renormalised else 1)
        np.testing.assert_allclose(shown + row.tail_mass, 1, atol=2e-3)
    if not stored.is_drawn:
        lost = np.where(is_padding, np.exp(logs), 0)[:, :6].sum(axis=1)
        np.testing.assert_allclose(read.tail_mass, stored.tail_mass + lost, atol=1e-3)
        np.testing.assert_array_equal(selected.token_ids[:5], ids[0][~is_padding[0]][:5])
    elif not rule.renormalise:
        left = np.where(np.arange(V) < known, dense(stored), 0)
        np.testing.assert_allclose(dense(read), left, atol=1e-3)
    same = select("s", ids, logs, logs[:, 1], rule, teacher="t", vocabulary=V)
    assert_same(same, stored)
    assert without_padding(stored, V) is stored
    with pytest.raises(CacheError, match="at position 0 every cached entry has an id of 1 or more"):
        without_padding(select("s", ids + 1, logs, logs[:, 1], rule, teacher="t"), 1)
