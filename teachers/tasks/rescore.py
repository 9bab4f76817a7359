"""Rescoring: some stored rows are scored again and compared, to judge a cache.

Legend: P positions, K captured entries, N stored entries of all positions, of which E are exact
entries and D were drawn.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.cache.reader import open_cache
from pipeline.fingerprint import digest_ids
from pipeline.layout import CacheLayout
from pipeline.records import SparseLogprobs, TokenSequence
from pipeline.sequences import read_sequences
from teachers.noise import mean_tolerance
from teachers.protocol import CapturedRows, ScoringRequest, Teacher
from teachers.tasks.items import halves_of

logger = logging.getLogger(__name__)

LARGEST_OVER_TOLERANCE = 8.0
"""Largest single difference, as a multiple of the tolerance of means. Over 150 000 values of a real
model in bfloat16 the largest is 13 times the mean, which is a third of the tolerance.
"""
ROUNDING = 2.0**-10
"""Rounding of a stored float16, relative to its size; subtracted from every difference."""
SURPRISE = 25.0
"""Largest surprise in nats; draws from the teacher's own distribution exceed it in at most one row
of 7e9.
"""
TILTS = np.array([-0.9, -0.6, -0.3, -0.1, -0.03, 0.03, 0.1, 0.3, 0.6, 0.9])
"""Values of t at which `draws_surprise` tries its bound: below 0 for draws that are too likely,
above 0 for draws that are too unlikely.
"""
LOWEST = float(np.finfo(np.float16).min)


@dataclass(frozen=True)
class RowDifference:
    """Differences in nats between one stored row and the same row scored now.

    Attributes:
        sequence_id: sequence of the row.
        gold_sum: sum of the differences of the gold tokens.
        gold_max: largest difference of a gold token.
        num_positions: number of gold tokens.
        exact_sum: sum of the differences of the exact entries.
        exact_max: largest difference of an exact entry.
        num_entries: number of exact entries.
        excess: largest difference after the rounding of float16 is subtracted.
        gold_excess: mean difference of the gold tokens after that.
        exact_excess: mean difference of the exact entries after that.
        size: root mean square of the gold tokens' and exact entries' log-probabilities.
        num_draws: number of draws.
        surprise: surprise of the drawn entries under the teacher's present probabilities; 0 without
            draws.
    """

    sequence_id: str
    gold_sum: float
    gold_max: float
    num_positions: int
    exact_sum: float
    exact_max: float
    num_entries: int
    excess: float
    gold_excess: float
    exact_excess: float
    size: float
    num_draws: int
    surprise: float

    def tolerance(self, engine: Mapping[str, Any]) -> float:
        """Mean difference in nats that rounding can cause in this row; in a row of P positions the
        mean itself varies by `1 / sqrt(P)` of its size.

        Args:
            engine: metadata of the engine, with its `dtype` and `num_layers`.
        """
        spread = 1 + 3 / math.sqrt(max(1, self.num_positions))
        return spread * mean_tolerance(engine, np.array([self.size]))

    def is_beyond(self, tolerance: float) -> bool:
        """Whether the row differs from the present one by more than a tolerance in nats: one of its
        means, or a single value by far more.
        """
        return not (
            max(self.gold_excess, self.exact_excess) <= tolerance
            and self.excess <= LARGEST_OVER_TOLERANCE * tolerance
            and self.surprise <= SURPRISE
        )


@dataclass(frozen=True)
class RescoreTask:
    """Rows of one cache whose sequences lie in one sequence shard; nothing is written."""

    cache: CacheLayout
    sequence_shard: str
    sequence_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sequence_ids)

    @property
    def label(self) -> str:
        return f"rows {digest_ids(self.sequence_ids)[:8]} ({len(self)} sequences)"

    def halves(self) -> tuple[RescoreTask, RescoreTask]:
        """The same rows in two tasks."""
        first, second = halves_of(self.sequence_ids)
        return replace(self, sequence_ids=first), replace(self, sequence_ids=second)

    def quarantine(self, error: str) -> None:
        """Writes no quarantine note, since the stored row stays; the pool's report names it."""
        logger.warning("%s cannot be scored again: %s", self.label, error)

    async def run(self, teacher: Teacher) -> list[RowDifference]:
        """Scores the sequences and compares their rows with the stored ones.

        Raises:
            CacheError: a stored row cannot be read.
            TeacherError: the engine cannot score a sequence.
        """
        held = {sequence.sequence_id: sequence for sequence in read_sequences(self.sequence_shard)}
        reader = open_cache(self.cache)
        return await asyncio.gather(
            *(self._compare(teacher, held[i], reader.row(i)) for i in self.sequence_ids)
        )

    async def _compare(
        self, teacher: Teacher, sequence: TokenSequence, stored: SparseLogprobs | None
    ) -> RowDifference:
        assert stored is not None, "only rows that the cache has are rescored"
        first = int(sequence.position_indices[0])
        captured = await teacher.score(ScoringRequest(sequence.input_ids.tolist(), first))
        return row_difference(stored, captured, sequence.position_indices - first)


