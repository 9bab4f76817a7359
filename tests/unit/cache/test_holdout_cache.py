"""Wide rows of the hold-out split beside caches of draws: written in the same pass, planned, named,
mended, and used by the report alone.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.bookkeeping.plan import plan_score
from jobs.bookkeeping.stage_records import scored_dataset, write_record
from jobs.caches.actions import status, verify
from jobs.caches.regenerate import RegenerationRequest as Request
from jobs.caches.regenerate import regenerate_inside_job
from jobs.caches.run_caches import open_caches
from jobs.stages.holdout import measured_layouts
from jobs.stages.score import score
from pipeline import storage
from pipeline.cache.kinds import entries_of, holdout_identities
from pipeline.cache.reader import open_cache
from pipeline.cache_care.gc import find_garbage
from pipeline.config.scoring import selection_of
from pipeline.errors import ConfigError
from pipeline.run.training_spec import training_specs
from tests.support.fabricated import WIDTH, FabricatedRun, FakePools

DRAWN = [
    "scoring.selection={type: head_and_sampled, head_mass: 0.5, max_head_entries: 4, num_draws: 8}",
    "synthesis.filters=[]",
]
WIDE = {"arithmetic+holdout", "words+holdout"}


@pytest.fixture
def run(tmp_path: Path, pools: FakePools) -> FabricatedRun:
    made = FabricatedRun(tmp_path, overrides=[*DRAWN])
    made.prepare()
    made.write_answers(0, 4)
    made.write_answers(4, 6, "holdout")
    return made


def scored(made: FabricatedRun) -> None:
    """Scores, and keeps the stage record, as the stage's entry point does."""
    run = made.prepare()
    digest = storage.read_json(made.layout.stage_record("synthesize"))["dataset"]
    write_record(made.layout, "score", score(run, digest))


