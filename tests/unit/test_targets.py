"""Combination: weights come from cached numbers alone, sum to 1, and do not depend on the teachers'
order.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config_targets import (
    ByDomainWeights,
    CombineConfig,
    GoldLikelihoodWeights,
    StaticWeights,
)
from pipeline.errors import CacheError, ConfigError
from pipeline.records import SparseLogprobs, TokenSequence
from pipeline.targets import combine_targets, required_teachers

POSITIONS = 4


def sequence(domain: str = "words") -> TokenSequence:
    ids = np.arange(10, dtype=np.int32)
    return TokenSequence("s", ids, ((2, 4), (6, 8)), "p", domain, ("t",), "stop")


def row(gold: list[float]) -> SparseLogprobs:
    n = len(gold)
    return SparseLogprobs(
        sequence_id="s",
        num_entries=np.ones(n, np.uint8),
        token_ids=np.arange(n, dtype=np.uint32),
        logprobs=np.full(n, -0.5, np.float16),
        counts=np.zeros(0, np.uint8),
        gold_logprobs=np.array(gold, np.float16),
        tail_mass=np.full(n, 0.39, np.float16),
        entropies=np.ones(n, np.float16),
    )


A, B = row([-1, -2, -3, -4]), row([-2, -2, -1, -8])


def static(**weights: float) -> CombineConfig:
    return CombineConfig(method="mixture", weights=StaticWeights(type="static", teachers=weights))


def gold(temperature: float, per: str) -> CombineConfig:
    weights = GoldLikelihoodWeights(type="gold_likelihood", temperature=temperature, per=per)
    return CombineConfig(method="mixture", weights=weights)


def test_static_weights_are_scaled_to_sum_to_one() -> None:
    weights = combine_targets(sequence(), (A, B), ["a", "b"], static(a=3, b=1)).teacher_weights
    np.testing.assert_allclose(weights, [[0.75] * POSITIONS, [0.25] * POSITIONS])


def test_by_domain_uses_the_domain_and_refuses_an_unknown_one() -> None:
    table = {"words": {"b": 1.0}, "numbers": {"a": 1.0}}
    config = CombineConfig(
        method="mixture", weights=ByDomainWeights(type="by_domain", domains=table)
    )
    weights = combine_targets(sequence("words"), (A, B), ["a", "b"], config).teacher_weights
    np.testing.assert_array_equal(weights, [[0.0] * POSITIONS, [1.0] * POSITIONS])
    assert required_teachers(config, ["a", "b"], "words") == {"b"}
    with pytest.raises(ConfigError, match="no weights for domain 'other'"):
        combine_targets(sequence("other"), (A, B), ["a", "b"], config)


def test_gold_likelihood_per_token_is_the_softmax() -> None:
    weights = combine_targets(sequence(), (A, B), ["a", "b"], gold(0.5, "token")).teacher_weights
    for j, (x, y) in enumerate(zip([-1, -2, -3, -4], [-2, -2, -1, -8], strict=True)):
        expected = np.exp(x / 0.5) / (np.exp(x / 0.5) + np.exp(y / 0.5))
        assert weights[0, j] == pytest.approx(expected, rel=1e-5)


def test_gold_likelihood_per_sequence_uses_the_mean() -> None:
    weights = combine_targets(sequence(), (A, B), ["a", "b"], gold(1.0, "sequence")).teacher_weights
    expected = 1 / (1 + np.exp(-3.25 + 2.5))
    np.testing.assert_allclose(weights[0], [expected] * POSITIONS, rtol=1e-5)


@given(
    golds=st.lists(st.lists(st.floats(-20, 0), min_size=4, max_size=4), min_size=2, max_size=4),
    temperature=st.floats(0.05, 10),
    per=st.sampled_from(["token", "sequence"]),
)
def test_weights_sum_to_one_and_follow_the_teachers_order(
    golds: list, temperature: float, per: str
) -> None:
    rows, names = tuple(row(g) for g in golds), [f"t{i}" for i in range(len(golds))]
    weights = combine_targets(sequence(), rows, names, gold(temperature, per)).teacher_weights
    backward = combine_targets(
        sequence(), rows[::-1], names[::-1], gold(temperature, per)
    ).teacher_weights
    np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-5)
    np.testing.assert_allclose(weights, backward[::-1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("config", [static(a=1, b=1), gold(1.0, "token"), gold(1.0, "sequence")])
def test_a_teacher_that_lacks_the_sequence_weighs_nothing(config: CombineConfig) -> None:
    weights = combine_targets(sequence(), (A, None), ["a", "b"], config).teacher_weights
    np.testing.assert_array_equal(weights, [[1.0] * POSITIONS, [0.0] * POSITIONS])


@pytest.mark.parametrize("config", [static(a=0, b=1), gold(1.0, "sequence")])
def test_a_sequence_that_nobody_covers_is_an_error(config: CombineConfig) -> None:
    rows = (A, None) if isinstance(config.weights, StaticWeights) else (None, None)
    with pytest.raises(CacheError, match="no teacher of positive weight has scored sequence s"):
        combine_targets(sequence(), rows, ["a", "b"], config)


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(CacheError, match=r"3 positions .* which has 4"):
        combine_targets(sequence(), (row([-1, -1, -1]),), ["a"], static(a=1))
