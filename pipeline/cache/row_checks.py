"""The invariants of one row of a logit cache: a shard is never written from a row that breaks one.

Legend: P positions, N entries of all positions, H head entries of all positions.
"""

from __future__ import annotations

import numpy as np

from pipeline.errors import CacheError
from pipeline.records import SparseLogprobs

MASS_TOLERANCE = 0.01
"""What float16 may add to the mass of 255 entries."""


def check_row(row: SparseLogprobs) -> None:
    """Checks the invariants of one row.

    Raises:
        CacheError: lengths disagree, a value is not finite, head entries are not descending, mass
            exceeds 1, or positions were not drawn from equally often.
    """
    problem = _lengths(row) or _values(row) or _head(row) or _draws(row)
    if problem:
        raise CacheError(f"sequence {row.sequence_id}: {problem}")


def _lengths(row: SparseLogprobs) -> str | None:
    num_entries = int(row.num_entries.sum(dtype=np.int64))
    num_head = int(_num_head(row).sum())
    if num_entries != len(row.token_ids) or num_head != len(row.logprobs):
        return (
            f"{num_entries} entries counted, {num_head} of the head; {len(row.token_ids)} ids, "
            f"{len(row.logprobs)} log-probabilities"
        )
    if num_entries - num_head != len(row.counts):
        return f"{num_entries - num_head} entries are outside the head, {len(row.counts)} counts"
    lengths = {len(a) for a in (row.gold_logprobs, row.tail_mass, row.entropies, _num_head(row))}
    if lengths != {row.num_positions}:
        return "per-position arrays have different lengths"
    return None


def _values(row: SparseLogprobs) -> str | None:
    if not all(
        np.isfinite(a).all()
        for a in (row.logprobs, row.gold_logprobs, row.tail_mass, row.entropies)
    ):
        return "a value is not finite"
    if row.num_positions and row.num_entries.min() < 1:
        return "a position has no entries"
    if (_num_head(row) > row.num_entries).any():
        return "a position's head is larger than its entries"
    return None


def _head(row: SparseLogprobs) -> str | None:
    logprobs_H = row.logprobs.astype(np.float32)
    positions_H = np.repeat(np.arange(row.num_positions), _num_head(row))
    if ((np.diff(logprobs_H) > 0) & (np.diff(positions_H) == 0)).any():
        return "entries are not in descending order"
    mass_P = np.bincount(positions_H, weights=np.exp(logprobs_H), minlength=row.num_positions)
    if mass_P.max(initial=0.0) > 1 + MASS_TOLERANCE:
        return f"kept mass reaches {mass_P.max():.4f}"
    return None


def _draws(row: SparseLogprobs) -> str | None:
    if not row.is_drawn:
        return None
    num_drawn_P = row.num_entries - _num_head(row)
    positions = np.repeat(np.arange(row.num_positions), num_drawn_P)
    draws_P = np.bincount(positions, weights=row.counts, minlength=row.num_positions)
    found = np.unique(draws_P[num_drawn_P > 0])
    if row.counts.min(initial=1) < 1 or len(found) > 1:
        return f"draws of a position number {found.astype(int).tolist()}"
    return None


def _num_head(row: SparseLogprobs) -> np.ndarray:
    return (row.num_head if row.is_drawn else row.num_entries).astype(np.int64)
