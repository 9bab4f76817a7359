"""Which captured entries are kept: from the engine's wide arrays to a ragged row of the cache.

Legend: P positions, K captured entries, N kept entries of all positions.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.config.scoring import HeadAndSampled, Sampled, Selection, TopK, TopP
from pipeline.errors import CacheError
from pipeline.fingerprint import digest_bytes
from pipeline.records import SparseLogprobs


def select(
    sequence_id: str,
    token_ids_PK: np.ndarray,
    logprobs_PK: np.ndarray,
    gold_logprobs_P: np.ndarray,
    rule: Selection,
    *,
    teacher: str,
) -> SparseLogprobs:
    """Applies a selection rule to captured distributions.

    `top_k` keeps the first `max_entries`; `top_p` the smallest prefix whose mass reaches `mass`, at
    most `max_entries`. `sampled` keeps ids drawn in proportion to their probability,
    `head_and_sampled` a prefix like that of `top_p` and draws from the other captured entries.
    Entries of probability zero are never kept.

    `tail_mass` is what lies outside the kept entries, from the log-probabilities as they are
    stored; with draws it is what lies outside the captured ones. It is never below 0. `entropies`
    is the lower bound `-sum p log p - tail * log p_K` over the captured entries, with p_K the
    smallest captured probability.

    Args:
        token_ids_PK: integer ids, most probable first.
        logprobs_PK: float32, descending, normalised over the full vocabulary.
        gold_logprobs_P: float32.
        teacher: what names the teacher to the draws, such as its recipe's fingerprint: draws
            depend on it, on the sequence's id and on the position, and on nothing else.

    Raises:
        CacheError: a position has no entry of finite log-probability, or next to no mass to draw
            from.
    """
    with np.errstate(over="ignore"):  # what float16 cannot hold has probability zero
        stored_PK = logprobs_PK.astype(np.float16)
    finite_PK = np.isfinite(stored_PK)
    if not finite_PK[:, 0].all():
        raise CacheError(
            f"sequence {sequence_id}: position {int(np.argmin(finite_PK[:, 0]))} has no finite "
            "entry"
        )
    probabilities_PK = np.exp(stored_PK.astype(np.float64))
    num_head_P = np.minimum(_head_wanted(probabilities_PK, rule), finite_PK.sum(axis=1))
    head_PK = np.arange(logprobs_PK.shape[1]) < num_head_P[:, None]
    head_mass_P = np.where(head_PK, probabilities_PK, 0.0).sum(axis=1)
    row = SparseLogprobs(
        sequence_id=sequence_id,
        num_entries=num_head_P.astype(np.uint8),
        token_ids=token_ids_PK[head_PK].astype(np.uint32),
        logprobs=stored_PK[head_PK],
        counts=np.zeros(0, dtype=np.uint8),
        gold_logprobs=np.maximum(gold_logprobs_P, np.finfo(np.float16).min).astype(np.float16),
        tail_mass=np.clip(1.0 - head_mass_P, 0.0, 1.0).astype(np.float16),
        entropies=entropy_lower_bound(np.where(finite_PK, logprobs_PK, -np.inf)).astype(np.float16),
    )
    if isinstance(rule, TopK | TopP):
        return row
    captured_PK = np.where(finite_PK, np.exp(logprobs_PK.astype(np.float64)), 0.0)
    return _with_draws(row, token_ids_PK, captured_PK, head_PK, rule, teacher)


def entropy_lower_bound(logprobs_PK: np.ndarray) -> np.ndarray:
    """float64[P], nats: the tail is at least as surprising as the least probable captured entry."""
    logs_PK = np.where(np.isfinite(logprobs_PK), logprobs_PK, 0.0).astype(np.float64)
    probabilities_PK = np.where(np.isfinite(logprobs_PK), np.exp(logs_PK), 0.0)
    tail_P = np.clip(1.0 - probabilities_PK.sum(axis=1), 0.0, None)
    return np.maximum(-(probabilities_PK * logs_PK).sum(axis=1) - tail_P * logs_PK.min(axis=1), 0.0)


def _head_wanted(probabilities_PK: np.ndarray, rule: Selection) -> np.ndarray:
    if isinstance(rule, Sampled):
        return np.zeros(len(probabilities_PK), dtype=np.int64)
    if isinstance(rule, TopK):
        return np.full(len(probabilities_PK), rule.max_entries)
    mass, most = (
        (rule.head_mass, rule.max_head_entries)
        if isinstance(rule, HeadAndSampled)
        else (rule.mass, rule.max_entries)
    )
    before_PK = np.cumsum(probabilities_PK, axis=1) - probabilities_PK
    return np.clip((before_PK < mass).sum(axis=1), 1, most)


def _with_draws(
    head: SparseLogprobs,
    token_ids_PK: np.ndarray,
    captured_PK: np.ndarray,
    head_PK: np.ndarray,
    rule: Sampled | HeadAndSampled,
    teacher: str,
) -> SparseLogprobs:
    """Adds draws from outside the head to a row that holds the head alone.

    The draws of a position stand for what its stored head and tail leave, so that the rounding of
    the head falls to them; where nothing is left there are none.
    """
    tail_P = np.clip(1.0 - captured_PK.sum(axis=1), 0.0, 1.0).astype(np.float16)
    left_P = remaining_mass(replace(head, tail_mass=tail_P))
    remainder_PK = np.where(head_PK | (left_P <= 0)[:, None], 0.0, captured_PK)
    counts_PK = draw(remainder_PK, rule.num_draws, head.sequence_id, teacher)
    kept_PK = head_PK | (counts_PK > 0)
    if not kept_PK.any(axis=1).all():
        position = int(np.argmin(kept_PK.any(axis=1)))
        raise CacheError(
            f"sequence {head.sequence_id}: at position {position} the captured entries hold a mass "
            f"of {captured_PK[position].sum():.1e}, too little to draw from: raise num_logprobs"
        )
    return replace(
        head,
        num_entries=kept_PK.sum(axis=1).astype(np.uint8),
        token_ids=token_ids_PK[kept_PK].astype(np.uint32),
        counts=counts_PK[counts_PK > 0].astype(np.uint8),
        tail_mass=tail_P,
        num_head=head.num_entries,
        renormalised=rule.renormalise,
    )


def probabilities(row: SparseLogprobs) -> np.ndarray:
    """float64[N]: the probability of head entries, and its unbiased estimate for drawn ones.

    An entry drawn `c` of `D` times stands for `c / D` of what head and tail leave. If the row is
    renormalised, all are divided by the captured mass.
    """
    head_N = row.head_N
    found_N = np.empty(len(row.token_ids))
    found_N[head_N] = np.exp(row.logprobs.astype(np.float64))
    if row.is_drawn:
        positions = np.repeat(np.arange(row.num_positions), row.num_entries)[~head_N]
        draws_P = np.bincount(positions, weights=row.counts, minlength=row.num_positions)
        per_draw_P = remaining_mass(row) / np.maximum(draws_P, 1.0)
        found_N[~head_N] = row.counts * per_draw_P[positions]
    if row.renormalised:
        found_N /= np.repeat(1.0 - row.tail_mass.astype(np.float64), row.num_entries)
    return found_N


def remaining_mass(row: SparseLogprobs) -> np.ndarray:
    """float64[P], at least 0: what the stored head and tail of a row leave to its draws."""
    num_head = row.num_head if row.is_drawn else row.num_entries
    positions = np.repeat(np.arange(row.num_positions), num_head)
    head_P = np.bincount(
        positions, weights=np.exp(row.logprobs.astype(np.float64)), minlength=row.num_positions
    )
    return np.clip(1.0 - row.tail_mass.astype(np.float64) - head_P, 0.0, None)


def draw_variance(row: SparseLogprobs) -> np.ndarray:
    """float64[P]: most variance that draws give the estimate, summed over the vocabulary.

    What D independent draws would give, `R^2 (1 - sum r^2) / D` for probabilities r that stand for
    a mass R, estimated by `R^2 (1 - sum (c / D)^2) / (D - 1)` from the counts c. Systematic draws
    vary less, on text by half and more; by how much cannot be told from the counts.
    """
    estimates_N, head_N = probabilities(row), row.head_N
    positions = np.repeat(np.arange(row.num_positions), row.num_entries)[~head_N]
    drawn, num_positions = estimates_N[~head_N], row.num_positions
    draws_P = np.bincount(positions, weights=row.counts, minlength=num_positions)
    mass_P = np.bincount(positions, weights=drawn, minlength=num_positions)
    squares_P = np.bincount(positions, weights=drawn**2, minlength=num_positions)
    return (mass_P**2 - squares_P) / np.maximum(draws_P - 1.0, 1.0)


def draw(weights_PK: np.ndarray, num_draws: int, sequence_id: str, teacher: str) -> np.ndarray:
    """int64[P, K]: how often each entry is drawn, on average in proportion to its weight.

    The draws of a position are systematic (Madow 1949): evenly spaced over the summed weights, from
    one random start. An entry that D independent draws would hit x times on average is hit
    `floor(x)` or `ceil(x)` times, so that likely entries are known almost exactly.

    A counter-based generator (Philox) keyed by sequence and teacher gives position j its start.
    Positions without weight get no draws.

    Args:
        weights_PK: float64, at least 0; of any sum.
    """
    key = int(digest_bytes(sequence_id.encode(), teacher.encode()), 16)
    start_P1 = np.random.Generator(np.random.Philox(key=key)).random((len(weights_PK), 1))
    sums_PK = np.cumsum(weights_PK, axis=1)
    totals_P1 = sums_PK[:, -1:]
    shares_PK = np.divide(sums_PK, totals_P1, out=np.zeros_like(sums_PK), where=totals_P1 > 0)
    hits_PK = np.minimum(np.floor(num_draws * shares_PK + start_P1), num_draws)
    return np.diff(hits_PK, axis=1, prepend=0.0).astype(np.int64)
