"""Which captured entries are kept: from the engine's wide arrays to a ragged row of the cache.

Legend: P positions, K captured entries, N kept entries of all positions.
"""

from __future__ import annotations

import numpy as np

from pipeline.config_targets import Selection, TopK
from pipeline.errors import CacheError
from pipeline.records import SparseLogprobs


def select(
    sequence_id: str,
    token_ids_PK: np.ndarray,
    logprobs_PK: np.ndarray,
    gold_logprobs_P: np.ndarray,
    rule: Selection,
) -> SparseLogprobs:
    """Applies a selection rule to captured distributions.

    `top_k` keeps the first `max_entries`; `top_p` the smallest prefix whose mass reaches `mass`, at
    most `max_entries`. Entries of probability zero are never kept. `tail_mass` is what lies outside
    the kept entries, from the log-probabilities as they are stored, never below 0. `entropies` is
    the lower bound `-sum p log p - tail * log p_K` over the captured entries, with p_K the smallest
    captured probability.

    Args:
        token_ids_PK: integer ids, most probable first.
        logprobs_PK: float32, descending, normalised over the full vocabulary.
        gold_logprobs_P: float32.

    Raises:
        CacheError: a position has no entry of finite log-probability.
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
    num_entries_P = np.minimum(_wanted(probabilities_PK, rule), finite_PK.sum(axis=1))
    kept_PK = np.arange(logprobs_PK.shape[1]) < num_entries_P[:, None]
    tail_P = np.clip(1.0 - np.where(kept_PK, probabilities_PK, 0.0).sum(axis=1), 0.0, 1.0)
    return SparseLogprobs(
        sequence_id=sequence_id,
        num_entries=num_entries_P.astype(np.uint8),
        token_ids=token_ids_PK[kept_PK].astype(np.uint32),
        logprobs=stored_PK[kept_PK],
        counts=np.zeros(0, dtype=np.uint8),
        gold_logprobs=np.maximum(gold_logprobs_P, np.finfo(np.float16).min).astype(np.float16),
        tail_mass=tail_P.astype(np.float16),
        entropies=entropy_lower_bound(np.where(finite_PK, logprobs_PK, -np.inf)).astype(np.float16),
    )


def entropy_lower_bound(logprobs_PK: np.ndarray) -> np.ndarray:
    """float64[P], nats: the tail is at least as surprising as the least probable captured entry."""
    logs_PK = np.where(np.isfinite(logprobs_PK), logprobs_PK, 0.0).astype(np.float64)
    probabilities_PK = np.where(np.isfinite(logprobs_PK), np.exp(logs_PK), 0.0)
    tail_P = np.clip(1.0 - probabilities_PK.sum(axis=1), 0.0, None)
    return np.maximum(-(probabilities_PK * logs_PK).sum(axis=1) - tail_P * logs_PK.min(axis=1), 0.0)


def _wanted(probabilities_PK: np.ndarray, rule: Selection) -> np.ndarray:
    if isinstance(rule, TopK):
        return np.full(len(probabilities_PK), rule.max_entries)
    before_PK = np.cumsum(probabilities_PK, axis=1) - probabilities_PK
    return np.clip((before_PK < rule.mass).sum(axis=1), 1, rule.max_entries)