def as_of_an_earlier_version(made: FabricatedRun) -> None:
    """Takes away what that version did not write."""
    pins = storage.read_json(made.layout.pins)
    storage.write_json(made.layout.pins, {n: g for n, g in pins.items() if "+holdout" not in n})
    for path in made.root.glob("caches/*+holdout-*"):
        for file in sorted(path.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        path.rmdir()


def test_holdout_sequences_are_captured_once_for_both_caches(
    run: FabricatedRun, pools: FakePools
) -> None:
    scored(run)
    prepared = run.prepare()
    assert len(pools.scored) == len(set(pools.scored)) == 2 * len(run.entries())
    held_out = {e.sequence_id for e in run.entries() if e.split == "holdout"}
    for name, cache in prepared.holdout_layouts().items():
        wide, drawn = open_cache(cache), open_cache(prepared.cache_layouts()[name[:-8]])
        for entry in run.entries():
            row, trained = wide.row(entry.sequence_id), drawn.row(entry.sequence_id)
            assert (row is not None) == (entry.sequence_id in held_out)
            assert trained is not None and trained.is_drawn
            if row is not None:
                assert not row.is_drawn and (row.num_entries == WIDTH).all()
                assert np.array_equal(row.gold_logprobs, trained.gold_logprobs)
                assert np.array_equal(row.entropies, trained.entropies)


def test_nothing_that_trains_knows_of_wide_rows(run: FabricatedRun) -> None:
    scored(run)
    prepared = run.prepare()
    assert set(prepared.holdout_layouts()) == WIDE
    assert "+holdout" not in json.dumps(storage.read_json(run.layout.prepared))
    assert set(prepared.cache_layouts()) == {"arithmetic", "words"}
    for spec in training_specs(prepared, "d"):
        assert "+holdout" not in json.dumps(spec.identity())


@pytest.mark.parametrize(("width", "kept"), [(16, 16), (64, 64), (300, 255)])
def test_a_wide_row_keeps_what_was_captured(width: int, kept: int, run: FabricatedRun) -> None:
    identity = run.prepare().prepared.cache_identities["words"] | {"num_logprobs": width}
    (wide,) = holdout_identities({"words": identity}).values()
    assert selection_of(wide).max_entries == kept and not selection_of(wide).is_drawn
    assert {key for key in wide if wide[key] != identity[key]} == {"selection"}


def test_buckets_need_no_second_cache(tmp_path: Path) -> None:
    assert FabricatedRun(tmp_path).prepare().holdout_layouts() == {}


def test_the_plan_counts_wide_rows(run: FabricatedRun, pools: FakePools) -> None:
    plan = plan_score(run.prepare(), run.entries())
    assert plan.todo == 12 + 12 + 4 + 4
    assert "arithmetic+holdout 4, words+holdout 4; caches grow by" in plan.summary
    scored(run)
    assert plan_score(run.prepare(), run.entries()).todo == 0
    for digest in run.shards("words+holdout"):
        next(run.root.glob(f"caches/words+holdout-*/g1/{digest}.parquet")).unlink()
    assert plan_score(run.prepare(), run.entries()).todo == 4
    del pools.scored[:]
    scored(run)
    assert {who for who, _ in pools.scored} == {"words"} and len(pools.scored) == 4


def test_a_finished_run_of_an_earlier_version_stays_finished(run: FabricatedRun) -> None:
    scored(run)
    as_of_an_earlier_version(run)
    prepared = run.prepare()
    held_out = entries_of("words+holdout", run.entries())
    assert scored_dataset(prepared) is not None
    assert plan_score(prepared, run.entries()).todo == 0
    assert measured_layouts(prepared, held_out) == prepared.distribution_layouts()
    assert status(open_caches(run.config)).count("+holdout") > 0
    regenerate_inside_job(run.config, Request())
    measured = measured_layouts(run.prepare(), held_out)
    assert [cache.folder for cache in measured.values()] == [
        cache.folder for cache in run.prepare().holdout_layouts().values()
    ]


def test_cache_commands_know_wide_rows(run: FabricatedRun, pools: FakePools) -> None:
    scored(run)
    caches = open_caches(run.config)
    assert set(caches.layouts) == {"arithmetic", "words", *WIDE}
    assert find_garbage(run.layout, time.time()).garbage == []
    Path(run.layout.pins).unlink()
    assert find_garbage(run.layout, time.time()).garbage == [], "a preparation names them, too"
    scored(run)
    assert status(caches).splitlines()[4].split()[:4] == [
        "arithmetic+holdout", f"{caches.layouts['arithmetic+holdout'].name}/g1", "2", "0",
    ]  # fmt: skip
    assert caches.distributions(None) == ["arithmetic", "words"]
    assert caches.distributions("words+holdout") == ["words+holdout"]
    with pytest.raises(ConfigError, match="no teacher 'wordz'"):
        caches.chosen("wordz")
    del pools.scored[:]
    regenerate_inside_job(run.config, Request(force=True, where={"split": "train"}))
    assert run.shards("words+holdout", 2) == {} and len(pools.scored) == 16
    regenerate_inside_job(run.config, Request(force=True, where={"split": "holdout"}))
    assert len(run.shards("words+holdout", 2)) == 2
    assert [row.gold_logprobs.tolist() for row in rows_of(run)] == [
        row.gold_logprobs.tolist() for row in rows_of(run, 2)
    ]


def rows_of(run: FabricatedRun, generation: int = 1) -> list:
    cache = replace(run.prepare().all_layouts()["words+holdout"], generation=generation)
    reader = open_cache(cache)
    return [reader.row(e.sequence_id) for e in entries_of("words+holdout", run.entries())]


def test_a_corrupt_wide_shard_is_found_and_scored_again(
    run: FabricatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.caches.actions.vocabulary_of", lambda *_: 20)
    scored(run)
    shard = next(run.root.glob("caches/words+holdout-*/g1/*.parquet"))
    sound = shard.read_bytes()
    shard.write_bytes(sound[:-40])
    problems = {name: c.problems for name, c in verify(open_caches(run.config), None).items()}
    assert {name for name, found in problems.items() if found} == {"words+holdout"}
    regenerate_inside_job(run.config, Request())
    assert all(not c.problems for c in verify(open_caches(run.config), None).values())
