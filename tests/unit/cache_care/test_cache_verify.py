"""What `verify` finds: each broken invariant, each kind of bad shard; and nothing in a good one."""

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jobs.caches.actions import verify
from jobs.caches.run_caches import open_caches
from jobs.caches.verify import _log_differences, rows_to_rescore, verify_rows
from pipeline import storage
from pipeline.cache.manifest import publish
from pipeline.cache.selection import select
from pipeline.cache.shard import read_shard, write_shard
from pipeline.cache_care.verify import row_problems
from pipeline.config.scoring import HeadAndSampled, Sampled, Selection
from pipeline.errors import CacheError
from pipeline.records import SparseLogprobs
from teachers.pool.contracts import PoolReport
from teachers.protocol import EngineSpec, ScoringRequest
from teachers.tasks.rescore import SURPRISE, RescoreTask, draws_surprise, row_difference
from tests.support.caches import flip_bit
from tests.support.fabricated import (
    VOCABULARY,
    FabricatedRun,
    FakePools,
    FakeTeacher,
    make_sequence,
)
from tests.support.logs import logged

SEQUENCE = make_sequence("words", 3)
SAMPLED = Sampled(type="sampled", num_draws=8)
HEADED = HeadAndSampled(type="head_and_sampled", head_mass=0.5, max_head_entries=4, num_draws=8)


@pytest.fixture
def run(tmp_path: Path, pools: FakePools) -> FabricatedRun:
    made = FabricatedRun(tmp_path)
    made.prepare()
    made.write_answers(0, 4)
    made.score()
    return made


@pytest.fixture
def good(run: FabricatedRun) -> SparseLogprobs:
    cache = open_caches(run.config).layouts["words"]
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
        (
            "token_ids",
            VOCABULARY,
            f"token id {VOCABULARY} is not below the vocabulary size {VOCABULARY}",
        ),
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


def test_exact_entries_and_tail_are_one_distribution(good: SparseLogprobs) -> None:
    lower = replace(good, logprobs=good.logprobs - np.float16(1))
    for wrong in (changed(good, "tail_mass", 1, 0.5), lower):
        assert any(
            "exact entries and tail have a mass of" in p for p in row_problems(wrong, 20, None)
        )
    for rule in (SAMPLED, HEADED):
        row = drawn(rule)
        assert row_problems(changed(row, "tail_mass", 0, 0.0), VOCABULARY, SEQUENCE) == []
    more = changed(row, "tail_mass", 0, 0.9)
    (problem,) = row_problems(more, VOCABULARY, SEQUENCE)
    assert problem.startswith("position 0: exact entries and tail have a mass of 1.")


def test_an_id_held_twice_is_said(good: SparseLogprobs) -> None:
    twice = changed(good, "token_ids", 1, good.token_ids[0])
    problem = f"position 0 holds the token id {good.token_ids[0]} twice"
    assert problem in row_problems(twice, VOCABULARY, None)


def test_a_row_of_other_length_is_said(good: SparseLogprobs) -> None:
    longer = replace(SEQUENCE, loss_spans=((3, len(SEQUENCE.input_ids)),))
    (problem,) = row_problems(good, VOCABULARY, longer)
    positions = good.num_positions
    assert problem == f"it has {positions} positions, its sequence has {positions + 1}"


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
    assert problem.startswith(f"position {j}: the gold token is not among the exact entries")


def test_the_whole_cache_of_a_run_is_good(run: FabricatedRun) -> None:
    for checked in verify(open_caches(run.config), None).values():
        assert (checked.problems, checked.num_shards) == ([], 2)
        assert checked.num_rows == checked.num_compared == 8


def break_bytes(path: Path, rows: list[SparseLogprobs], fingerprint: str) -> None:
    flip_bit(path)


def other_identity(path: Path, rows: list[SparseLogprobs], fingerprint: str) -> None:
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
        (other_identity, "was made under identity 00000000000000000000000000000000"),
        (other_sequences, "does not hold the sequences that its name promises"),
        (false_gold, "the gold token is kept with"),
    ],
)
def test_a_bad_shard_is_named_and_the_exit_is_an_error(
    run: FabricatedRun, harm, message: str
) -> None:
    opened = open_caches(run.config)
    path = Path(opened.layouts["words"].shard(next(iter(run.shards("words")))))
    harm(path, read_shard(str(path)), opened.fingerprint("words"))
    with (
        logged("jobs.caches") as said,
        pytest.raises(CacheError, match=r"caches have \d problems.*cache regenerate CONFIG"),
    ):
        verify_rows(run.config, None, None, 0, None)
    assert any(line.startswith(f"words: {path}") and message in line for line in said)
    assert any(line.startswith("arithmetic:") and "no problems" in line for line in said)


