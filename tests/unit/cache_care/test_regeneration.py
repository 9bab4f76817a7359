"""Generations and regeneration, with engines that are not there: which rows are scored again."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.caches import regenerate
from jobs.caches.regenerate import RegenerationRequest as Request
from jobs.caches.regenerate import regenerate_inside_job
from jobs.caches.run_caches import open_caches
from pipeline import storage
from pipeline.cache.generations import (
    begin_generation,
    current_generation,
    named_generations,
    pinned_generations,
    unfinished_generation,
)
from pipeline.cache.index import load_index, read_index
from pipeline.cache.manifest import is_published
from pipeline.cache.reader import open_cache
from pipeline.cache.shard import read_shard
from pipeline.cache_care.regeneration import find_damage, parse_where, set_aside
from pipeline.errors import CacheError, ConfigError, TeacherError
from pipeline.layout import CacheLayout
from pipeline.run.training_spec import training_specs
from teachers.tasks.score import ScoreTask
from tests.support.caches import flip_bit
from tests.support.command_line import file_times
from tests.support.fabricated import FabricatedRun, FakePools
from tests.support.logs import logged

FORCE = Request(force=True)


@pytest.fixture
def run(tmp_path: Path, pools: FakePools) -> FabricatedRun:
    """Two shards of each domain, scored by both teachers."""
    made = FabricatedRun(tmp_path)
    made.prepare()
    made.write_answers(0, 4)
    made.write_answers(4, 8)
    made.score()
    pools.scored.clear()
    return made


def redo(run: FabricatedRun, request: Request = Request()) -> list[str]:  # noqa: B008
    with logged("jobs.caches") as said:
        regenerate_inside_job(run.config, request)
    return said


def cache_of(run: FabricatedRun, teacher: str = "words", generation: int = 1) -> CacheLayout:
    return replace(open_caches(run.config).layouts[teacher], generation=generation)


def golds(cache: CacheLayout) -> dict[str, bytes]:
    reader = open_cache(cache)
    ids = {i for entry in load_index(cache) for i in entry.sequence_ids}
    return {i: reader.row(i).gold_logprobs.tobytes() for i in ids}


def forbid_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object) -> None:
        raise AssertionError("a cluster was asked for")

    monkeypatch.setattr(regenerate, "cluster", start)


def test_with_nothing_to_do_no_cluster_is_started(
    run: FabricatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_clusters(monkeypatch)
    with logged("jobs.caches") as said:
        regenerate.regenerate(run.config, None, Request())
    (line,) = said
    assert line.startswith("nothing to do")
    os.unlink(cache_of(run).shard(next(iter(run.shards("words")))))
    with (
        logged("jobs.caches") as said,
        pytest.raises(AssertionError, match="a cluster was asked for"),
    ):
        regenerate.regenerate(run.config, None, Request())
    assert said[-1] == "words: 1 shards that are gone, 4 sequences without a row"


def test_new_prompts_are_scored_and_no_old_shard_is_touched(
    run: FabricatedRun, pools: FakePools
) -> None:
    before = {name: run.shards(name) for name in ("arithmetic", "words")}
    known = {entry.sequence_id for entry in run.entries()}
    run.write_answers(8, 10)
    redo(run)
    new = {entry.sequence_id for entry in run.entries()} - known
    assert {identifier for _, identifier in pools.scored} == new and len(new) == 4
    for name, shards in before.items():
        now = run.shards(name)
        assert {shard: now[shard] for shard in shards} == shards
        assert len(now) == len(shards) + 2


def test_a_new_teacher_touches_no_other(run: FabricatedRun, pools: FakePools) -> None:
    before = {name: run.shards(name) for name in ("arithmetic", "words")}
    model = run.config.teachers["words"].model
    run.overrides = [f"teachers.third={{model: {model}}}"]
    run.prepare()
    redo(run)
    assert {name for name, _ in pools.scored} == {"third"}
    assert {name: run.shards(name) for name in before} == before
    assert sum(map(len, [run.shards("third")])) == 4


def test_a_changed_teacher_gets_a_new_folder_and_no_other_is_touched(
    run: FabricatedRun, pools: FakePools
) -> None:
    before = {name: run.shards(name) for name in ("arithmetic", "words")}
    run.overrides = ["teachers.words.vllm.dtype=bfloat16"]
    run.prepare()
    redo(run)
    assert {name for name, _ in pools.scored} == {"words"}
    now = run.shards("words")
    assert run.shards("arithmetic") == before["arithmetic"]
    assert len(list(run.root.glob("caches/words-*/g1/*.parquet"))) == 8
    assert now.keys() == before["words"].keys()


def test_a_corrupt_shard_is_set_aside_and_its_sequences_scored_again(
    run: FabricatedRun, pools: FakePools
) -> None:
    cache, shards = cache_of(run), run.shards("words")
    bad = next(iter(shards))
    expected = read_shard(cache.shard(bad))
    whole = Path(cache.shard(bad)).read_bytes()
    Path(cache.shard(bad)).write_bytes(whole[:-40])
    said = redo(run)
    assert any(f"words: shard {bad} is corrupt and set aside" in line for line in said)
    assert Path(cache.aside, f"{bad}.parquet").read_bytes() == whole[:-40]
    assert pools.scored == [("words", row.sequence_id) for row in expected]
    assert Path(cache.shard(bad)).read_bytes() == whole
    now = run.shards("words")
    assert {name: now[name] for name in shards if name != bad} == {
        name: times for name, times in shards.items() if name != bad
    }
    assert {entry.digest: entry for entry in load_index(cache)}[bad].num_bytes == len(whole)


def test_the_index_describes_the_mended_shard_and_not_the_corrupt_one(
    run: FabricatedRun, pools: FakePools
) -> None:
    cache = cache_of(run)
    flip_bit(Path(cache.shard(next(iter(run.shards("words"))))))
    pools.salts = {"words": "the same weights on another machine"}
    redo(run)
    assert len(pools.scored) == 4
    assert find_damage(cache, open_caches(run.config).fingerprint("words")).index is None


def test_a_corrupt_shard_of_another_run_is_mended_as_well(
    run: FabricatedRun, pools: FakePools
) -> None:
    other = FabricatedRun(run.root, "other")
    other.prepare()
    other.write_answers(20, 24)
    other.score()
    pools.scored.clear()
    foreign = {entry.sequence_id for entry in other.entries()}
    cache = cache_of(run)
    (bad,) = [
        e.digest
        for e in load_index(cache)
        if foreign > set(e.sequence_ids)
        and e.sequence_ids[0] in {s.sequence_id for s in other.entries() if s.domain == "words"}
    ]
    Path(cache.shard(bad)).write_bytes(b"nothing")
    redo(run)
    words = {entry.sequence_id for entry in other.entries() if entry.domain == "words"}
    assert {identifier for _, identifier in pools.scored} == words
    assert bad in run.shards("words")


@pytest.mark.parametrize("harm", ["gone", "corrupt"])
def test_interrupted_what_another_run_has_lost_is_still_known(
    run: FabricatedRun, pools: FakePools, harm: str
) -> None:
    other = FabricatedRun(run.root, "other")
    other.prepare()
    other.write_answers(20, 24)
    other.score()
    own, ours = cache_of(run), {entry.sequence_id for entry in run.entries()}
    bad = next(e.digest for e in load_index(own) if ours.isdisjoint(e.sequence_ids))
    held = {row.sequence_id for row in read_shard(own.shard(bad))}
    if harm == "gone":
        Path(own.shard(bad)).unlink()
    else:
        Path(own.shard(bad)).write_bytes(b"nothing")
        set_aside(own, find_damage(own, open_caches(run.config).fingerprint("words")))
    pools.scored.clear()
    redo(run)
    assert {identifier for _, identifier in pools.scored} == held
    assert is_published(own) and bad in run.shards("words")


def versions(cache: CacheLayout) -> list[str]:
    manifest = storage.read_json(cache.manifest)
    return sorted(engine["engine_version"] for engine in manifest["provenance"]["engines"])


def test_the_manifest_names_every_engine_whose_rows_are_there(
    run: FabricatedRun, pools: FakePools
) -> None:
    cache = cache_of(run)
    assert versions(cache) == ["1"]
    assert "max_model_len" not in storage.read_json(cache.manifest)["provenance"]["engines"][0]
    pools.version = "2"
    run.write_answers(8, 10)
    redo(run)
    assert versions(cache) == ["1", "2"]
    Path(cache.manifest).unlink()  # as if the job had been killed before it
    Path(cache.index).unlink()
    run.score()
    assert versions(cache) == ["1", "2"]
    pools.version = "3"
    wanted = run.entries()[0].sequence_id
    redo(run, Request(teacher="words", where={"sequence_id": wanted}, force=True))
    assert versions(cache) == ["1", "2", "3"]
    redo(run, Request(teacher="words", force=True))
    assert versions(cache) == ["3"]


def test_a_stale_manifest_is_written_again(
    run: FabricatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(run)
    manifest = storage.read_json(cache.manifest)
    storage.write_json(cache.manifest, manifest | {"totals": {}})
    with (
        logged("jobs.caches") as said,
        monkeypatch.context() as patch,
        pytest.raises(AssertionError, match="a cluster was asked"),
    ):
        forbid_clusters(patch)
        regenerate.regenerate(run.config, None, Request())
    assert said == ["words: an index or a manifest to be written"]
    redo(run)
    assert storage.read_json(cache.manifest) == manifest


def test_a_corrupt_index_is_made_anew(run: FabricatedRun, pools: FakePools) -> None:
    cache = cache_of(run)
    expected = load_index(cache)
    Path(cache.index).write_bytes(b"PAR1 no more")
    manifest, others = Path(cache.manifest).read_bytes(), cache_of(run, "arithmetic").folder
    untouched = file_times(Path(others))
    said = redo(run)
    assert any("g1.index.parquet is made anew" in line for line in said)
    assert pools.scored == [] and load_index(cache) == read_index(cache) == expected
    assert Path(cache.manifest).read_bytes() == manifest
    assert file_times(Path(others)) == untouched


def test_force_writes_the_next_generation_and_keeps_the_old_one(
    run: FabricatedRun, pools: FakePools
) -> None:
    old, old_times = golds(cache_of(run)), run.shards("words")
    pools.salts = {"words": "words, other weights"}
    said = redo(run, Request(teacher="words", force=True))
    assert golds(cache_of(run)) == old and run.shards("words") == old_times
    new = golds(cache_of(run, generation=2))
    assert new.keys() == old.keys() and all(new[i] != old[i] for i in old)
    assert current_generation(cache_of(run).folder) == 2
    assert run.shards("arithmetic", 2) == {}
    assert {name for name, _ in pools.scored} == {"words"}
    assert "run quickstart continues to use generation 1, which it has pinned" in said[-1]


def test_a_run_goes_on_with_its_generation_and_a_new_one_takes_the_current(
    run: FabricatedRun, pools: FakePools
) -> None:
    redo(run, FORCE)
    other = FabricatedRun(run.root, "other")
    prepared = other.prepare()
    other.write_answers(0, 4)
    pools.scored.clear()
    other.score()
    assert pools.scored == []  # generation 2 has its sequences
    caches = prepared.cache_layouts()
    assert {name: cache.generation for name, cache in caches.items()} == {
        "arithmetic": 2,
        "words": 2,
    }
    for made, generation in ((run, 1), (other, 2)):
        spec, *_ = training_specs(made.prepare(), "dataset")
        assert {c["generation"] for c in spec.identity()["caches"].values()} == {generation}
    # New prompts of the old run go to the generation that it has pinned, and the manifest stays.
    run.write_answers(8, 9)
    run.score()
    assert len(run.shards("words", 1)) == 6 and len(run.shards("words", 2)) == 4
    assert current_generation(cache_of(run).folder) == 2
    names = named_generations(run.layout)[cache_of(run).name]
    assert names == {1: ["run quickstart"], 2: ["run other"]}


def test_force_on_a_part_takes_over_the_other_shards_by_hard_links(
    run: FabricatedRun, pools: FakePools
) -> None:
    request = Request(teacher="words", where={"domain": "words"}, force=True)
    pools.salts = {"words": "words, other weights"}
    redo(run, request)
    old, new = run.shards("words", 1), run.shards("words", 2)
    domain = {e.sequence_id: e.domain for e in run.entries()}
    assert {domain[identifier] for _, identifier in pools.scored} == {"words"}
    cache = cache_of(run, generation=2)
    same = {e.digest: {domain[i] for i in e.sequence_ids} for e in load_index(cache)}
    assert new.keys() == old.keys()
    for digest, domains in same.items():
        assert (new[digest] == old[digest]) == (domains == {"arithmetic"})


def test_force_on_single_sequences_splits_their_shard(run: FabricatedRun, pools: FakePools) -> None:
    wanted = run.entries()[5].sequence_id
    before = golds(cache_of(run))
    pools.salts = {"words": "words, other weights"}
    redo(run, Request(teacher="words", where={"sequence_id": wanted}, force=True))
    assert pools.scored == [("words", wanted)]
    after = golds(cache_of(run, generation=2))
    assert after.keys() == before.keys()
    assert [i for i in before if after[i] != before[i]] == [wanted]


def test_an_interrupted_forced_regeneration_is_resumed_and_stays_unseen(
    run: FabricatedRun, pools: FakePools
) -> None:
    folder = cache_of(run).folder
    pools.fails = TeacherError("killed")
    with pytest.raises(TeacherError, match="killed"):
        redo(run, Request(teacher="words", force=True))
    assert current_generation(folder) == 1 and unfinished_generation(folder) == 2
    begun = run.shards("words", 2)
    assert len(begun) == 1
    pools.fails = None
    with pytest.raises(CacheError, match=r"unfinished forced regeneration .*cache gc CONFIG --unf"):
        redo(run, Request(teacher="words", where={"domain": "words"}, force=True))
    pools.scored.clear()
    redo(run, Request(teacher="words", force=True))
    now = run.shards("words", 2)
    assert {name: now[name] for name in begun} == begun and len(now) == 4
    assert len(pools.scored) == 12
    assert current_generation(folder) == 2 and unfinished_generation(folder) is None
    redo(run, Request(teacher="words", force=True))
    assert current_generation(folder) == 3


def test_without_a_manifest_an_unfinished_generation_is_not_the_current_one(
    run: FabricatedRun,
) -> None:
    cache = cache_of(run)
    begin_generation(cache.folder, {"dataset": "d", "where": {}})
    Path(cache.manifest).unlink()
    assert current_generation(cache.folder) == 1


def test_a_generation_that_lacks_what_the_old_one_had_never_becomes_the_current_one(
    run: FabricatedRun, pools: FakePools, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lazy(FakePools):
        def __call__(self, jobs):
            return super().__call__([replace(job, tasks=job.tasks[1:]) for job in jobs])

    monkeypatch.setattr("jobs.stages.score.run_pools", Lazy())
    with pytest.raises(CacheError, match=r"lacks 4 of the 16 sequences of generation 1"):
        redo(run, Request(teacher="words", force=True))
    assert current_generation(cache_of(run).folder) == 1


class Sick(FakePools):
    """Engines that return no row that can be used, and are sound enough for a control."""

    def __call__(self, jobs):
        for job in jobs:
            for each in (half for task in job.tasks for half in singles(task)):
                each.quarantine("broken rows")
        return super().__call__([replace(job, tasks=[]) for job in jobs])


def singles(task: ScoreTask) -> list[ScoreTask]:
    return [replace(task, sequence_ids=(each,)) for each in task.sequence_ids]


def test_a_row_is_never_traded_for_a_quarantine_record(
    run: FabricatedRun, pools: FakePools, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(teacher="words", where={"domain": "words"}, force=True)
    before, chosen = golds(cache_of(run)), {e.sequence_id for e in run.entries()[4:8]}
    monkeypatch.setattr("jobs.stages.score.run_pools", Sick())
    for _ in range(2):
        with pytest.raises(CacheError, match=r"lacks 8 of the 16 .*again: \w+ \(broken rows\)"):
            redo(run, request)
        assert current_generation(cache_of(run).folder) == 1
    monkeypatch.setattr("jobs.stages.score.run_pools", pools)
    redo(run, request)
    assert current_generation(cache_of(run).folder) == 2
    assert golds(cache_of(run, generation=2)).keys() == before.keys() > chosen
    assert not list(Path(cache_of(run, generation=2).quarantine).iterdir())


def test_sequences_left_out_keep_their_rows(run: FabricatedRun, pools: FakePools) -> None:
    left_out = [entry.sequence_id for entry in run.entries()[:2]]
    where = parse_where([f"sequence_id!={','.join(left_out)}"])
    request = Request("words", where, force=True)
    assert parse_where([request.arguments[3]]) == where
    pools.salts = {"words": "words, other weights"}
    redo(run, request)
    old, new = golds(cache_of(run)), golds(cache_of(run, generation=2))
    assert sorted(i for i in old if new[i] == old[i]) == sorted(left_out)
    assert len(pools.scored) == 14


def test_interrupted_after_the_manifest_a_forced_regeneration_scores_nothing_again(
    run: FabricatedRun, pools: FakePools, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, calls = regenerate.publish, []

    def once(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return publish(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(regenerate, "publish", once)
        redo(run, FORCE)
    caches = [cache_of(run, name) for name in ("arithmetic", "words")]
    assert [current_generation(cache.folder) for cache in caches] == [2, 1]
    pools.scored.clear()
    said = redo(run, FORCE)
    assert any("generation 2 was complete when this command was interrupted" in s for s in said)
    assert pools.scored == []
    assert [current_generation(cache.folder) for cache in caches] == [2, 2]
    redo(run, FORCE)
    assert [current_generation(cache.folder) for cache in caches] == [3, 3]


@pytest.mark.parametrize("lost", ["manifest", "index and manifest"])
def test_force_needs_no_manifest(run: FabricatedRun, pools: FakePools, lost: str) -> None:
    """The first scoring was killed before it wrote them."""
    cache, old = cache_of(run), golds(cache_of(run))
    Path(cache.manifest).unlink()
    if "index" in lost:
        Path(cache.index).unlink()
    pools.salts = {"words": "words, other weights"}
    redo(run, Request(teacher="words", force=True))
    assert len(pools.scored) == 16 and current_generation(cache.folder) == 2
    assert golds(cache) == old != golds(cache_of(run, generation=2))


def test_engines_are_held_to_the_rows_that_they_join(
    run: FabricatedRun, pools: FakePools, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Judged(FakePools):
        def __call__(self, jobs):
            found.update({job.name: job.check_canary.args for job in jobs if job.tasks})
            return super().__call__(jobs)

    found: dict[str, tuple] = {}
    monkeypatch.setattr("jobs.stages.score.run_pools", Judged())
    cache = cache_of(run)
    Path(cache.canary).write_text("of generation 1")
    redo(run, Request(teacher="words", where={"domain": "words"}, force=True))
    second = cache_of(run, generation=2).canary
    assert found == {"words": ([second], "words")}
    assert Path(second).read_text() == "of generation 1"
    redo(run, Request(teacher="words", force=True))
    assert not Path(cache_of(run, generation=3).canary).exists()


def test_force_without_any_shard_fills_the_first_generation(tmp_path: Path, pools) -> None:
    made = FabricatedRun(tmp_path)
    made.prepare()
    made.write_answers(0, 4)
    redo(made, FORCE)
    assert len(pools.scored) == 16 and current_generation(cache_of(made).folder) == 1


def test_force_tries_quarantined_sequences_again_and_keeps_the_record_of_others(
    run: FabricatedRun, pools: FakePools
) -> None:
    cache = cache_of(run)
    entries = {entry.domain: entry.sequence_id for entry in run.entries()}
    for digest in run.shards("words"):
        os.unlink(cache.shard(digest))
    for identifier in entries.values():
        path = storage.join(cache.quarantine, f"{identifier}.json")
        storage.write_json(path, {"sequence_id": identifier, "error": "too odd"})
    redo(run, Request(teacher="words"))
    assert set(entries.values()).isdisjoint(identifier for _, identifier in pools.scored)
    pools.scored.clear()
    redo(run, Request(teacher="words", where={"domain": "words"}, force=True))
    assert ("words", entries["words"]) in pools.scored
    left = Path(cache_of(run, generation=2).quarantine).iterdir()
    assert [path.stem for path in left] == [entries["arithmetic"]]


def test_pins_are_written_before_the_first_row(run: FabricatedRun, pools: FakePools) -> None:
    other = FabricatedRun(run.root, "other")
    other.prepare()
    other.write_answers(30, 34)
    pools.fails = TeacherError("killed")
    other.write_answers(34, 36)
    with pytest.raises(TeacherError):
        other.score()
    assert set(pinned_generations(other.layout).values()) == {1}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(teacher="word"), "there is no teacher 'word'; did you mean 'words'"),
        (Request(where={"domain": "wrds"}), "no sequence has domain=wrds; did you mean 'words'"),
        (Request(where={"domain!": "wrds"}), "no sequence has domain=wrds; did you mean 'words'"),
        (Request(where={"domain!": "words,arithmetic"}), "no sequence fulfils all conditions"),
    ],
)
def test_what_does_not_exist_is_named(
    run: FabricatedRun, request_: Request, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid_clusters(monkeypatch)
    with pytest.raises(ConfigError, match=message):
        regenerate.regenerate(run.config, None, request_)


def test_conditions_are_checked() -> None:
    assert parse_where(["domain=a=b", "split=train"]) == {"domain": "a=b", "split": "train"}
    with pytest.raises(ConfigError, match=r"no field 'domian'; did you mean 'domain'"):
        parse_where(["domian=words"])
    with pytest.raises(ConfigError, match="has not the form field=value"):
        parse_where(["domain"])
    assert parse_where(["sequence_id!=a,b"]) == {"sequence_id!": "a,b"}


def test_a_run_without_sequences_is_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run quickstart has no sequences .*polystill run"):
        open_caches(FabricatedRun(tmp_path).config)
