"""Combination: weights come from cached numbers alone, sum to 1, and do not depend on the teachers'
order.
"""

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.combine.weights import ROW_FIGURES, combine_targets, required_teachers
from pipeline.config.combine import (
    ByDomainWeights,
    CombineConfig,
    ConfidenceWeights,
    GoldLikelihoodWeights,
    LearnedWeights,
    SoftmaxWeights,
    StaticWeights,
    Weights,
)
from pipeline.errors import CacheError, ConfigError
from pipeline.records import SparseLogprobs, TokenSequence

POSITIONS = 4


def sequence(domain: str = "words") -> TokenSequence:
    ids = np.arange(10, dtype=np.int32)
    return TokenSequence("s", ids, ((2, 4), (6, 8)), "p", domain, ("t",), "stop")


def row(gold: list[float], entropies: list[float] | None = None) -> SparseLogprobs:
    n = len(gold)
    return SparseLogprobs(
        sequence_id="s",
        num_entries=np.ones(n, np.uint8),
        token_ids=np.arange(n, dtype=np.uint32),
        logprobs=np.full(n, -0.5, np.float16),
        counts=np.zeros(0, np.uint8),
        gold_logprobs=np.array(gold, np.float16),
        tail_mass=np.full(n, 0.39, np.float16),
        entropies=np.array(entropies or [1.0] * n, np.float16),
    )


A, B = row([-1, -2, -3, -4]), row([-2, -2, -1, -8])


def static(**weights: float) -> CombineConfig:
    return CombineConfig(method="mixture", weights=StaticWeights(type="static", teachers=weights))


def gold(temperature: float, per: str) -> CombineConfig:
    weights = GoldLikelihoodWeights(type="gold_likelihood", temperature=temperature, per=per)
    return CombineConfig(method="mixture", weights=weights)


def confidence(temperature: float, per: str) -> CombineConfig:
    weights = ConfidenceWeights(type="confidence", temperature=temperature, per=per)
    return CombineConfig(method="mixture", weights=weights)


def routed(config: CombineConfig) -> CombineConfig:
    return config.model_copy(update={"method": "route"})


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


def test_every_weighting_by_softmax_has_a_figure() -> None:
    kinds = [kind for kind in get_args(get_args(Weights)[0]) if issubclass(kind, SoftmaxWeights)]
    assert {get_args(kind.model_fields["type"].annotation)[0] for kind in kinds} == set(ROW_FIGURES)


def test_gold_likelihood_per_token_is_the_softmax() -> None:
    weights = combine_targets(sequence(), (A, B), ["a", "b"], gold(0.5, "token")).teacher_weights
    for j, (x, y) in enumerate(zip([-1, -2, -3, -4], [-2, -2, -1, -8], strict=True)):
        expected = np.exp(x / 0.5) / (np.exp(x / 0.5) + np.exp(y / 0.5))
        assert weights[0, j] == pytest.approx(expected, rel=1e-5)


def test_gold_likelihood_per_sequence_uses_the_mean() -> None:
    weights = combine_targets(sequence(), (A, B), ["a", "b"], gold(1.0, "sequence")).teacher_weights
    expected = 1 / (1 + np.exp(-3.25 + 2.5))
    np.testing.assert_allclose(weights[0], [expected] * POSITIONS, rtol=1e-5)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_confidence_is_the_softmax_of_minus_the_entropy_and_a_flat_teacher_weighs_least(
    per: str,
) -> None:
    sure, flat = row([-9.0] * 4, [0.5, 1.0, 0.25, 2.25]), row([-0.5] * 4, [8.0, 7.0, 9.0, 8.0])
    weights = combine_targets(
        sequence(), (sure, flat), ["a", "b"], confidence(2.0, per)
    ).teacher_weights
    mean = [1.0, 8.0]
    for j, (x, y) in enumerate(zip([0.5, 1.0, 0.25, 2.25], [8.0, 7.0, 9.0, 8.0], strict=True)):
        x, y = (x, y) if per == "token" else mean
        expected = math.exp(-x / 2) / (math.exp(-x / 2) + math.exp(-y / 2))
        assert weights[0, j] == pytest.approx(expected, rel=1e-5)
        assert weights[1, j] < 0.06


FIGURES = st.lists(st.integers(-80, 0).map(lambda n: n / 4), min_size=4, max_size=4)


