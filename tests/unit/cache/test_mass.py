"""The bound of the mass that rounding to float16 adds to a row."""

import math

import numpy as np
import pytest

from pipeline.cache.row_checks import check_row, mass_tolerance
from pipeline.errors import CacheError
from pipeline.records import SparseLogprobs

WIDTHS = [1, 2, 3, 8, 64, 255]


def off_mass(logs: np.ndarray) -> float:
    """Largest change of a row's mass when its log-probabilities become float16."""
    stored = np.exp(logs.astype(np.float16).astype(np.float64)).sum(axis=-1)
    return float(np.abs(stored - np.exp(logs).sum(axis=-1)).max())


@pytest.mark.parametrize("width", WIDTHS)
def test_rounding_stays_within_the_bound(width: int) -> None:
    """Peaked and flat distributions over the kept entries, with and without a tail."""
    rng = np.random.default_rng(width)
    scale = rng.uniform(0.0, 8.0, (2000, 1))
    logits = rng.normal(size=(2000, width)) * scale
    logs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    logs = logs - rng.exponential(size=(2000, 1)) * rng.integers(0, 2, (2000, 1))
    assert off_mass(logs) <= mass_tolerance(width) - math.expm1(1e-3)


def test_the_bound_is_no_larger_than_rounding_needs() -> None:
    """Equal entries whose rounding all goes one way take more than half of the bound."""
    widths = np.arange(3, 256)
    worst = [
        off_mass(np.full((1, k), -math.log(k))) / (mass_tolerance(int(k)) - math.expm1(1e-3))
        for k in widths
    ]
    assert 0.5 < max(worst) <= 1.0


@pytest.mark.parametrize("width", WIDTHS)
def test_more_mass_than_that_is_refused(width: int) -> None:
    def row(mass: float) -> SparseLogprobs:
        return SparseLogprobs(
            sequence_id="s",
            num_entries=np.array([width], np.uint8),
            token_ids=np.arange(width, dtype=np.uint32),
            logprobs=np.full(width, math.log(mass / width), np.float16),
            counts=np.zeros(0, np.uint8),
            gold_logprobs=np.zeros(1, np.float16),
            tail_mass=np.zeros(1, np.float16),
            entropies=np.zeros(1, np.float16),
        )

    check_row(row(1.0))
    with pytest.raises(CacheError, match=r"kept mass reaches 1\.0"):
        check_row(row(1.01))
