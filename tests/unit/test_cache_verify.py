"""What `verify` finds: each broken invariant, each kind of bad shard; and nothing in a good one."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jobs.caches import open_run, verify
from jobs.verify import _say_differences, verify_rows
from pipeline.cache import read_shard, write_shard
from pipeline.cache_verify import row_problems
from pipeline.errors import CacheError
from pipeline.records import SparseLogprobs
from teachers.dispatch import PoolReport
from teachers.engine import EngineSpec
from teachers.rescoring import RescoringTask, row_difference
from tests.support.caches import flip_bit
from tests.support.fabricated import (
    VOCABULARY,
    FabricatedRun,
    FakePools,
    FakeTeacher,
    make_sequence,
)

SEQUENCE = make_sequence("words", 3)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FabricatedRun:
    monkeypatch.setattr("jobs.score.run_pools", FakePools())
    made = FabricatedRun(tmp_path)
    made.prepare()
    made.write_answers(0, 4)
    made.score()
    return made


@pytest.fixture
def good(run: FabricatedRun) -> SparseLogprobs:
    cache = open_run(run.config).caches["words"]
    rows = [row for name in run.shards("words") for row in read_shard(cache.shard(name))]
    (row,) = [row for row in rows if row.sequence_id == SEQUENCE.sequence_id]
    return row


def changed(row: SparseLogprobs, name: str, index: int, value: float) -> SparseLogprobs:
    array = getattr(row, name).copy()
    array[index] = value
    return replace(row, **{name: array})


def kept_gold(row: SparseLogprobs) -> int:
    """The first position whose gold token is among its entries."""
    starts = np.cumsum(row.num_entries) - row.num_entries
    for j, start in enumerate(starts):
        if SEQUENCE.gold_ids[j] in row.token_ids[start : start + row.num_entries[j]]:
            return j
    raise AssertionError("no gold token is kept")


def test_a_good_row_has_no_problem(good: SparseLogprobs) -> None:
    assert row_problems(good, VOCABULARY, SEQUENCE) == []
    assert row_problems(good, VOCABULARY, None) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_ids", VOCABULARY, f"token id {VOCABULARY} in a vocabulary of {VOCABULARY}"),
        ("tail_mass", 1.5, "a tail mass is not between 0 and 1"),
        ("tail_mass", -0.5, "a tail mass is not between 0 and 1"),
        ("entropies", -0.5, "an entropy is negative"),
        ("gold_logprobs", 0.25, "a log-probability is above 0"),
        ("gold_logprobs", np.nan, "a value is not finite"),
        ("logprobs", -30.0, "entries are not in descending order"),
    ],
)
def test_a_broken_invariant_is_said(
    good: SparseLogprobs, name: str, value: float, message: str
) -> None:
    assert message in row_problems(changed(good, name, 0, value), VOCABULARY, SEQUENCE)


def test_an_id_held_twice_is_said(good: SparseLogprobs) -> None:
    twice = changed(good, "token_ids", 1, good.token_ids[0])
    assert "a position holds a token id twice" in row_problems(twice, VOCABULARY, None)


def test_a_row_of_other_length_is_said(good: SparseLogprobs) -> None:
    longer = replace(SEQUENCE, loss_spans=((3, len(SEQUENCE.input_ids)),))
    (problem,) = row_problems(good, VOCABULARY, longer)
    assert problem == f"{good.num_positions} positions, its sequence has {good.num_positions + 1}"


def test_gold_that_differs_from_its_own_entry_is_said(good: SparseLogprobs) -> None:
    j = kept_gold(good)
    lower = changed(good, "gold_logprobs", j, good.gold_logprobs[j] - np.float16(0.5))
    (problem,) = row_problems(lower, VOCABULARY, SEQUENCE)
    assert problem.startswith(f"position {j}: the gold token is kept with")
    assert row_problems(lower, VOCABULARY, None) == []


def test_gold_that_is_not_kept_and_yet_likelier_is_said(good: SparseLogprobs) -> None:
    j = kept_gold(good)
    outside = np.setdiff1d(np.arange(VOCABULARY), good.token_ids)
    start = int(good.num_entries[:j].sum())
    place = start + int(np.argmax(good.token_ids[start:] == SEQUENCE.gold_ids[j]))
    free = outside[0] if len(outside) else VOCABULARY
    moved = changed(good, "token_ids", place, free)
    moved = changed(moved, "gold_logprobs", j, 0.0)
    (problem,) = row_problems(moved, VOCABULARY + 1, SEQUENCE)
    assert problem.startswith(f"position {j}: the gold token is not among the entries")


def test_the_whole_cache_of_a_run_is_good(run: FabricatedRun) -> None:
    for checked in verify(open_run(run.config), None).values():
        assert (checked.problems, checked.num_shards) == ([], 2)
        assert checked.num_rows == checked.num_compared == 8


def break_bytes(path: Path, rows: list[SparseLogprobs], fingerprint: str) -> None:
    flip_bit(path)


def other_recipe(path: Path, rows: list[SparseLogprobs], fingerprint: str) -> None:
    write_shard(str(path), rows, "0" * 32)


def other_sequences(path: Path, rows: list[SparseLogprobs], fingerprint: str) -> None:
    write_shard(str(path), rows[:-1], fingerprint)


def false_gold(path: Path, rows: list[SparseLogprobs], fingerprint: str) -> None:
    rows = [replace(r, gold_logprobs=r.gold_logprobs - np.float16(3)) for r in rows]
    write_shard(str(path), rows, fingerprint)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_bytes, "CRC"),
        (other_recipe, "was made under the recipe 00000000000000000000000000000000"),
        (other_sequences, "holds other sequences than its name says"),
        (false_gold, "the gold token is kept with"),
    ],
)
def test_a_bad_shard_is_named_and_the_exit_is_an_error(
    run: FabricatedRun, harm, message: str
) -> None:
    opened = open_run(run.config)
    path = Path(opened.caches["words"].shard(next(iter(run.shards("words")))))
    harm(path, read_shard(str(path)), opened.fingerprint("words"))
    said: list[str] = []
    with pytest.raises(CacheError, match=r"problems in the caches.*cache regenerate CONFIG"):
        verify_rows(run.config, None, None, 0, said.append)
    assert any(line.startswith(f"words: {path}") and message in line for line in said)
    assert any(line.startswith("arithmetic:") and "no problems" in line for line in said)


def test_an_index_that_differs_from_its_shards_is_named(run: FabricatedRun) -> None:
    opened = open_run(run.config)
    cache = opened.caches["words"]
    name = next(iter(run.shards("words")))
    rows = read_shard(cache.shard(name))
    lower = [replace(row, gold_logprobs=row.gold_logprobs) for row in rows]
    lower[0] = changed(lower[0], "entropies", 0, 9.0)
    write_shard(cache.shard(name), lower, opened.fingerprint("words"))
    (problem,) = verify(opened, "words")["words"].problems
    assert problem.path == cache.index and name in problem.text


def rescore(run: FabricatedRun, salt: str, name: str = "words") -> PoolReport:
    opened = open_run(run.config)
    shards = {entry.shard for entry in opened.entries}
    tasks = [
        RescoringTask(
            opened.caches[name],
            f"{opened.layout.root}/{shard}",
            tuple(e.sequence_id for e in opened.entries if e.shard == shard),
        )
        for shard in sorted(shards)
    ]
    job = SimpleNamespace(name=name, tasks=tasks, spec=EngineSpec(model="", min_model_len=1))
    (report,) = FakePools({"words": salt})([job]).values()
    return report


def test_rows_scored_again_by_the_same_teacher_agree(run: FabricatedRun) -> None:
    said: list[str] = []
    _say_differences({"words": rescore(run, "words")}, said.append)
    (line,) = said
    assert "8 rows scored again" in line and "no rows beyond it" in line


def test_rows_of_another_teacher_are_named(run: FabricatedRun) -> None:
    said: list[str] = []
    with pytest.raises(CacheError, match="8 rows are not what their teacher says now"):
        _say_differences({"words": rescore(run, "another")}, said.append)
    assert sum(": sequence " in line for line in said) == 8


def test_a_difference_is_measured_at_its_own_entry(good: SparseLogprobs) -> None:
    captured = asyncio.run(FakeTeacher("words").score(SEQUENCE.input_ids.tolist(), 4))
    rows = np.arange(good.num_positions)
    same = row_difference(good, captured, rows)
    assert same.excess <= 0 and same.num_entries == len(good.token_ids)
    moved = row_difference(changed(good, "logprobs", 3, good.logprobs[3] - 0.25), captured, rows)
    assert moved.head_max == pytest.approx(0.25, abs=0.01) and moved.gold_max == same.gold_max
    assert moved.excess == pytest.approx(0.25, abs=0.02)
    unknown = row_difference(changed(good, "token_ids", 0, 10**6), captured, rows)
    least = float(captured.logprobs[0, -1])
    assert unknown.head_max == pytest.approx(float(good.logprobs[0]) - least, abs=0.01)
