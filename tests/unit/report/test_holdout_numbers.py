"""Hold-out numbers from cached rows: ties, tokens that a teacher masks, and bounds."""

import json
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.cache.selection import select
from pipeline.config.scoring import TopK
from pipeline.records import CombinedTargets, DatasetEntry, SparseLogprobs, TokenSequence
from students import evaluation
from students.data.examples import Example, example_of
from students.evaluation import bounded_divergence, is_likeliest, teacher_holdout_numbers

KEPT = TopK(type="top_k", max_entries=3)


def sequence_of(num_positions: int) -> TokenSequence:
    ids = np.zeros(num_positions + 1, np.int32)
    return TokenSequence("s", ids, ((1, num_positions + 1),), "p", "words", ("t",), "stop")


def row_of(
    ids: list[list[int]], probabilities: list[list[float]], gold: list[float] | None = None
) -> SparseLogprobs:
    """A teacher that gives its engine's entries, likeliest first."""
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.array(probabilities, np.float32))
    golds = logprobs[:, 0] if gold is None else np.array(gold, np.float32)
    return select("s", np.array(ids), logprobs, golds, KEPT, teacher="t")


def example_from(*rows: SparseLogprobs, weights: list[list[float]]) -> Example:
    combined = CombinedTargets(
        sequence_of(rows[0].num_positions), rows, np.array(weights, np.float32)
    )
    return example_of(combined)


def measured(row: SparseLogprobs, example: Example) -> dict[str, Any]:
    positions = row.num_positions
    entry = DatasetEntry("s", "p", "words", "holdout", ("t",), "shard", positions + 1, positions)
    readers: Any = {"t": SimpleNamespace(row={"s": row}.get)}
    examples: Any = {entry: example}
    return teacher_holdout_numbers([entry], examples, readers)["t"]["words"]


def test_a_teacher_agrees_with_itself_where_its_ids_tie() -> None:
    """The engine's order of equals need not be that of the ids."""
    row = row_of([[9, 4, 2], [9, 4, 2]], [[0.4, 0.4, 0.1], [0.45, 0.45, 0.05]])
    assert measured(row, example_from(row, weights=[[1, 1]]))["agreement"] == 1


def test_each_of_the_likeliest_ids_of_a_mixture_agrees() -> None:
    one = row_of([[3, 5, 1], [3, 5, 1]], [[0.6, 0.2, 0.1], [0.6, 0.2, 0.1]])
    two = row_of([[5, 3, 2], [5, 3, 2]], [[0.6, 0.2, 0.1], [0.6, 0.2, 0.1]])
    example = example_from(one, two, weights=[[0.5, 0.75], [0.5, 0.25]])
    for ids, expected in (
        ([3, 3], [True, True]),
        ([5, 5], [True, False]),
        ([1, 1], [False, False]),
        ([0, 99], [False, False]),
    ):
        assert is_likeliest(example, np.array(ids)).tolist() == expected


def test_values_that_are_stored_apart_are_apart() -> None:
    """Neighbours in float16: of the smaller's teacher no argmax."""
    row = row_of([[9, 4, 2]], [[0.4, 0.3995, 0.1]])
    assert row.logprobs[0] > row.logprobs[1]
    example = example_from(row, weights=[[1]])
    assert is_likeliest(example, np.array([9])).all()
    assert not is_likeliest(example, np.array([4])).any()


def test_a_masked_token_leaves_no_loss() -> None:
    """A cache stores -65504 for its -inf: nothing to average, and a mean over others is no loss."""
    masked = row_of([[9, 4, 2]] * 2, [[0.5, 0.3, 0.1]] * 2, gold=[-1.0, -np.inf])
    found = measured(masked, example_from(masked, weights=[[1, 1]]))
    assert found["loss"] is None and found["agreement"] == 1 and found["tokens"] == 2
    assert "Infinity" not in json.dumps(found)


def test_a_bound_needs_little_memory_and_does_not_depend_on_the_chunks() -> None:
    """Pairs of entries of all positions at once would be 64 MiB."""
    generator, positions, entries = np.random.default_rng(0), 4096, 128
    rows = []
    for _ in range(2):
        ids = np.argsort(generator.random((positions, 2 * entries)), axis=1)[:, :entries]
        masses = -np.sort(-generator.dirichlet(np.ones(entries + 1), positions), axis=1)
        logprobs = np.log(masses[:, :entries]).astype(np.float32)
        wide = TopK(type="top_k", max_entries=entries)
        rows.append(select("s", ids, logprobs, logprobs[:, 0], wide, teacher="t"))
    one, two = rows
    example = example_from(one, weights=[[1.0] * positions])
    tracemalloc.start()
    found = np.stack(bounded_divergence(example, two))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # 8 MiB of padded rows, and for each buffer of pairs 8 MiB
    assert peak < 48 * 2**20
    assert found.shape == (2, positions) and (found > 0).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "POSITIONS_AT_ONCE", 100)
        assert np.array_equal(np.stack(bounded_divergence(example, two)), found)
