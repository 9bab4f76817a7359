"""Weight of each teacher's cached row in the targets of one sequence.

`mixture` means p = sum_m w_m p_m, and `route` is the same with all weight on one teacher. Every
teacher keeps its own entries and its own tail. A loss that is linear in p is summed over the
teachers with these weights, which is exact; no union of ids is formed here. `product` forms one, in
`pipeline/combine/product.py`.

Weights come from cached numbers alone: they depend on the sequence, not on batch, rank or order.
Legend: M teachers in the config's order, P positions.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.config.combine import (
    ByDomainWeights,
    CombineConfig,
    LearnedWeights,
    SoftmaxWeights,
    StaticWeights,
)
from pipeline.errors import CacheError, ConfigError
from pipeline.records import CombinedTargets, SparseLogprobs, TokenSequence

ROW_FIGURES: dict[str, Callable[[SparseLogprobs], np.ndarray]] = {
    "gold_likelihood": lambda row: row.gold_logprobs,
    "confidence": lambda row: -row.entropies,
}
"""Figures of a row at each position, in nats, by the type of the weights that are their softmax."""


def combine_targets(
    sequence: TokenSequence,
    rows: tuple[SparseLogprobs | None, ...],
    teachers: list[str],
    config: CombineConfig,
) -> CombinedTargets:
    """Weighs the teachers' rows of one sequence.

    A teacher that has not scored the sequence gets weight 0, and the other weights are scaled to
    sum to 1. Learned weights must have become weights `by_domain` before, by `with_learned`.

    Raises:
        CacheError: no teacher with a weight above 0 has scored the sequence, or a row has another
            number of positions than the sequence.
    """
    for teacher, row in zip(teachers, rows, strict=True):
        if row is not None and row.num_positions != sequence.num_positions:
            raise CacheError(
                f"the cache of teacher {teacher!r} holds {row.num_positions} positions for "
                f"sequence {sequence.sequence_id}, which has {sequence.num_positions}; run "
                "`polystill cache verify CONFIG`"
            )
    weights_MP = _weights(sequence, rows, teachers, config)
    covered_M = np.array([row is not None for row in rows])
    weights_MP = np.where(covered_M[:, None], weights_MP, 0.0)
    sums_P = weights_MP.sum(axis=0)
    if (sums_P <= 0).any():
        raise CacheError(
            f"no teacher with a weight above 0 has scored sequence {sequence.sequence_id} (domain "
            f"{sequence.domain!r}): run the score stage again, or give a weight to a teacher that "
            "has scored it"
        )
    if config.method == "route":
        weights_MP, sums_P = _routed(weights_MP, teachers), 1.0
    return CombinedTargets(sequence, rows, (weights_MP / sums_P).astype(np.float32))


def required_teachers(config: CombineConfig, teachers: list[str], domain: str) -> set[str]:
    """Teachers that can have a weight above 0 in a domain."""
    weights = config.weights
    if isinstance(weights, StaticWeights | ByDomainWeights):
        table = _table(weights, domain)
        return {name for name in teachers if table.get(name, 0.0) > 0}
    return set(teachers)


def _table(weights: StaticWeights | ByDomainWeights, domain: str) -> dict[str, float]:
    if isinstance(weights, StaticWeights):
        return weights.teachers
    if domain not in weights.domains:
        raise ConfigError(
            f"combine.weights has no weights for domain {domain!r}, only for "
            f"{sorted(weights.domains)}: add the domain"
        )
    return weights.domains[domain]


def _weights(
    sequence: TokenSequence,
    rows: tuple[SparseLogprobs | None, ...],
    teachers: list[str],
    config: CombineConfig,
) -> np.ndarray:
    """Weights up to a common factor at each position, for all teachers: float64[M, P]."""
    weights, shape = config.weights, (len(teachers), sequence.num_positions)
    assert not isinstance(weights, LearnedWeights), "with_learned comes before combining"
    if isinstance(weights, StaticWeights | ByDomainWeights):
        table = _table(weights, sequence.domain)
        return np.broadcast_to(np.array([[table.get(name, 0.0)] for name in teachers]), shape)
    return _softmax(weights, rows, shape)


def _softmax(
    weights: SoftmaxWeights, rows: tuple[SparseLogprobs | None, ...], shape: tuple[int, int]
) -> np.ndarray:
    """Softmax over the teachers, up to a common factor at each position: float64[M, P].

    All weights are 0 if no teacher has a figure at some position.
    """
    figure = ROW_FIGURES[weights.type]
    figures_MP = np.full(shape, -np.inf)
    for m, row in enumerate(rows):
        if row is not None:
            figures_MP[m] = figure(row).astype(np.float64)
    if weights.per == "sequence":
        figures_MP = np.broadcast_to(figures_MP.mean(axis=1, keepdims=True), shape)
    if np.isneginf(figures_MP).all(axis=0).any():
        return np.zeros(shape)
    scaled_MP = figures_MP / weights.temperature
    return np.exp(scaled_MP - scaled_MP.max(axis=0))


def _routed(weights_MP: np.ndarray, teachers: list[str]) -> np.ndarray:
    """Weight 1 for the teacher with the largest weight, else 0; the first by name wins a tie."""
    by_name = np.array(sorted(range(len(teachers)), key=teachers.__getitem__))
    chosen_P = by_name[weights_MP[by_name].argmax(axis=0)]
    return np.equal.outer(np.arange(len(teachers)), chosen_P).astype(np.float64)