def test_an_index_that_differs_from_its_shards_is_named(run: FabricatedRun) -> None:
    opened = open_caches(run.config)
    cache = opened.layouts["words"]
    name = next(iter(run.shards("words")))
    rows = read_shard(cache.shard(name))
    lower = [replace(row, gold_logprobs=row.gold_logprobs) for row in rows]
    lower[0] = changed(lower[0], "entropies", 0, 9.0)
    write_shard(cache.shard(name), lower, opened.fingerprint("words"))
    (problem,) = verify(opened, "words")["words"].problems
    assert problem.path == cache.index and name in problem.text


def test_a_shard_that_is_gone_and_a_manifest_of_other_shards_are_named(run: FabricatedRun) -> None:
    opened = open_caches(run.config)
    cache = opened.layouts["words"]
    manifest = storage.read_json(cache.manifest)
    manifest["totals"]["num_sequences"] += 1
    storage.write_json(cache.manifest, manifest)
    gone = cache.shard(next(iter(run.shards("words"))))
    Path(gone).unlink()
    found = verify(opened, "words")["words"]
    assert {problem.path for problem in found.problems} == {gone, cache.manifest}
    assert found.num_rows == 4


def test_what_an_interrupted_scoring_left_has_no_problem(run: FabricatedRun) -> None:
    opened = open_caches(run.config)
    cache = opened.layouts["words"]
    _, other = (Path(cache.shard(name)) for name in run.shards("words"))
    whole = other.read_bytes()
    other.unlink()
    publish(cache, {}, {})
    other.write_bytes(whole)
    assert verify(opened, "words")["words"].problems == []
    Path(cache.index).unlink()
    assert verify(opened, "words")["words"].problems == []


def rescore(run: FabricatedRun, salt: str, name: str = "words") -> PoolReport:
    opened = open_caches(run.config)
    shards = {entry.shard for entry in opened.entries}
    tasks = [
        RescoreTask(
            opened.layouts[name],
            f"{opened.run.layout.root}/{shard}",
            tuple(e.sequence_id for e in opened.entries if e.shard == shard),
        )
        for shard in sorted(shards)
    ]
    job = SimpleNamespace(name=name, tasks=tasks, spec=EngineSpec(model="", min_model_len=1))
    (report,) = FakePools({"words": salt})([job]).values()
    return report


def test_another_seed_draws_other_rows(run: FabricatedRun) -> None:
    def drawn_by(seed: int) -> set[str]:
        tasks = rows_to_rescore(open_caches(run.config), "words", 3, seed)
        return {identifier for task in tasks for identifier in task.sequence_ids}

    assert drawn_by(1) == drawn_by(1) and len(drawn_by(1)) == 3
    assert len({frozenset(drawn_by(seed)) for seed in range(8)}) > 4


def test_rows_scored_again_by_the_same_teacher_agree(run: FabricatedRun) -> None:
    with logged("jobs.caches") as said:
        _log_differences({"words": rescore(run, "words")})
    (line,) = said
    assert "8 rows scored again" in line and "no rows beyond it" in line


def test_rows_of_another_teacher_are_named(run: FabricatedRun) -> None:
    with (
        logged("jobs.caches") as said,
        pytest.raises(CacheError, match=r"8 rows, .* differ from what their teacher says now"),
    ):
        _log_differences({"words": rescore(run, "another")})
    assert sum(": sequence " in line for line in said) == 8


def test_a_difference_is_measured_at_its_own_entry(good: SparseLogprobs) -> None:
    captured = asyncio.run(
        FakeTeacher("words").score(ScoringRequest(SEQUENCE.input_ids.tolist(), 4))
    )
    rows = np.arange(good.num_positions)
    same = row_difference(good, captured, rows)
    assert same.excess <= 0 and same.num_entries == len(good.token_ids)
    moved = row_difference(changed(good, "logprobs", 3, good.logprobs[3] - 0.25), captured, rows)
    assert moved.exact_max == pytest.approx(0.25, abs=0.01) and moved.gold_max == same.gold_max
    assert moved.excess == pytest.approx(0.25, abs=0.02)
    assert moved.exact_excess == pytest.approx(moved.excess / same.num_entries)
    assert not moved.is_beyond(0.04) and moved.is_beyond(0.02), "one value, against eight times"
    lower = row_difference(replace(good, logprobs=good.logprobs - np.float16(0.25)), captured, rows)
    assert not lower.is_beyond(0.26) and lower.is_beyond(0.2), "the mean of all entries"
    assert lower.gold_excess <= same.gold_excess
    unknown = row_difference(changed(good, "token_ids", 0, 10**6), captured, rows)
    least = float(captured.logprobs[0, -1])
    assert unknown.exact_max == pytest.approx(float(good.logprobs[0]) - least, abs=0.01)


