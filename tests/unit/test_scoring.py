"""A scoring task: what it asks, in which order, and what it writes and reports."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache import read_shard
from pipeline.config_targets import TopK
from pipeline.datasets import write_sequences
from pipeline.fingerprint import digest_ids
from pipeline.layout import Layout
from pipeline.records import TokenSequence
from teachers.engine import CapturedRows
from teachers.scoring import Output, ScoredShard, ScoringTask, siblings_together

WIDTH = 4
SPANS = {"one": ((3, 9),), "two": ((2, 4), (6, 10)), "last": ((11, 12),)}


class Recorder:
    """A teacher whose rows carry the index of their token; every third one is scored again."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def score(
        self, input_ids: list[int], first_index: int, *, distributions: bool, states: bool
    ) -> CapturedRows:
        assert distributions and not states
        self.asked.append(input_ids[0])
        is_rescored = len(self.asked) % 3 == 0
        await asyncio.sleep(0)
        index = np.arange(first_index, len(input_ids), dtype=np.float32)
        logprobs = -np.tile(np.arange(2, WIDTH + 2, dtype=np.float32), (len(index), 1))
        return CapturedRows(
            token_ids=np.tile(index[:, None], WIDTH).astype(np.int32),
            logprobs=logprobs,
            gold_logprobs=-index,
            num_cached_tokens=2,
            is_rescored=is_rescored,
        )


def sequence(number: int, prompt_id: str, spans: tuple[tuple[int, int], ...]) -> TokenSequence:
    ids = np.array([number, *range(1, 12)], np.int32)
    return TokenSequence(f"{number:02d}", ids, spans, prompt_id, "d", ("t",), "stop")


@pytest.fixture
def sequences() -> list[TokenSequence]:
    """Three prompts whose answers do not stand together."""
    return [sequence(i, "abc"[i % 3], list(SPANS.values())[i % 3]) for i in range(9)]


def scored(root: Path, sequences: list[TokenSequence]) -> tuple[Recorder, ScoredShard, list]:
    layout = Layout(str(root), "run")
    shard = write_sequences(layout, "d", sequences)
    cache = layout.cache("t", "0" * 32)
    identifiers = tuple(each.sequence_id for each in sequences)
    output = Output("t", cache, "0" * 32, TopK(type="top_k", max_entries=2))
    task = ScoringTask(f"{root}/{shard}", identifiers, (output,))
    teacher = Recorder()
    report = asyncio.run(task.run(teacher))  # pyright: ignore[reportArgumentType]
    return teacher, report, read_shard(cache.shard(digest_ids(identifiers)))


def test_rows_are_exactly_the_positions(tmp_path: Path, sequences: list[TokenSequence]) -> None:
    _, report, rows = scored(tmp_path, sequences)
    assert report.entries["t"].num_positions == sum(each.num_positions for each in sequences)
    for each, row in zip(sequences, rows, strict=True):
        assert row.sequence_id == each.sequence_id
        np.testing.assert_array_equal(-row.gold_logprobs, each.position_indices)
        np.testing.assert_array_equal(row.token_ids, np.repeat(each.position_indices, 2))


def test_answers_of_a_prompt_are_asked_one_after_another(
    tmp_path: Path, sequences: list[TokenSequence]
) -> None:
    teacher, _, _ = scored(tmp_path, sequences)
    assert teacher.asked == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert siblings_together(sequences[:3]) == sequences[:3]


def test_the_report_counts_what_the_prefix_cache_did(
    tmp_path: Path, sequences: list[TokenSequence]
) -> None:
    _, report, _ = scored(tmp_path, sequences)
    assert (report.num_tokens, report.num_cached_tokens, report.num_rescored) == (9 * 12, 9 * 2, 3)
