"""The sequences whose log-probabilities an export must reproduce."""

import pytest

from pipeline.records import DatasetEntry
from students.training_data import PROBE_SEQUENCES, PROBE_TOKENS, probe_entries


def entries(*lengths: int) -> list[DatasetEntry]:
    return [DatasetEntry(str(n), "p", "words", "holdout", ("t",), "s", n, n - 1) for n in lengths]


@pytest.mark.parametrize(
    ("lengths", "budget", "padded", "chosen"),
    [
        ((5, 9, 7), 100, False, [9, 7, 5]),
        ((5, 9, 7), 14, False, [9, 5]),  # 9 and 7 do not fit together
        ((5, 9, 7), 18, True, [9, 7]),  # two rows of 9
        ((5, 9, 7), 9, False, [9]),
        ((4000, 3000, 10), 10_000, False, [4000, 3000]),  # two of any length
        ((1000, 900, 800, 100), 10_000, False, [1000, 900, 100]),
        (tuple(range(20, 40)), 10_000, False, list(range(39, 39 - PROBE_SEQUENCES, -1))),
    ],
)
def test_the_longest_that_fit_together_are_chosen(
    lengths: tuple[int, ...], budget: int, padded: bool, chosen: list[int]
) -> None:
    found = probe_entries(entries(*lengths), budget, padded)
    assert [entry.num_tokens for entry in found] == chosen
    assert len(found) <= 2 or sum(chosen) <= PROBE_TOKENS
