"""Checks of the engine's rows: complete ones are taken, others are refused."""

import numpy as np
import pytest

from pipeline.cache.selection import select
from pipeline.cache_care.verify import row_problems
from pipeline.config.scoring import TopK
from pipeline.records import TokenSequence
from teachers.engine.prompt_topk import BrokenRowsError, PromptTopK

INPUT_IDS = [5, 6, 7, 8, 9, 4]
WIDTH = 3


def engine_rows() -> tuple[np.ndarray, np.ndarray]:
    """The five rows of a whole sequence; each knows its place by its values."""
    token_ids = np.array([[token, 1, 2, 3] for token in INPUT_IDS[1:]])
    logprobs = np.array([[-4.0, -0.5, -1.0, -2.0]] * 5, np.float32) - np.arange(5)[:, None] / 8
    return token_ids, logprobs.astype(np.float32)


def test_rows_are_counted_from_the_end() -> None:
    token_ids, logprobs = engine_rows()
    for absent in (0, 1, 2):
        rows = PromptTopK(token_ids[absent:], logprobs[absent:]).rows(INPUT_IDS, 3, WIDTH)
        np.testing.assert_array_equal(rows.gold_logprobs, logprobs[2:, 0])
        np.testing.assert_array_equal(rows.logprobs, logprobs[2:, 1:])
        np.testing.assert_array_equal(rows.token_ids, token_ids[2:, 1:])


def test_garbage_in_the_cached_prefix_is_not_looked_at() -> None:
    token_ids, logprobs = engine_rows()
    token_ids[:2], logprobs[0], logprobs[1] = -7, np.nan, 7e17
    rows = PromptTopK(token_ids, logprobs).rows(INPUT_IDS, 3, WIDTH)
    np.testing.assert_array_equal(rows.gold_logprobs, logprobs[2:, 0])


def test_rows_are_copies() -> None:
    token_ids, logprobs = engine_rows()
    rows = PromptTopK(token_ids.astype(np.int32), logprobs).rows(INPUT_IDS, 1, WIDTH)
    for array in (rows.token_ids, rows.logprobs, rows.gold_logprobs):
        assert array.base is None and array.flags.c_contiguous


@pytest.mark.parametrize(
    ("first_index", "present", "place", "value", "problem"),
    [
        (3, 2, (0, 0), -4.0, r"shape \(2, 4\), needed is \(3, 4\)"),
        (1, 4, (0, 0), -4.0, r"shape \(4, 4\), needed is \(5, 4\)"),
        (3, 5, (3, 2), np.nan, "NaN"),
        (3, 5, (3, 0), 0.5, "above 0"),
        (3, 5, (3, 2), -0.25, "descending"),
    ],
)
def test_incomplete_or_broken_rows_are_refused(
    first_index: int, present: int, place: tuple[int, int], value: float, problem: str
) -> None:
    token_ids, logprobs = engine_rows()
    logprobs[place] = value
    with pytest.raises(BrokenRowsError, match=problem):
        PromptTopK(token_ids[-present:], logprobs[-present:]).rows(INPUT_IDS, first_index, WIDTH)


def test_what_rounding_lifts_above_0_is_a_certain_token() -> None:
    """A row that is captured is one that `verify` accepts."""
    token_ids, logprobs = engine_rows()
    token_ids[:, 1] = INPUT_IDS[1:]
    logprobs[:, :2], logprobs[:, 2:] = 2e-6, [-14.0, -15.0]
    captured = PromptTopK(token_ids, logprobs).rows(INPUT_IDS, 1, WIDTH)
    assert (captured.gold_logprobs == 0).all() and (captured.logprobs[:, 0] == 0).all()
    assert np.isnan(captured.with_last_gold(np.nan).gold_logprobs[-1])
    captured = captured.with_last_gold(2e-6)
    arrays = (captured.token_ids, captured.logprobs, captured.gold_logprobs)
    row = select("s", *arrays, TopK(type="top_k", max_entries=3), teacher="t")
    sequence = TokenSequence("s", np.array(INPUT_IDS), ((1, 6),), "p", "d", ("t",), "stop")
    assert row_problems(row, 20, sequence) == []


def test_rows_of_other_tokens_are_refused() -> None:
    token_ids, logprobs = engine_rows()
    token_ids[2, 0] = 3
    PromptTopK(token_ids, logprobs).rows(INPUT_IDS, 4, WIDTH)
    with pytest.raises(BrokenRowsError, match="column 0"):
        PromptTopK(token_ids, logprobs).rows(INPUT_IDS, 3, WIDTH)


def test_another_width_is_refused() -> None:
    with pytest.raises(BrokenRowsError, match="shape"):
        PromptTopK(*engine_rows()).rows(INPUT_IDS, 3, WIDTH + 1)
