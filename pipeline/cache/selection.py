"""Selection of the captured entries that are kept: from wide arrays to a ragged cache row.

Legend: P positions, K captured entries, N kept entries of all positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pipeline.cache.row_checks import ID_BITS
from pipeline.config.scoring import HeadAndSampled, Sampled, Selection, TopK, TopP
from pipeline.errors import CacheError
from pipeline.fingerprint import digest_bytes
from pipeline.records import SparseLogprobs


@dataclass(frozen=True)
class CapturedDistributions:
    """The distributions of one sequence as the engine returned them.

    Attributes:
        sequence_id: id of the sequence.
        token_ids_PK: integer ids, most probable first.
        logprobs_PK: float32, descending, normalised over the full vocabulary.
        gold_logprobs_P: float32.
    """

    sequence_id: str
    token_ids_PK: np.ndarray
    logprobs_PK: np.ndarray
    gold_logprobs_P: np.ndarray

    @cached_property
    def stored_PK(self) -> np.ndarray:
        """float16[P, K]: the log-probabilities as they are stored, -inf where float16 has none."""
        with np.errstate(over="ignore"):  # what float16 cannot hold has probability zero
            return self.logprobs_PK.astype(np.float16)

    @cached_property
    def stored_probabilities_PK(self) -> np.ndarray:
        """float64[P, K]: the probabilities of the stored log-probabilities."""
        return np.exp(self.stored_PK.astype(np.float64))

    @cached_property
    def is_finite_PK(self) -> np.ndarray:
        """bool[P, K]: which entries have a probability above zero as they are stored."""
        return np.isfinite(self.stored_PK)

    def check_values(self, num_rows: int) -> None:
        """Checks that log-probabilities are numbers and ids are the teacher's.

        Args:
            num_rows: number of ids that the teacher has.

        Raises:
            CacheError: a log-probability is NaN, or an id is none of the teacher's.
        """
        no_number_P = np.isnan(self.gold_logprobs_P) | np.isnan(self.logprobs_PK).any(axis=1)
        if no_number_P.any():
            raise CacheError(
                f"sequence {self.sequence_id}: position {int(np.argmax(no_number_P))} has a "
                "log-probability that is NaN: the teacher computes wrongly; look at its dtype and "
                "quantization"
            )
        ids_PK = self.token_ids_PK
        wrong_PK = ((ids_PK < 0) | (ids_PK >= num_rows)) & self.is_finite_PK
        if wrong_PK.any():
            j, k = np.argwhere(wrong_PK)[0]
            raise CacheError(
                f"sequence {self.sequence_id}: position {j} has the token id {ids_PK[j, k]}, but "
                f"the teacher has the ids 0 to {num_rows - 1}: correct the teacher's `model`"
            )

    def check_entries(self) -> None:
        """Checks that something can be kept at every position.

        Raises:
            CacheError: a position has no entry of finite log-probability.
        """
        has_entry_P = self.is_finite_PK[:, 0]
        if not has_entry_P.all():
            raise CacheError(
                f"sequence {self.sequence_id}: position {int(np.argmin(has_entry_P))} has no entry "
                "of finite log-probability"
            )


def select(
    sequence_id: str,
    token_ids_PK: np.ndarray,
    logprobs_PK: np.ndarray,
    gold_logprobs_P: np.ndarray,
    rule: Selection,
    *,
    teacher: str,
    vocabulary: int | None = None,
    num_rows: int = 1 << ID_BITS,
) -> SparseLogprobs:
    """Applies a selection rule to captured distributions.

    Entries of probability zero are never kept, and neither are ids that no tokenizer has (the
    padding of an embedding matrix): their mass is part of the tail.

    `tail_mass` is the probability outside the kept entries, computed from the log-probabilities as
    they are stored; with draws it is the probability outside the captured entries. It is never
    below 0. `entropies` is the lower bound `-sum p log p - tail * log p_K` over the captured
    entries, with p_K the smallest captured probability.

    Args:
        token_ids_PK: integer ids, most probable first.
        logprobs_PK: float32, descending, normalised over the full vocabulary.
        gold_logprobs_P: float32.
        teacher: name of the teacher for the draws, such as the fingerprint of its identity: draws
            depend on it, on the sequence's id and on the position, and on nothing else.
        vocabulary: number of ids that the tokenizer has; None if the teacher has no others.
        num_rows: number of ids that the teacher has, the rows of its LM head.

    Raises:
        CacheError: the entries are no distributions over the teacher's ids, or a position has no
            entry of finite log-probability, or next to no mass to draw from.
    """
    captured = CapturedDistributions(sequence_id, token_ids_PK, logprobs_PK, gold_logprobs_P)
    captured.check_values(num_rows)
    if vocabulary is not None:
        token_ids_PK, logprobs_PK = _padding_last(token_ids_PK, logprobs_PK, vocabulary)
        captured = CapturedDistributions(sequence_id, token_ids_PK, logprobs_PK, gold_logprobs_P)
    captured.check_entries()
    return SELECTIONS[type(rule)](captured, rule, teacher)


def _padding_last(
    token_ids_PK: np.ndarray, logprobs_PK: np.ndarray, vocabulary: int
) -> tuple[np.ndarray, np.ndarray]:
    """Entries whose ids lie below a bound in their order, then the others with probability zero."""
    is_padding_PK = token_ids_PK >= vocabulary
    order_PK = np.argsort(is_padding_PK, axis=1, kind="stable")
    logprobs_PK = np.where(is_padding_PK, -np.inf, logprobs_PK)
    return (
        np.take_along_axis(token_ids_PK, order_PK, axis=1),
        np.take_along_axis(logprobs_PK, order_PK, axis=1),
    )


def without_padding(row: SparseLogprobs, vocabulary: int) -> SparseLogprobs:
    """Row whose entries of ids at or above a bound are part of the tail.

    Rows that were selected without the bound can hold such entries. The other draws of a position
    stand for as much mass each as before.

    Args:
        vocabulary: number of ids that are kept.

    Raises:
        CacheError: a position would have no entry left.
    """
    kept_N = row.token_ids < vocabulary
    if kept_N.all():
        return row
    positions = np.repeat(np.arange(row.num_positions), row.num_entries)

    def count(which_N: np.ndarray) -> np.ndarray:
        return np.bincount(positions[which_N], minlength=row.num_positions)

    if not count(kept_N).all():
        raise CacheError(
            f"sequence {row.sequence_id}: at position {int(np.argmin(count(kept_N)))} every cached "
            f"entry has an id of {vocabulary} or more, which the student lacks: choose a student "
            "with more rows in its vocabulary"
        )
    exact_N = row.is_exact_N
    masses_N = probabilities(replace(row, renormalised=False))
    lost_P = np.bincount(positions[~kept_N], weights=masses_N[~kept_N], minlength=row.num_positions)
    return replace(
        row,
        num_entries=count(kept_N).astype(np.uint8),
        token_ids=row.token_ids[kept_N],
        logprobs=row.logprobs[kept_N[exact_N]],
        counts=row.counts[kept_N[~exact_N]],
        tail_mass=np.clip(row.tail_mass + lost_P, 0.0, 1.0).astype(np.float16),
        num_head=count(kept_N & exact_N).astype(np.uint8) if row.is_drawn else row.num_head,
    )


def _top_k(captured: CapturedDistributions, rule: TopK, teacher: str) -> SparseLogprobs:
    """The first `max_entries` entries of every position."""
    return _exact_entries(captured, np.full(len(captured.stored_PK), rule.max_entries))


def _top_p(captured: CapturedDistributions, rule: TopP, teacher: str) -> SparseLogprobs:
    """The smallest prefix whose mass reaches `mass`, at most `max_entries` entries."""
    return _exact_entries(captured, _num_to_reach(captured, rule.mass, rule.max_entries))


def _sampled(captured: CapturedDistributions, rule: Sampled, teacher: str) -> SparseLogprobs:
    """Ids drawn in proportion to their probability."""
    row = _exact_entries(captured, np.zeros(len(captured.stored_PK), dtype=np.int64))
    return _with_draws(row, captured, rule, teacher)


def _head_and_sampled(
    captured: CapturedDistributions, rule: HeadAndSampled, teacher: str
) -> SparseLogprobs:
    """A prefix like that of `top_p`, and draws from the other captured entries."""
    num_exact_P = _num_to_reach(captured, rule.head_mass, rule.max_head_entries)
    return _with_draws(_exact_entries(captured, num_exact_P), captured, rule, teacher)


SELECTIONS: dict[type, Callable[[CapturedDistributions, Any, str], SparseLogprobs]] = {
    TopK: _top_k,
    TopP: _top_p,
    Sampled: _sampled,
    HeadAndSampled: _head_and_sampled,
}
"""The function that applies each kind of rule; a new kind needs one function and its entry here."""


def entropy_lower_bound(logprobs_PK: np.ndarray) -> np.ndarray:
    """float64[P], nats: the tail is at least as surprising as the least probable captured entry."""
    logs_PK = np.where(np.isfinite(logprobs_PK), logprobs_PK, 0.0).astype(np.float64)
    probabilities_PK = np.where(np.isfinite(logprobs_PK), np.exp(logs_PK), 0.0)
    tail_P = np.clip(1.0 - probabilities_PK.sum(axis=1), 0.0, None)
    return np.maximum(-(probabilities_PK * logs_PK).sum(axis=1) - tail_P * logs_PK.min(axis=1), 0.0)


def _num_to_reach(captured: CapturedDistributions, mass: float, most: int) -> np.ndarray:
    """int64[P]: length of the smallest prefix whose mass reaches `mass`, from 1 to `most`."""
    probabilities_PK = captured.stored_probabilities_PK
    before_PK = np.cumsum(probabilities_PK, axis=1) - probabilities_PK
    return np.clip((before_PK < mass).sum(axis=1), 1, most)


def _exact_entries(captured: CapturedDistributions, num_wanted_P: np.ndarray) -> SparseLogprobs:
    """A row of the first entries of every position, as many as wanted and of finite
    log-probability.
    """
    is_finite_PK = captured.is_finite_PK
    num_exact_P = np.minimum(num_wanted_P, is_finite_PK.sum(axis=1))
    exact_PK = _is_exact(captured, num_exact_P)
    exact_mass_P = np.where(exact_PK, captured.stored_probabilities_PK, 0.0).sum(axis=1)
    entropies_P = entropy_lower_bound(np.where(is_finite_PK, captured.logprobs_PK, -np.inf))
    gold_logprobs_P = np.maximum(captured.gold_logprobs_P, np.finfo(np.float16).min)
    return SparseLogprobs(
        sequence_id=captured.sequence_id,
        num_entries=num_exact_P.astype(np.uint8),
        token_ids=captured.token_ids_PK[exact_PK].astype(np.uint32),
        logprobs=captured.stored_PK[exact_PK],
        counts=np.zeros(0, dtype=np.uint8),
        gold_logprobs=gold_logprobs_P.astype(np.float16),
        tail_mass=np.clip(1.0 - exact_mass_P, 0.0, 1.0).astype(np.float16),
        entropies=entropies_P.astype(np.float16),
    )


def _is_exact(captured: CapturedDistributions, num_exact_P: np.ndarray) -> np.ndarray:
    """bool[P, K]: which captured entries are among the first `num_exact_P`."""
    return np.arange(captured.logprobs_PK.shape[1]) < num_exact_P[:, None]


def _with_draws(
    exact: SparseLogprobs,
    captured: CapturedDistributions,
    rule: Sampled | HeadAndSampled,
    teacher: str,
) -> SparseLogprobs:
    """Adds draws from the other captured entries to a row that holds the exact entries alone.

    The draws of a position stand for the mass that its stored exact entries and tail leave, so that
    the rounding of the exact entries falls to the draws; where no mass is left there are no draws.
    """
    exact_PK = _is_exact(captured, exact.num_entries)
    captured_PK = np.where(
        captured.is_finite_PK, np.exp(captured.logprobs_PK.astype(np.float64)), 0.0
    )
    tail_P = np.clip(1.0 - captured_PK.sum(axis=1), 0.0, 1.0).astype(np.float16)
    left_P = remaining_mass(replace(exact, tail_mass=tail_P))
    remainder_PK = np.where(exact_PK | (left_P <= 0)[:, None], 0.0, captured_PK)
    counts_PK = draw(remainder_PK, rule.num_draws, exact.sequence_id, teacher)
    kept_PK = exact_PK | (counts_PK > 0)
    if not kept_PK.any(axis=1).all():
        position = int(np.argmin(kept_PK.any(axis=1)))
        raise CacheError(
            f"sequence {exact.sequence_id}: at position {position} the captured entries hold a "
            f"mass of {captured_PK[position].sum():.1e}, too little to draw from; raise "
            "scoring.num_logprobs"
        )
    return replace(
        exact,
        num_entries=kept_PK.sum(axis=1).astype(np.uint8),
        token_ids=captured.token_ids_PK[kept_PK].astype(np.uint32),
        counts=counts_PK[counts_PK > 0].astype(np.uint8),
        tail_mass=tail_P,
        num_head=exact.num_entries,
        renormalised=rule.renormalise,
    )


def probabilities(row: SparseLogprobs) -> np.ndarray:
    """float64[N]: the probability of exact entries, and its unbiased estimate for drawn entries.

    An entry drawn `c` of `D` times stands for `c / D` of the mass that exact entries and tail
    leave. If the row is renormalised, all probabilities are divided by the captured mass.
    """
    exact_N = row.is_exact_N
    probabilities_N = np.empty(len(row.token_ids))
    probabilities_N[exact_N] = np.exp(row.logprobs.astype(np.float64))
    if row.is_drawn:
        positions = np.repeat(np.arange(row.num_positions), row.num_entries)[~exact_N]
        draws_P = np.bincount(positions, weights=row.counts, minlength=row.num_positions)
        per_draw_P = remaining_mass(row) / np.maximum(draws_P, 1.0)
        probabilities_N[~exact_N] = row.counts * per_draw_P[positions]
    if row.renormalised:
        captured_P = 1.0 - row.tail_mass.astype(np.float64)
        probabilities_N /= np.repeat(captured_P, row.num_entries)
    return probabilities_N


def remaining_mass(row: SparseLogprobs) -> np.ndarray:
    """float64[P], at least 0: mass that the stored exact entries and the tail leave to draws."""
    num_exact_P = row.num_head if row.is_drawn else row.num_entries
    positions = np.repeat(np.arange(row.num_positions), num_exact_P)
    exact_P = np.bincount(
        positions, weights=np.exp(row.logprobs.astype(np.float64)), minlength=row.num_positions
    )
    return np.clip(1.0 - row.tail_mass.astype(np.float64) - exact_P, 0.0, None)


def draw_variance(row: SparseLogprobs) -> np.ndarray:
    """float64[P]: largest variance that draws can give the estimate, summed over the vocabulary.

    It is the variance of D independent draws, `R^2 (1 - sum r^2) / D` for probabilities r that
    stand for a mass R, estimated by `R^2 (1 - sum (c / D)^2) / (D - 1)` from the counts c.
    Systematic draws vary less, on text by half and more; the counts do not tell by how much.
    """
    estimates_N, exact_N = probabilities(row), row.is_exact_N
    positions = np.repeat(np.arange(row.num_positions), row.num_entries)[~exact_N]
    drawn, num_positions = estimates_N[~exact_N], row.num_positions
    draws_P = np.bincount(positions, weights=row.counts, minlength=num_positions)
    mass_P = np.bincount(positions, weights=drawn, minlength=num_positions)
    squares_P = np.bincount(positions, weights=drawn**2, minlength=num_positions)
    return (mass_P**2 - squares_P) / np.maximum(draws_P - 1.0, 1.0)


def draw(weights_PK: np.ndarray, num_draws: int, sequence_id: str, teacher: str) -> np.ndarray:
    """int64[P, K]: how often each entry is drawn, on average in proportion to its weight.

    The draws of a position are systematic (Madow 1949): evenly spaced over the summed weights, from
    one random start. An entry that D independent draws would hit x times on average is hit
    `floor(x)` or `ceil(x)` times, so that likely entries are known almost exactly.

    A counter-based generator (Philox) keyed by sequence and teacher gives each position its start.
    Positions without weight get no draws.

    Args:
        weights_PK: float64, at least 0, with any sum.
    """
    key = int(digest_bytes(sequence_id.encode(), teacher.encode()), 16)
    start_P1 = np.random.Generator(np.random.Philox(key=key)).random((len(weights_PK), 1))
    sums_PK = np.cumsum(weights_PK, axis=1)
    totals_P1 = sums_PK[:, -1:]
    shares_PK = np.divide(sums_PK, totals_P1, out=np.zeros_like(sums_PK), where=totals_P1 > 0)
    hits_PK = np.minimum(np.floor(num_draws * shares_PK + start_P1), num_draws)
    return np.diff(hits_PK, axis=1, prepend=0.0).astype(np.int64)
