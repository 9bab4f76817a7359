"""Scoring rows again to judge a cache: how far are the stored numbers from the engine's?

Legend: P positions, K captured entries, N kept entries of all positions.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from pipeline.cache_index import open_cache
from pipeline.datasets import read_sequences
from pipeline.fingerprint import digest_ids
from pipeline.layout import CacheLayout
from pipeline.records import SparseLogprobs, TokenSequence
from teachers.engine import CapturedRows

if TYPE_CHECKING:
    from teachers.vllm_teacher import VllmTeacher

logger = logging.getLogger(__name__)

TOLERANCE = {"float32": 1e-2, "float16": 0.1, "bfloat16": 0.5}
"""Largest difference in nats, by the dtype of the engine: batches are composed otherwise each time,
and a logit near 20 has steps of 0.016 in float16 and 0.125 in bfloat16.
"""
ROUNDING = 2.0**-10
"""Of a stored float16, relative to its size; added to the tolerance."""
LOWEST = float(np.finfo(np.float16).min)


@dataclass(frozen=True)
class RowDifference:
    """How far one stored row is from the same row scored now; differences in nats.

    Attributes:
        excess: largest difference after the rounding of float16 is taken off.
    """

    sequence_id: str
    gold_sum: float
    gold_max: float
    num_positions: int
    head_sum: float
    head_max: float
    num_entries: int
    excess: float


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

    async def run(self, teacher: VllmTeacher) -> list[RowDifference]:
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
        self, teacher: VllmTeacher, sequence: TokenSequence, stored: SparseLogprobs | None
    ) -> RowDifference:
        assert stored is not None, "rows are drawn from those that the cache has"
        first = int(sequence.position_indices[0])
        captured = await teacher.score(sequence.input_ids.tolist(), first)
        return row_difference(stored, captured, sequence.position_indices - first)


def row_difference(
    stored: SparseLogprobs, captured: CapturedRows, rows_P: np.ndarray
) -> RowDifference:
    """Compares the gold token of every position and every kept head entry, by its token id.

    A kept id that is no longer among the captured ones is compared with the least of these, which
    is the most that it can have now. Drawn entries have no log-probability: their rows are judged
    by the gold tokens alone.

    Args:
        rows_P: the captured row of every position.
    """
    gold_P = np.maximum(captured.gold_logprobs[rows_P].astype(np.float64), LOWEST)
    gold_difference_P = np.abs(stored.gold_logprobs.astype(np.float64) - gold_P)
    head_difference_N = excess_N = np.zeros(0)
    if not len(stored.counts):
        now_N, found_N = _logprobs_now(stored, captured, rows_P)
        kept_N = stored.logprobs.astype(np.float64)
        difference_N = kept_N - now_N
        head_difference_N = np.where(found_N, np.abs(difference_N), np.maximum(difference_N, 0.0))
        excess_N = head_difference_N - ROUNDING * np.abs(kept_N)
    excess_P = gold_difference_P - ROUNDING * np.abs(gold_P)
    return RowDifference(
        sequence_id=stored.sequence_id,
        gold_sum=float(gold_difference_P.sum()),
        gold_max=float(gold_difference_P.max(initial=0.0)),
        num_positions=len(gold_P),
        head_sum=float(head_difference_N.sum()),
        head_max=float(head_difference_N.max(initial=0.0)),
        num_entries=len(head_difference_N),
        excess=float(max(excess_P.max(initial=0.0), excess_N.max(initial=0.0))),
    )


def _logprobs_now(
    stored: SparseLogprobs, captured: CapturedRows, rows_P: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """For each kept entry its log-probability now (float64[N]), and whether it was captured."""
    position_N = np.repeat(np.arange(stored.num_positions), stored.num_entries)
    same_NK = captured.token_ids[rows_P][position_N] == stored.token_ids[:, None].astype(np.int64)
    logprobs_NK = np.maximum(captured.logprobs[rows_P][position_N].astype(np.float64), LOWEST)
    found_N = same_NK.any(axis=1)
    column_N = np.where(found_N, same_NK.argmax(axis=1), logprobs_NK.shape[1] - 1)
    return np.take_along_axis(logprobs_NK, column_N[:, None], axis=1)[:, 0], found_N