@given(
    figures=st.lists(st.tuples(FIGURES, FIGURES), min_size=2, max_size=4),
    temperature=st.floats(0.05, 10),
    per=st.sampled_from(["token", "sequence"]),
    kind=st.sampled_from([gold, confidence]),
    method=st.sampled_from(["mixture", "route", "product"]),
    order=st.randoms(use_true_random=False),
    lacking=st.integers(0, 5),
)
def test_weights_sum_to_one_and_follow_the_teachers_order(
    figures, temperature, per, kind, method, order, lacking
) -> None:
    """Figures in steps of a quarter are often equal: a tie is decided by name, in any order."""
    config = kind(temperature, per).model_copy(update={"method": method})
    rows = [row(golds, [-x for x in entropies]) for golds, entropies in figures]
    if lacking < len(rows):
        rows[lacking] = None
    names = [f"t{i}" for i in range(len(rows))]
    weights = combine_targets(sequence(), tuple(rows), names, config).teacher_weights
    shuffled = order.sample(range(len(rows)), len(rows))
    again = combine_targets(
        sequence(), tuple(rows[i] for i in shuffled), [names[i] for i in shuffled], config
    ).teacher_weights
    np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-5)
    if lacking < len(rows):
        assert not weights[lacking].any()
    if method == "route":
        assert set(np.unique(weights)) == {0.0, 1.0}
        assert np.array_equal(again, weights[shuffled])
        assert per == "token" or (weights == weights[:, :1]).all()
    np.testing.assert_allclose(again, weights[shuffled], rtol=1e-5, atol=1e-7)


def test_route_takes_the_teacher_with_the_largest_weight_by_token_or_by_sequence() -> None:
    by_token = combine_targets(sequence(), (A, B), ["a", "b"], routed(gold(1.0, "token")))
    np.testing.assert_array_equal(by_token.teacher_weights, [[1, 1, 0, 1], [0, 0, 1, 0]])
    by_sequence = combine_targets(sequence(), (A, B), ["a", "b"], routed(gold(1.0, "sequence")))
    np.testing.assert_array_equal(by_sequence.teacher_weights, [[1] * 4, [0] * 4])
    # the largest weight among teachers that have scored the sequence
    alone = combine_targets(sequence(), (None, B), ["a", "b"], routed(static(a=3, b=1)))
    np.testing.assert_array_equal(alone.teacher_weights, [[0] * 4, [1] * 4])
    # among equals the first by name, wherever it stands
    equal = combine_targets(sequence(), (A, A), ["z", "b"], routed(gold(1.0, "token")))
    np.testing.assert_array_equal(equal.teacher_weights, [[0] * 4, [1] * 4])


def test_routes_that_nothing_decides_are_refused() -> None:
    tied = {"type": "by_domain", "domains": {"x": {"a": 2, "b": 1}, "y": {"a": 1, "b": 1, "c": 0}}}
    with pytest.raises(ValueError, match=r"\['a', 'b'\] share 1: give one of them more"):
        CombineConfig.model_validate({"method": "route", "weights": tied})
    CombineConfig.model_validate({"method": "mixture", "weights": tied})


def test_learned_weights_of_a_product_are_refused() -> None:
    with pytest.raises(ValueError, match="say nothing about a product"):
        CombineConfig(method="product", weights=LearnedWeights(type="learned"))


@pytest.mark.parametrize("config", [static(a=1, b=1), gold(1.0, "token"), gold(1.0, "sequence")])
def test_a_teacher_that_lacks_the_sequence_weighs_nothing(config: CombineConfig) -> None:
    weights = combine_targets(sequence(), (A, None), ["a", "b"], config).teacher_weights
    np.testing.assert_array_equal(weights, [[1.0] * POSITIONS, [0.0] * POSITIONS])


@pytest.mark.parametrize("config", [static(a=0, b=1), gold(1.0, "sequence")])
def test_a_sequence_that_nobody_covers_is_an_error(config: CombineConfig) -> None:
    rows = (A, None) if isinstance(config.weights, StaticWeights) else (None, None)
    with pytest.raises(CacheError, match="no teacher with a weight above 0 has scored sequence s"):
        combine_targets(sequence(), rows, ["a", "b"], config)


def test_rows_of_another_length_are_refused() -> None:
    with pytest.raises(CacheError, match=r"3 positions .* which has 4"):
        combine_targets(sequence(), (row([-1, -1, -1]),), ["a"], static(a=1))
