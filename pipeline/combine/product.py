"""Product of the teachers: their normalised weighted geometric mean, from the caches' entries.

    p(i) = prod_m p_m(i)^w_m / Z

A teacher's row does not say how its tail is spread over the ids that it has not kept. This module
spreads the tail evenly, which assumes nothing beyond what is known. If every teacher keeps every
id, nothing is assumed and the product is exact.

Legend: M teachers, P positions, N entries of one teacher, U ids of the union of all positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.records import CombinedTargets

ID_BITS = 24


@dataclass(frozen=True)
class ProductTargets:
    """One distribution for each position of a sequence, on the union of the teachers' kept ids.

    Attributes:
        num_entries: int64[P], size of the union at each position, at least 1.
        token_ids: int64[U], ascending within a position.
        logprobs: float64[U], log-probability of each id of the union.
        tail_mass: float64[P], probability of all ids outside the union; entries and tail of a
            position sum to 1.
        assumed_mass: float64[P], probability that rests on the even spreading of tails: that of
            ids which some teacher with a weight above 0 has not kept, and of the tail.
        is_floored: bool[P], whether a teacher's tail was raised to the smallest allowed one.
    """

    num_entries: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray
    tail_mass: np.ndarray
    assumed_mass: np.ndarray
    is_floored: np.ndarray


def product_of(combined: CombinedTargets, vocabulary: int, min_tail: float) -> ProductTargets:
    """Product of the rows of a sequence; a teacher with weight 0 at a position has no part there.

    Args:
        vocabulary: number of ids over which tails are spread; if a teacher keeps that many or more,
            it has no tail.
        min_tail: smallest probability of a tail that covers any id.
    """
    num_positions = combined.sequence.num_positions
    weights_MP = combined.teacher_weights.astype(np.float64)
    weights_MP /= weights_MP.sum(axis=0)
    used = [
        (row, w_P)
        for row, w_P in zip(combined.rows, weights_MP, strict=True)
        if row is not None and w_P.any()
    ]
    keys, values = [], []
    for row, w_P in used:
        assert not row.is_drawn, "the config refuses draws in products"
        place_N = np.repeat(np.arange(num_positions, dtype=np.int64), row.num_entries)
        counts_N = w_P[place_N] > 0
        keys.append(((place_N << ID_BITS) + row.token_ids)[counts_N])
        values.append(row.logprobs.astype(np.float64)[counts_N])
    keys_U, slots = np.unique(np.concatenate(keys), return_inverse=True)
    place_U, ids_U = keys_U >> ID_BITS, keys_U & ((1 << ID_BITS) - 1)
    num_union_P = np.bincount(place_U, minlength=num_positions)
    log_p_U, log_rest_P = np.zeros(len(keys_U)), np.zeros(num_positions)
    keepers_U, is_floored_P = np.zeros(len(keys_U)), np.zeros(num_positions, dtype=bool)
    edges = np.cumsum([0] + [len(of_row) for of_row in keys])
    with np.errstate(divide="ignore"):
        for (row, w_P), logprobs, start, stop in zip(
            used, values, edges[:-1], edges[1:], strict=True
        ):
            tail_P = row.tail_mass.astype(np.float64)
            outside_P = np.maximum(vocabulary - row.num_entries.astype(np.int64), 0)
            is_floored_P |= (w_P > 0) & (outside_P > 0) & (tail_P < min_tail)
            even_P = np.log(np.maximum(tail_P, min_tail) / np.maximum(outside_P, 1))
            of_teacher_U = even_P[place_U]
            of_teacher_U[slots[start:stop]] = logprobs
            keepers_U[slots[start:stop]] += 1
            # A stored -inf stays -inf, but 0 times -inf must not become not-a-number.
            w_U = w_P[place_U]
            log_p_U += np.where(w_U > 0, w_U * np.where(w_U > 0, of_teacher_U, 0.0), 0.0)
            log_rest_P += w_P * even_P
        log_rest_P += np.log(np.maximum(vocabulary - num_union_P, 0))
    log_z_P = _log_normaliser(log_p_U, log_rest_P, place_U, num_union_P)
    log_p_U -= log_z_P[place_U]
    tail_P = np.exp(log_rest_P - log_z_P)
    num_used_P = (weights_MP > 0).sum(axis=0)
    assumed_U = np.where(keepers_U < num_used_P[place_U], np.exp(log_p_U), 0.0)
    assumed_P = tail_P + np.bincount(place_U, weights=assumed_U, minlength=num_positions)
    return ProductTargets(num_union_P, ids_U, log_p_U, tail_P, assumed_P, is_floored_P)


def _log_normaliser(
    log_p_U: np.ndarray, log_rest_P: np.ndarray, place_U: np.ndarray, num_union_P: np.ndarray
) -> np.ndarray:
    """Logarithm of the sum of all entries and the rest at each position: float64[P]."""
    starts_P = np.cumsum(num_union_P) - num_union_P
    highest_P = np.maximum(np.maximum.reduceat(log_p_U, starts_P), log_rest_P)
    sums_P = np.add.reduceat(np.exp(log_p_U - highest_P[place_U]), starts_P)
    return highest_P + np.log(sums_P + np.exp(log_rest_P - highest_P))
