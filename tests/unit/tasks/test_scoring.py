"""A scoring task: what it asks, in which order, and what it writes and reports."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from pipeline.cache.columns import Column
from pipeline.cache.kinds import hidden_states_of
from pipeline.cache.projection import HiddenStatesRule
from pipeline.cache.shard import read_shard
from pipeline.config.scoring import TopK
from pipeline.errors import CacheError
from pipeline.fingerprint import digest_ids
from pipeline.layout import Layout
from pipeline.records import DatasetEntry, TokenSequence
from pipeline.sequences import write_sequences
from teachers.protocol import CapturedRows, ScoringRequest
from teachers.tasks.score import (
    TASK_BYTES,
    CacheOutput,
    ScoredShard,
    ScoreTask,
    plan_scoring,
    siblings_together,
)
from teachers.tasks.siblings import EarlierAnswers, Siblings

WIDTH = 4
SPANS = {"one": ((3, 9),), "two": ((2, 4), (6, 10)), "last": ((11, 12),)}


class Recorder:
    """A teacher whose likeliest entries carry the index of their token; every third row is scored
    again.
    """

    def __init__(self) -> None:
        self.asked: list[int] = []

    def metadata(self) -> dict[str, str | float]:
        return {"engine": "recorder", "load_seconds": 1.5}

    async def score(
        self, request: ScoringRequest, earlier: EarlierAnswers | None = None
    ) -> CapturedRows:
        input_ids, first_index = request.input_ids, request.first_index
        assert request.distributions and not request.hidden_states
        self.asked.append(input_ids[0])
        is_rescored = len(self.asked) % 3 == 0
        await asyncio.sleep(0)
        index = np.arange(first_index, len(input_ids), dtype=np.float32)
        logprobs = -np.tile(np.arange(2, WIDTH + 2, dtype=np.float32), (len(index), 1))
        return CapturedRows(
            token_ids=(index[:, None] + 100 * np.arange(WIDTH)).astype(np.int32),
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
    output = CacheOutput("t", cache, "0" * 32, TopK(type="top_k", max_entries=2), 8)
    task = ScoreTask(f"{root}/{shard}", identifiers, (output,))
    teacher = Recorder()
    report = asyncio.run(task.run(teacher))  # pyright: ignore[reportArgumentType]
    return teacher, report, read_shard(cache.shard(digest_ids(identifiers)))


def test_rows_are_exactly_the_positions(tmp_path: Path, sequences: list[TokenSequence]) -> None:
    _, report, rows = scored(tmp_path, sequences)
    assert report.entries["t"].num_positions == sum(each.num_positions for each in sequences)
    for each, row in zip(sequences, rows, strict=True):
        assert row.sequence_id == each.sequence_id
        np.testing.assert_array_equal(-row.gold_logprobs, each.position_indices)
        np.testing.assert_array_equal(row.token_ids[::2], each.position_indices)


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


def test_shards_of_whole_states_stay_small(tmp_path: Path) -> None:
    """A sequence shard of 512k positions, whose states of one layer alone would take 4 GiB."""
    layout, states = Layout(str(tmp_path), "run"), hidden_states_of("t")
    entries = [
        DatasetEntry(f"{i:04d}", "p", "d", "train", ("t",), "sequences/d/x.parquet", 600, positions)
        for i, positions in enumerate([512] * 1000 + [100_000, 1, 512])
    ]
    outputs = [
        CacheOutput(
            "t", layout.cache("t", "0" * 32), "0" * 32, TopK(type="top_k", max_entries=8), 47
        ),
        CacheOutput(
            states, layout.cache(states, "0" * 32), "0" * 32, HiddenStatesRule((3,), None, 0), 8192
        ),
    ]
    tasks = plan_scoring(str(tmp_path), [(output, entries) for output in outputs])
    found = [identifier for task in tasks for identifier in task.sequence_ids]
    assert found == [entry.sequence_id for entry in entries], "each once, in order"
    positions = {entry.sequence_id: entry.num_positions for entry in entries}
    sizes = [8239 * sum(positions[i] for i in task.sequence_ids) for task in tasks]
    assert [len(task) for task in tasks if task.sequence_ids[0] == "1000"] == [1]
    assert sorted(sizes)[-2] <= TASK_BYTES < sorted(sizes)[-1], "one sequence is not cut"
    assert len(tasks) == 8 + 1 + 1
    (task,) = plan_scoring(str(tmp_path), [(outputs[0], entries)])
    assert len(task) == len(entries), "distributions alone are small enough"


def test_a_column_of_more_than_its_offsets_can_count_is_refused() -> None:
    two_bytes = np.broadcast_to(np.uint16(0), 2**30)
    with pytest.raises(CacheError, match=r"take 2147483648 bytes .* scoring\.features\.dimensions"):
        Column(two_bytes, np.array([0, 5, 2**30])).to_arrow()


class Cached:
    """A teacher of random rows that depend on the tokens before them; its engine has cached some,
    gives no rows for them, and answers the first asked last.
    """

    def __init__(self, num_cached: int, fails: int | None = None) -> None:
        self.num_cached, self.fails = num_cached, fails
        self.known: list[CapturedRows | None] = []

    async def score(
        self, request: ScoringRequest, earlier: EarlierAnswers | None = None
    ) -> CapturedRows:
        input_ids, first_index = request.input_ids, request.first_index
        assert earlier is not None and request.distributions and not request.hidden_states
        for _ in range(20 - 2 * len(earlier.answers)):
            await asyncio.sleep(0)
        if len(earlier.answers) == self.fails:
            raise RuntimeError("refused")
        is_cached = first_index <= self.num_cached < len(input_ids) - 1
        self.known.append(await earlier.rows(self.num_cached) if is_cached else None)
        return self.rows(input_ids, first_index)

    @staticmethod
    def rows(input_ids: list[int], first_index: int, entries: int = 5) -> CapturedRows:
        rows = [
            -np.sort(np.random.default_rng(input_ids[:i]).exponential(1, 6))
            for i in range(first_index, len(input_ids))
        ]
        logprobs = np.array(rows, np.float32)
        gold = np.array(input_ids[first_index:])
        ids = np.tile(np.arange(entries), (len(rows), 1)).astype(np.int32)
        return CapturedRows(ids, logprobs[:, :entries], logprobs[np.arange(len(gold)), gold])


def asked(teacher: Cached, answers: list[list[int]], first: int = 2) -> list:
    async def together() -> list:
        siblings = Siblings()
        each = [siblings.score(teacher, ScoringRequest(ids, first)) for ids in answers]  # pyright: ignore[reportArgumentType]
        return await asyncio.gather(*each, return_exceptions=True)

    return asyncio.run(together())


def test_rows_of_a_cached_beginning_come_from_the_earlier_answer_that_has_it() -> None:
    answers = [[1, 2, 3, 4, 0], [1, 2, 4, 4, 4], [1, 2, 3, 4, 1, 1], [1, 2, 3, 1, 1, 1, 1]]
    teacher = Cached(num_cached=3)
    asked(teacher, answers)
    assert [known is not None for known in teacher.known] == [False, False, True, True]
    for known, ids in zip(teacher.known[2:], answers[2:], strict=True):
        assert known is not None
        expected = Cached.rows(ids[:4], 2)  # tokens 2 and 3; the latter differs in the last answer
        for name in ("token_ids", "logprobs", "gold_logprobs"):
            np.testing.assert_array_equal(getattr(known, name), getattr(expected, name))


def test_a_gold_token_that_was_not_captured_is_not_made_up() -> None:
    teacher = Cached(num_cached=3)
    asked(teacher, [[1, 2, 3, 4, 0], [1, 2, 3, 5, 0], [1, 2, 3, 5, 1]])
    # id 5 is outside the five captured; the third has it from the second
    first, second, third = teacher.known
    assert first is None and second is not None and third is not None
    expected = Cached.rows([1, 2, 3, 5], 2)
    assert np.isnan(second.gold_logprobs[-1])
    np.testing.assert_array_equal(second.gold_logprobs[:-1], expected.gold_logprobs[:-1])
    np.testing.assert_array_equal(second.logprobs, expected.logprobs)
    np.testing.assert_array_equal(third.gold_logprobs, expected.gold_logprobs)


def test_an_answer_that_is_too_short_or_fails_gives_no_rows() -> None:
    teacher = Cached(num_cached=3)
    asked(teacher, [[1, 2, 3], [1, 2, 3, 4, 0]])
    assert teacher.known == [None, None]
    teacher = Cached(num_cached=3, fails=0)
    failed, other = asked(teacher, [[1, 2, 3, 4, 0], [1, 2, 3, 4, 1]])
    assert isinstance(failed, RuntimeError) and isinstance(other, CapturedRows)
    assert teacher.known == [None]
