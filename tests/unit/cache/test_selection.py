"""Selection: what is kept, the tail, and the entropy bound, against plain loops."""

from functools import partial
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache.selection import SELECTIONS
from pipeline.cache.selection import select as select_for
from pipeline.config.scoring import Selection, TopK, TopP
from pipeline.errors import CacheError

select = partial(select_for, teacher="t")


def capture(
    rng: np.random.Generator, positions: int, vocabulary: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    logits = rng.normal(0, 2, (positions, vocabulary))
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    order = np.argsort(-logs, axis=1)[:, :width]
    return order, np.take_along_axis(logs, order, 1).astype(np.float32)


def test_every_rule_of_the_config_can_be_applied() -> None:
    union, _ = get_args(Selection)
    assert SELECTIONS.keys() == set(get_args(union))


@given(seed=st.integers(0, 1000), mass=st.floats(0.05, 1.0), most=st.integers(1, 20))
def test_top_p_keeps_the_smallest_prefix_that_reaches_the_mass(
    seed: int, mass: float, most: int
) -> None:
    ids, logs = capture(np.random.default_rng(seed), 7, 50, 20)
    row = select("s", ids, logs, logs[:, 0], TopP(type="top_p", mass=mass, max_entries=most))
    start = 0
    for j in range(7):
        probabilities = np.exp(logs[j].astype(np.float16).astype(np.float64))
        reached, wanted = 0.0, 0
        while wanted < most and reached < mass:
            reached += probabilities[wanted]
            wanted += 1
        assert row.num_entries[j] == wanted
        np.testing.assert_array_equal(row.token_ids[start : start + wanted], ids[j, :wanted])
        assert row.tail_mass[j] == pytest.approx(1 - probabilities[:wanted].sum(), abs=1e-3)
        start += wanted
    assert start == len(row.token_ids)


def test_top_k_keeps_k_entries() -> None:
    ids, logs = capture(np.random.default_rng(0), 5, 50, 20)
    row = select("s", ids, logs, logs[:, 0], TopK(type="top_k", max_entries=6))
    assert row.num_entries.tolist() == [6] * 5
    np.testing.assert_array_equal(row.token_ids.reshape(5, 6), ids[:, :6])


def test_entries_of_probability_zero_are_never_kept() -> None:
    logs = np.array([[np.log(0.75), np.log(0.25), -np.inf]], np.float32)
    row = select("s", np.array([[4, 5, 6]]), logs, logs[:, 2], TopK(type="top_k", max_entries=3))
    assert row.token_ids.tolist() == [4, 5]
    assert np.isfinite(row.gold_logprobs).all()


def test_a_row_without_a_finite_entry_is_refused() -> None:
    logs = np.array([[-1.0, -2.0], [-np.inf, -np.inf]], np.float32)
    with pytest.raises(CacheError, match="position 1"):
        select("s", np.zeros((2, 2), int), logs, logs[:, 0], TopK(type="top_k", max_entries=1))


def test_the_entropy_bound_is_exact_when_all_is_captured_and_below_otherwise() -> None:
    rng = np.random.default_rng(3)
    ids, logs = capture(rng, 6, 40, 40)
    entropy = -(np.exp(logs) * logs).sum(1)
    exact = select("s", ids, logs, logs[:, 0], TopK(type="top_k", max_entries=4)).entropies
    bound = select(
        "s", ids[:, :8], logs[:, :8], logs[:, 0], TopK(type="top_k", max_entries=4)
    ).entropies
    np.testing.assert_allclose(exact, entropy, atol=5e-3)
    assert (bound <= entropy + 5e-3).all() and (bound > 0.3 * entropy).all()


def test_a_flat_teacher_never_looks_confident() -> None:
    vocabulary, width = 1000, 8
    logs = np.full((1, width), -np.log(vocabulary), np.float32)
    row = select("s", np.arange(width)[None], logs, logs[:, 0], TopK(type="top_k", max_entries=8))
    assert row.entropies[0] == pytest.approx(np.log(vocabulary), rel=0.01)


def test_what_float16_cannot_hold_has_probability_zero() -> None:
    """Some models mask by the smallest float32 where others use minus infinity."""
    masked = np.finfo(np.float32).min
    logs = np.array([[np.log(0.75), np.log(0.25), masked]], np.float32)
    row = select("s", np.array([[4, 5, 6]]), logs, logs[:, 2], TopK(type="top_k", max_entries=3))
    assert row.token_ids.tolist() == [4, 5] and np.isfinite(row.logprobs).all()
    assert np.isfinite(row.entropies).all() and np.isfinite(row.gold_logprobs).all()
