"""The invariants of one row of distributions; a row that breaks one is never written.

Legend: P positions, N entries of all positions, H exact entries of all positions.
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.errors import CacheError
from pipeline.records import SparseLogprobs

HALF_ULP = 2.0**-11
"""Largest relative error of a number that is rounded to float16."""
ID_BITS = 24
"""Bits of a token id in a shard, as two planes of 16 and 8."""
MAX_LOGPROB = 1e-3
"""Nats by which rounding in the engine's normaliser may lift the log-probabilities of a position.
"""


def mass_tolerance(num_entries: int) -> float:
    """Mass by which stored log-probabilities of a position may differ from those that were rounded.

    Rounding to float16 changes a log-probability l by at most `HALF_ULP * |l|`, and so its
    probability p by at most `HALF_ULP * p |l|`. The sum of `p |l|` over k entries of mass at most 1
    is at most `log k`, for equal probabilities, or 1 for fewer than three entries. The normaliser
    adds the same factor to all of the mass.

    Args:
        num_entries: k, the number of entries of a position.
    """
    return math.expm1(MAX_LOGPROB) + HALF_ULP * max(1.0, math.log(max(1, num_entries)))


def check_row(row: SparseLogprobs) -> None:
    """Checks the invariants of one row.

    Raises:
        CacheError: lengths disagree, a value is not finite, a token id does not fit or stands twice
            at a position, exact entries are not descending, mass exceeds 1, or positions were not
            drawn from equally often.
    """
    problem = shape_problem(row) or _exact_problem(row) or _id_problem(row) or _draw_problem(row)
    if problem:
        raise CacheError(f"sequence {row.sequence_id}: {problem}")


def shape_problem(row: SparseLogprobs) -> str | None:
    """Problem for which a row cannot be read at all: lengths that disagree, or values that are no
    numbers.
    """
    return _length_problem(row) or _value_problem(row)


def _length_problem(row: SparseLogprobs) -> str | None:
    num_entries = int(row.num_entries.sum(dtype=np.int64))
    num_exact = int(_num_exact(row).sum())
    if num_entries != len(row.token_ids) or num_exact != len(row.logprobs):
        return (
            f"{num_entries} entries counted, {num_exact} of them exact, but {len(row.token_ids)} "
            f"ids and {len(row.logprobs)} log-probabilities"
        )
    if num_entries - num_exact != len(row.counts):
        return (
            f"{num_entries - num_exact} entries are drawn, but there are {len(row.counts)} counts"
        )
    lengths = {len(a) for a in (row.gold_logprobs, row.tail_mass, row.entropies, _num_exact(row))}
    if lengths != {row.num_positions}:
        return "per-position arrays have different lengths"
    return None


def _value_problem(row: SparseLogprobs) -> str | None:
    if not all(
        np.isfinite(a).all()
        for a in (row.logprobs, row.gold_logprobs, row.tail_mass, row.entropies)
    ):
        return "a value is not finite"
    if row.num_positions and row.num_entries.min() < 1:
        return "a position has no entries"
    if (_num_exact(row) > row.num_entries).any():
        return "a position has more exact entries than entries"
    return None


def _exact_problem(row: SparseLogprobs) -> str | None:
    logprobs_H = row.logprobs.astype(np.float32)
    positions_H = np.repeat(np.arange(row.num_positions), _num_exact(row))
    if ((np.diff(logprobs_H) > 0) & (np.diff(positions_H) == 0)).any():
        return "entries are not in descending order"
    mass_P = np.bincount(positions_H, weights=np.exp(logprobs_H), minlength=row.num_positions)
    if mass_P.max(initial=0.0) > 1 + mass_tolerance(int(row.num_entries.max(initial=0))):
        return f"kept mass reaches {mass_P.max():.4f}"
    return None


def _id_problem(row: SparseLogprobs) -> str | None:
    ids_N = row.token_ids.astype(np.int64)
    if len(ids_N) and (ids_N.min() < 0 or ids_N.max() >= 1 << ID_BITS):
        wrong = ids_N[(ids_N < 0) | (ids_N >= 1 << ID_BITS)][0]
        return f"token id {wrong} is not between 0 and {(1 << ID_BITS) - 1}"
    positions_N = np.repeat(np.arange(row.num_positions), row.num_entries)
    pairs_N = np.sort(positions_N << ID_BITS | ids_N)
    is_twice = pairs_N[1:] == pairs_N[:-1]
    if is_twice.any():
        pair = int(pairs_N[:-1][is_twice][0])
        twice = pair & ((1 << ID_BITS) - 1)
        return f"position {pair >> ID_BITS} holds the token id {twice} twice"
    return None


def _draw_problem(row: SparseLogprobs) -> str | None:
    if not row.is_drawn:
        return None
    num_drawn_P = row.num_entries - _num_exact(row)
    positions = np.repeat(np.arange(row.num_positions), num_drawn_P)
    draws_P = np.bincount(positions, weights=row.counts, minlength=row.num_positions)
    numbers = np.unique(draws_P[num_drawn_P > 0])
    if row.counts.min(initial=1) < 1 or len(numbers) > 1:
        return f"positions differ in their number of draws: {numbers.astype(int).tolist()}"
    return None


def _num_exact(row: SparseLogprobs) -> np.ndarray:
    return (row.num_head if row.is_drawn else row.num_entries).astype(np.int64)
