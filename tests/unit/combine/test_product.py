"""The product of teachers: the dense geometric mean where every id is kept, and otherwise what its
definition says, one position and one id at a time.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.cache.selection import select
from pipeline.combine.product import ProductTargets, product_of
from pipeline.config.scoring import TopK, TopP
from pipeline.records import CombinedTargets, SparseLogprobs, TokenSequence
from students.data.examples import example_of, example_of_product
from students.data.packing import pack
from students.losses.distillation import distillation_loss
from students.losses.divergences import ForwardKL, ReverseKL
from students.micro_batch import MicroBatch
from tests.support.loss_reference import reference_loss

VOCABULARY, POSITIONS = 12, 5
SEQUENCE = TokenSequence("s", np.arange(6, dtype=np.int32), ((1, 6),), "p", "words", ("t",), "stop")
MIN_TAIL = 1e-4


def dense(seed: int, spread: float = 3.0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, spread, (POSITIONS, VOCABULARY))
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def row_of(logs: np.ndarray, rule: TopK | TopP) -> SparseLogprobs:
    ids = np.argsort(-logs, axis=1)
    captured = np.take_along_axis(logs, ids, 1).astype(np.float32)
    return select("s", ids, captured, captured[:, 2], rule, teacher="t")


def weights_of(seed: int, num_teachers: int) -> np.ndarray:
    """Weights of which some are 0, but never all at one position."""
    generator = np.random.default_rng(seed)
    weights = generator.dirichlet(np.ones(num_teachers), POSITIONS).T
    weights[:, 0] = np.eye(num_teachers)[0]
    return weights.astype(np.float32)


def by_definition(combined: CombinedTargets) -> tuple[np.ndarray, list[set[int]]]:
    """Product over all ids, float64[P, V], and the union of each position."""
    found, unions = np.zeros((POSITIONS, VOCABULARY)), []
    for j in range(POSITIONS):
        logs, union = np.zeros(VOCABULARY), set()
        for row, weight in zip(combined.rows, combined.teacher_weights[:, j], strict=True):
            if row is None or weight == 0:
                continue
            start = int(row.num_entries[:j].sum())
            stop = start + int(row.num_entries[j])
            kept = dict(zip(row.token_ids[start:stop], row.logprobs[start:stop], strict=True))
            tail = max(float(row.tail_mass[j]), MIN_TAIL)
            for i in range(VOCABULARY):
                even = math.log(tail / max(VOCABULARY - len(kept), 1))
                logs[i] += float(weight) * float(kept.get(i, even))
            union |= {int(i) for i in kept}
        unions.append(union)
        found[j] = np.exp(logs) / np.exp(logs).sum()
    return found, unions


def spread_out(product: ProductTargets) -> np.ndarray:
    """Product over all ids, float64[P, V], with tails spread evenly outside the union."""
    found = np.zeros((POSITIONS, VOCABULARY))
    start = 0
    for j, count in enumerate(product.num_entries):
        ids = product.token_ids[start : start + count]
        assert (np.diff(ids) > 0).all()
        found[j] = product.tail_mass[j] / max(VOCABULARY - count, 1)
        found[j, ids] = np.exp(product.logprobs[start : start + count])
        start += count
    assert start == len(product.token_ids) == len(product.logprobs)
    return found


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_teachers=st.integers(1, 4),
    mass=st.sampled_from([0.3, 0.8, 0.99, 1.0]),
    max_entries=st.integers(1, VOCABULARY),
    lacking=st.integers(1, 8),
)
def test_the_product_is_what_its_definition_says(seed, num_teachers, mass, max_entries, lacking):
    rule = TopP(type="top_p", mass=mass, max_entries=max_entries)
    rows = [row_of(dense(seed + m), rule) for m in range(num_teachers)]
    weights = weights_of(seed, num_teachers)
    if lacking < num_teachers:
        rows[lacking], weights[lacking] = None, 0.0
        weights /= weights.sum(axis=0)
    combined = CombinedTargets(SEQUENCE, tuple(rows), weights)
    product = product_of(combined, VOCABULARY, MIN_TAIL)
    expected, unions = by_definition(combined)
    np.testing.assert_allclose(spread_out(product), expected, rtol=1e-6, atol=1e-12)
    assert product.num_entries.tolist() == [len(union) for union in unions]
    assert (product.tail_mass[[len(u) == VOCABULARY for u in unions]] == 0).all()
    order = np.random.default_rng(seed).permutation(num_teachers)
    shuffled = CombinedTargets(SEQUENCE, tuple(rows[i] for i in order), weights[order])
    again = product_of(shuffled, VOCABULARY, MIN_TAIL)
    assert np.array_equal(again.token_ids, product.token_ids)
    np.testing.assert_allclose(again.logprobs, product.logprobs, rtol=1e-9, atol=1e-9)


def test_with_every_id_kept_it_is_the_dense_geometric_mean_and_assumes_nothing():
    logs, weights = np.stack([dense(1), dense(2), dense(3)]), weights_of(0, 3)
    rule = TopK(type="top_k", max_entries=VOCABULARY)
    rows = tuple(row_of(of_teacher, rule) for of_teacher in logs)
    product = product_of(CombinedTargets(SEQUENCE, rows, weights), VOCABULARY, MIN_TAIL)
    mean = (weights[..., None] * logs).sum(axis=0)
    expected = np.exp(mean) / np.exp(mean).sum(axis=1, keepdims=True)
    # stored as float16: 2^-11 of log-probabilities down to -20
    np.testing.assert_allclose(spread_out(product), expected, rtol=2e-2)
    assert not product.assumed_mass.any() and not product.is_floored.any()


def test_one_teacher_of_weight_1_is_the_identity():
    row = row_of(dense(4), TopP(type="top_p", mass=0.9, max_entries=6))
    other = row_of(dense(5), TopP(type="top_p", mass=0.9, max_entries=6))
    weights = np.stack([np.ones(POSITIONS), np.zeros(POSITIONS)]).astype(np.float32)
    combined = CombinedTargets(SEQUENCE, (row, other), weights)
    product = product_of(combined, VOCABULARY, MIN_TAIL)
    found, _ = by_definition(combined)
    assert product.num_entries.tolist() == row.num_entries.tolist()
    np.testing.assert_allclose(spread_out(product), found, rtol=1e-6)
    # float16 entries and tail sum to 1 within their rounding
    np.testing.assert_allclose(product.tail_mass, row.tail_mass, rtol=2e-3)


def test_teachers_that_are_sure_of_different_ids_have_a_product():
    """Each teacher's tail holds the other's id, and float16 stores it as 0: the product is even."""
    logs = np.full((2, POSITIONS, VOCABULARY), -40.0)
    logs[0, :, 3] = logs[1, :, 7] = 0.0
    rule = TopP(type="top_p", mass=0.5, max_entries=4)
    rows = tuple(row_of(of_teacher, rule) for of_teacher in logs)
    weights = np.full((2, POSITIONS), 0.5, np.float32)
    product = product_of(CombinedTargets(SEQUENCE, rows, weights), VOCABULARY, MIN_TAIL)
    found = spread_out(product)
    assert found[:, 3] == pytest.approx(found[:, 7]) and (found[:, 3] > 0.45).all()
    assert product.is_floored.all() and product.assumed_mass == pytest.approx(np.ones(POSITIONS))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_losses_against_a_product_follow_the_reference(temperature):
    """The product stands beside a mixture, whose numbers are float16, in one batch."""
    rule = TopP(type="top_p", mass=0.9, max_entries=6)
    weights = np.array([[0.75] * POSITIONS, [0.25] * POSITIONS], np.float32)
    combined = CombinedTargets(SEQUENCE, (row_of(dense(6), rule), row_of(dense(7), rule)), weights)
    product = product_of(combined, VOCABULARY, MIN_TAIL)
    both = MicroBatch.of(pack([example_of_product(SEQUENCE, product), example_of(combined)]))
    alone = MicroBatch.of(pack([example_of_product(SEQUENCE, product)]))
    hidden = torch.randn(2 * POSITIONS, 8, dtype=torch.float64)
    head = torch.randn(VOCABULARY, 8, dtype=torch.float64)
    terms = [
        ForwardKL(name="forward_kl", weight=1.0, temperature=temperature),
        ReverseKL(name="reverse_kl", weight=1.0, temperature=temperature, min_tail=1e-4),
    ]
    for batch, states in ((both, hidden), (alone, hidden[:POSITIONS])):
        found = distillation_loss(states, head, None, batch.targets, terms).total
        expected = sum(reference_loss(term, states @ head.T, batch.targets) for term in terms)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    dense_logs = torch.tensor(by_definition(combined)[0]).log()
    student = torch.log_softmax(hidden[:POSITIONS] @ head.T, -1)
    kl = (dense_logs.exp() * (dense_logs - student)).sum().item()
    found = distillation_loss(hidden[:POSITIONS], head, None, alone.targets, terms[:1]).total
    assert temperature != 1 or found.item() <= kl + 1e-6  # the bucket makes it a lower bound