def drawn(rule: Selection, salt: str = "words", first: int = 4) -> SparseLogprobs:
    """The row that a selection with draws keeps of a teacher's numbers."""
    captured = asyncio.run(
        FakeTeacher(salt).score(ScoringRequest(SEQUENCE.input_ids.tolist(), first))
    )
    arrays = (captured.token_ids, captured.logprobs, captured.gold_logprobs)
    return select(SEQUENCE.sequence_id, *arrays, rule, teacher="words")


@pytest.mark.parametrize("rule", [SAMPLED, HEADED])
def test_a_drawn_row_is_checked_and_has_no_problem(rule: Selection) -> None:
    assert row_problems(drawn(rule), VOCABULARY, SEQUENCE) == []


def test_gold_of_a_drawn_row_is_checked_against_its_head() -> None:
    row = drawn(HEADED)
    first_P = np.cumsum(row.num_entries) - row.num_entries
    (j, *_) = np.flatnonzero(row.token_ids[first_P] != SEQUENCE.gold_ids)
    (problem,) = row_problems(changed(row, "gold_logprobs", j, 0.0), VOCABULARY, SEQUENCE)
    assert problem.startswith(f"position {j}: the gold token is ")


@pytest.mark.parametrize("rule", [SAMPLED, HEADED])
def test_a_drawn_row_is_judged_by_gold_head_and_draws(rule: Selection) -> None:
    row = drawn(rule)
    captured = asyncio.run(
        FakeTeacher("words").score(ScoringRequest(SEQUENCE.input_ids.tolist(), 4))
    )
    rows = np.arange(row.num_positions)
    same = row_difference(row, captured, rows)
    assert same.excess <= 0 and not same.is_beyond(0.0)
    assert same.num_entries == len(row.logprobs) and same.num_draws == 8 * row.num_positions
    if len(row.logprobs):
        moved = row_difference(changed(row, "logprobs", 0, row.logprobs[0] + 0.25), captured, rows)
        assert moved.exact_max == pytest.approx(0.25, abs=0.01)
    least = captured.token_ids[np.repeat(rows, row.num_entries), -1]
    wrong = np.where(row.is_exact_N, row.token_ids, least).astype(np.uint32)
    false = row_difference(replace(row, token_ids=wrong), captured, rows)
    assert false.excess <= 0 and false.surprise > SURPRISE and false.is_beyond(1.0)


def test_the_surprise_of_draws_bounds_their_probability() -> None:
    """Of rows drawn from the given probabilities at most `10 exp(-x)` surprise by more than x; rows
    drawn from flatter ones are found at once, from steeper ones in sum.
    """
    rng = np.random.default_rng(0)
    p_PK = rng.dirichlet(np.full(16, 0.3), size=6)

    def surprise(drawn_from_PK: np.ndarray) -> float:
        counts_PK = np.stack([rng.multinomial(12, p_K) for p_K in drawn_from_PK])
        position_D, column_D = np.nonzero(counts_PK)
        counts_D = counts_PK[position_D, column_D].astype(float)
        return draws_surprise(np.log(p_PK), position_D, column_D, counts_D)

    found = np.array([surprise(p_PK) for _ in range(5_000)])
    for level in (1.0, 3.0, 5.0):
        assert (found > level).mean() <= 10 * np.exp(-level)
    assert found.max() < SURPRISE and np.median(found) > 0
    flat, steep = np.full_like(p_PK, 1 / 16), p_PK**6 / (p_PK**6).sum(1, keepdims=True)
    assert min(surprise(flat) for _ in range(100)) > SURPRISE
    assert np.median([surprise(steep) for _ in range(100)]) > np.quantile(found, 0.99)


def test_an_id_that_is_no_longer_captured_counts_as_the_least() -> None:
    logprobs = np.log(np.array([[0.6, 0.3, 0.1]]))
    place, count = np.array([0]), np.array([4.0])
    missing = draws_surprise(logprobs, place, np.array([-1]), count)
    assert missing == draws_surprise(logprobs, place, np.array([2]), count) > 3
    assert draws_surprise(logprobs, *np.zeros((2, 0), int), np.zeros(0)) == 0


def test_draws_of_another_teacher_are_named_in_rows_scored_again(
    tmp_path: Path, pools: FakePools
) -> None:
    selection = "{type: sampled, num_draws: 12}"
    run = FabricatedRun(tmp_path, overrides=[f"scoring.selection={selection}"])
    run.prepare()
    run.write_answers(0, 4)
    run.score()
    with logged("jobs.caches") as said:
        _log_differences({"words": rescore(run, "words")})
    assert "the least likely draws of a row have e^-" in said[0] and "no rows beyond" in said[0]
    with logged("jobs.caches") as said, pytest.raises(CacheError):
        _log_differences({"words": rescore(run, "another")})
    assert any("its draws have a probability of e^-" in line for line in said)
