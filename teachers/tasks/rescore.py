"""Scoring rows again to judge a cache: how far are the stored numbers from the engine's?

Legend: P positions, K captured entries, N kept entries of all positions, of which H belong to the
head and D were drawn.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace

import numpy as np

from pipeline.cache.reader import open_cache
from pipeline.fingerprint import digest_ids
from pipeline.layout import CacheLayout
from pipeline.records import SparseLogprobs, TokenSequence
from pipeline.sequences import read_sequences
from teachers.protocol import CapturedRows, ScoringRequest, Teacher

logger = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-2, "float16": 0.1, "bfloat16": 0.5}
"""Largest difference in nats, by the dtype of the engine: batches are composed otherwise each time,
and a logit near 20 has steps of 0.016 in float16 and 0.125 in bfloat16.
"""
ROUNDING = 2.0**-10
"""Of a stored float16, relative to its size; added to the tolerance."""
SURPRISE = 25.0
"""Nats. Draws of the teacher's own distribution surprise more in one row of 7e9 at most."""
TILTS = np.array([-0.9, -0.6, -0.3, -0.1, -0.03, 0.03, 0.1, 0.3, 0.6, 0.9])
"""Where the bound of `draws_surprise` is tried: below 0 for draws too likely, else too unlikely."""
LOWEST = float(np.finfo(np.float16).min)


@dataclass(frozen=True)
class RowDifference:
    """How far one stored row is from the same row scored now; differences in nats.

    Attributes:
        excess: largest difference after the rounding of float16 is taken off.
        surprise: nats, of the drawn entries under the teacher's probabilities now; 0 without any.
    """

    sequence_id: str
    gold_sum: float
    gold_max: float
    num_positions: int
    head_sum: float
    head_max: float
    num_entries: int
    excess: float
    num_draws: int
    surprise: float

    def is_beyond(self, tolerance: float) -> bool:
        """Whether the row is not what the teacher says now, to a tolerance in nats."""
        return not (self.excess <= tolerance and self.surprise <= SURPRISE)


@dataclass(frozen=True)
class RescoringTask:
    """Some rows of one cache whose sequences lie in one sequence shard; writes nothing."""

    cache: CacheLayout
    sequence_shard: str
    sequence_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.sequence_ids)

    @property
    def label(self) -> str:
        return f"rows {digest_ids(self.sequence_ids)[:8]} ({len(self)} sequences)"

    def halves(self) -> tuple[RescoringTask, RescoringTask]:
        """The same rows in two tasks."""
        middle = len(self) // 2
        return (
            replace(self, sequence_ids=self.sequence_ids[:middle]),
            replace(self, sequence_ids=self.sequence_ids[middle:]),
        )

    def quarantine(self, error: str) -> None:
        """Leaves no record, for the stored row stays; the pool's report names it."""
        logger.warning("%s cannot be scored again: %s", self.label, error)

    async def run(self, teacher: Teacher) -> list[RowDifference]:
        """Scores the sequences and compares.

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
        assert stored is not None, "rows are drawn from those that the cache has"
        first = int(sequence.position_indices[0])
        captured = await teacher.score(ScoringRequest(sequence.input_ids.tolist(), first))
        return row_difference(stored, captured, sequence.position_indices - first)


def row_difference(
    stored: SparseLogprobs, captured: CapturedRows, rows_P: np.ndarray
) -> RowDifference:
    """Compares the gold token of every position and every head entry, by its token id; drawn
    entries have no log-probability and are judged by `draws_surprise`.

    A head id that is no longer among the captured ones is compared with the least of these, which
    is the most that it can have now.

    Args:
        rows_P: the captured row of every position.
    """
    ids_PK = captured.token_ids[rows_P]
    logprobs_PK = np.maximum(captured.logprobs[rows_P].astype(np.float64), LOWEST)
    gold_P = np.maximum(captured.gold_logprobs[rows_P].astype(np.float64), LOWEST)
    gold_difference_P = np.abs(stored.gold_logprobs.astype(np.float64) - gold_P)
    position_N = np.repeat(np.arange(stored.num_positions), stored.num_entries)
    is_same_NK = ids_PK[position_N] == stored.token_ids[:, None].astype(np.int64)
    column_N = np.where(is_same_NK.any(axis=1), is_same_NK.argmax(axis=1), -1)
    head_N = stored.is_exact_N
    kept_H = stored.logprobs.astype(np.float64)
    difference_H = kept_H - logprobs_PK[position_N[head_N], column_N[head_N]]
    difference_H = np.where(column_N[head_N] >= 0, np.abs(difference_H), difference_H.clip(0.0))
    excess_H = difference_H - ROUNDING * np.abs(kept_H)
    excess_P = gold_difference_P - ROUNDING * np.abs(gold_P)
    left_PK = np.where(_in_head(column_N, position_N, head_N, ids_PK.shape), -np.inf, logprobs_PK)
    return RowDifference(
        sequence_id=stored.sequence_id,
        gold_sum=float(gold_difference_P.sum()),
        gold_max=float(gold_difference_P.max(initial=0.0)),
        num_positions=len(gold_P),
        head_sum=float(difference_H.sum()),
        head_max=float(difference_H.max(initial=0.0)),
        num_entries=len(difference_H),
        excess=float(max(excess_P.max(initial=0.0), excess_H.max(initial=0.0))),
        num_draws=int(stored.counts.sum(dtype=np.int64)),
        surprise=draws_surprise(
            left_PK, position_N[~head_N], column_N[~head_N], stored.counts.astype(np.float64)
        ),
    )


def draws_surprise(
    logprobs_PK: np.ndarray, position_D: np.ndarray, column_D: np.ndarray, counts_D: np.ndarray
) -> float:
    """How unlikely drawn entries are under probabilities, in nats.

    With probabilities r of a position, drawn `n` times, and `S` the sum of `-log r` over all draws,
    Chernoff's bound is `P(S >= s) <= exp(-t s) * prod (sum r^(1 - t))^n` for t > 0, and the same of
    `P(S <= s)` for t < 0. The result is minus the logarithm of the least bound of some t: at least
    x with probability `10 exp(-x)` at most, if the draws are of these probabilities.

    Args:
        logprobs_PK: what could be drawn, -inf where nothing can; any sum.
        position_D: of each drawn entry.
        column_D: its place among the K; -1 where it has none and counts as the least of them.
        counts_D: how often it was drawn.
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


def _in_head(
    column_N: np.ndarray, position_N: np.ndarray, head_N: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """bool[P, K]: the captured entries that are stored as head entries."""
    found = np.zeros(shape, dtype=bool)
    known_N = head_N & (column_N >= 0)
    found[position_N[known_N], column_N[known_N]] = True
    return found