def row_difference(
    stored: SparseLogprobs, captured: CapturedRows, rows_P: np.ndarray
) -> RowDifference:
    """Compares the gold token and the exact entries of every position, by token id. Drawn entries
    have no log-probability of their own and are judged by `draws_surprise`.

    An exact entry that is no longer among the captured ones is compared with the least probable of
    these, since it can have no more probability now.

    Args:
        stored: the row of the cache.
        captured: rows that the teacher returns now.
        rows_P: index of the captured row of every position.
    """
    ids_PK = captured.token_ids[rows_P]
    logprobs_PK = np.maximum(captured.logprobs[rows_P].astype(np.float64), LOWEST)
    gold_P = np.maximum(captured.gold_logprobs[rows_P].astype(np.float64), LOWEST)
    gold_difference_P = np.abs(stored.gold_logprobs.astype(np.float64) - gold_P)
    position_N = np.repeat(np.arange(stored.num_positions), stored.num_entries)
    is_same_NK = ids_PK[position_N] == stored.token_ids[:, None].astype(np.int64)
    column_N = np.where(is_same_NK.any(axis=1), is_same_NK.argmax(axis=1), -1)
    exact_N = stored.is_exact_N
    kept_E = stored.logprobs.astype(np.float64)
    difference_E = kept_E - logprobs_PK[position_N[exact_N], column_N[exact_N]]
    difference_E = np.where(column_N[exact_N] >= 0, np.abs(difference_E), difference_E.clip(0.0))
    excess_E = (difference_E - ROUNDING * np.abs(kept_E)).clip(0.0)
    excess_P = (gold_difference_P - ROUNDING * np.abs(gold_P)).clip(0.0)
    values = np.concatenate([gold_P, kept_E])
    values = values[values > LOWEST]
    left_PK = np.where(_is_exact(column_N, position_N, exact_N, ids_PK.shape), -np.inf, logprobs_PK)
    return RowDifference(
        sequence_id=stored.sequence_id,
        gold_sum=float(gold_difference_P.sum()),
        gold_max=float(gold_difference_P.max(initial=0.0)),
        num_positions=len(gold_P),
        exact_sum=float(difference_E.sum()),
        exact_max=float(difference_E.max(initial=0.0)),
        num_entries=len(difference_E),
        excess=float(max(excess_P.max(initial=0.0), excess_E.max(initial=0.0))),
        gold_excess=float(excess_P.sum() / max(1, len(excess_P))),
        exact_excess=float(excess_E.sum() / max(1, len(excess_E))),
        size=math.sqrt(np.square(values).sum() / max(1, len(values))),
        num_draws=int(stored.counts.sum(dtype=np.int64)),
        surprise=draws_surprise(
            left_PK, position_N[~exact_N], column_N[~exact_N], stored.counts.astype(np.float64)
        ),
    )


def draws_surprise(
    logprobs_PK: np.ndarray, position_D: np.ndarray, column_D: np.ndarray, counts_D: np.ndarray
) -> float:
    """Surprise of drawn entries under given probabilities, in nats: the less likely, the greater.

    With probabilities r of a position, drawn `n` times, and `S` the sum of `-log r` over all draws,
    Chernoff's bound is `P(S >= s) <= exp(-t s) * prod (sum r^(1 - t))^n` for t > 0, and also bounds
    `P(S <= s)` for t < 0. The result is minus the logarithm of the least bound over some values of
    t. If the draws have these probabilities, the result is at least x with a probability of at most
    `10 exp(-x)`.

    Args:
        logprobs_PK: log-probabilities of the entries that could be drawn, -inf for the others; they
            need not be normalised.
        position_D: position of each drawn entry.
        column_D: column of the entry among the K; -1 if it has none, so that it counts as the least
            probable one.
        counts_D: number of times that the entry was drawn.
    """
    if len(position_D) == 0:
        return 0.0
    rows, place_D = np.unique(position_D, return_inverse=True)
    logs_RK = logprobs_PK[rows]
    logs_RK = logs_RK - np.logaddexp.reduce(logs_RK, axis=1, keepdims=True)
    least_R = np.where(np.isfinite(logs_RK), logs_RK, np.inf).min(axis=1)
    drawn_D = np.where(column_D >= 0, logs_RK[place_D, column_D], least_R[place_D])
    num_draws_R = np.bincount(place_D, weights=counts_D)
    total = float((counts_D * -drawn_D).sum())
    bounds = [
        tilt * total - float(num_draws_R @ np.logaddexp.reduce((1 - tilt) * logs_RK, axis=1))
        for tilt in TILTS
    ]
    return max(0.0, *bounds)


def _is_exact(
    column_N: np.ndarray, position_N: np.ndarray, exact_N: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """bool[P, K]: whether a captured entry is stored as an exact entry."""
    is_exact_PK = np.zeros(shape, dtype=bool)
    known_N = exact_N & (column_N >= 0)
    is_exact_PK[position_N[known_N], column_N[known_N]] = True
    return is_exact_PK
