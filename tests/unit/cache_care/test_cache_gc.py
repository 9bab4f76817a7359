"""Garbage: what nobody names goes, and nothing else; dry runs and young files stay."""

import os
import time
from pathlib import Path

import pytest

from jobs.caches.actions import collect_garbage
from jobs.caches.regenerate import RegenerationRequest as Request
from jobs.caches.regenerate import regenerate_inside_job
from jobs.caches.run_caches import open_caches
from pipeline import storage
from pipeline.cache.generations import begin_generation
from pipeline.cache.index import load_index
from pipeline.cache_care import gc
from pipeline.cache_care.gc import LEFTOVER_AGE_SECONDS, find_garbage
from pipeline.errors import StorageError, TeacherError
from pipeline.fingerprint import digest_json
from tests.support.caches import flip_bit
from tests.support.command_line import file_times
from tests.support.fabricated import FabricatedRun, FakePools

LEFT = f"{'0' * 32}.parquet"


@pytest.fixture
def run(tmp_path: Path, pools: FakePools) -> FabricatedRun:
    made = FabricatedRun(tmp_path)
    made.prepare()
    made.write_answers(0, 4)
    made.score()
    return made


def garbage(run: FabricatedRun, **options) -> dict[str, str]:
    found = find_garbage(run.layout, options.pop("now", time.time()), **options)
    assert found.foreign == []
    return {os.path.relpath(item.path, "caches"): item.reason for item in found.garbage}


def force(run: FabricatedRun, teacher: str = "words") -> None:
    regenerate_inside_job(run.config, Request(teacher=teacher, force=True))


def test_what_a_run_uses_is_not_garbage(run: FabricatedRun) -> None:
    assert garbage(run) == {}
    nothing = f"nothing to remove below {run.root}"
    assert collect_garbage(run.config, False, False) == nothing


def test_a_generation_stays_as_long_as_a_run_or_a_checkpoint_names_it(run: FabricatedRun) -> None:
    force(run)
    assert garbage(run) == {}  # the run has pinned generation 1, the manifest names 2
    Path(run.layout.pins).unlink()
    name = open_caches(run.config).layouts["words"].name
    old = {f"{name}/g1.index.parquet"} | {f"{name}/g1/{s}.parquet" for s in run.shards("words")}
    assert garbage(run).keys() == old
    fingerprint = digest_json(run.prepare().prepared.cache_identities["words"])
    for path in ("student/training.json", "twin/checkpoints/step-00000010/state.json"):
        place = run.root / "runs" / "elsewhere" / path
        identity = {"caches": {"words": {"fingerprint": fingerprint, "generation": 1}}}
        storage.write_json(str(place), {"identity": identity})
        assert garbage(run) == {}
        place.unlink()
    assert garbage(run).keys() == old


def test_checkpoints_below_another_models_root_count(run: FabricatedRun, tmp_path: Path) -> None:
    force(run)
    Path(run.layout.pins).unlink()
    models = tmp_path / "elsewhere"
    fingerprint = digest_json(run.prepare().prepared.cache_identities["words"])
    identity = {"caches": {"words": {"fingerprint": fingerprint, "generation": 1}}}
    state = models / "runs/other/student/checkpoints/step-00000010/state.json"
    storage.write_json(str(state), {"identity": identity})
    assert garbage(run) != {}
    config = run.root / "runs/other/config.yaml"
    config.parent.mkdir()
    config.write_text(f"storage: {{root: {run.root}, models_root: {models}}}\n")
    assert garbage(run) == {}


def test_removing_takes_what_was_listed_and_nothing_else(run: FabricatedRun) -> None:
    force(run)
    Path(run.layout.pins).unlink()
    before, listed = file_times(run.root), garbage(run)
    shown = collect_garbage(run.config, True, False)
    assert "nobody names this generation" in shown and "removed" not in shown
    assert file_times(run.root) == before
    assert collect_garbage(run.config, False, False).endswith("removed")
    kept = {name: times for name, times in before.items() if name[7:] not in listed}
    assert file_times(run.root) == kept and len(kept) == len(before) - len(listed)
    name = open_caches(run.config).layouts["words"].name
    assert not (run.root / "caches" / name / "g1").exists()
    assert garbage(run) == {}


def test_a_recipe_that_no_run_names_goes_whole(run: FabricatedRun) -> None:
    other = FabricatedRun(run.root, "other", ["teachers.words.vllm.dtype=bfloat16"])
    other.prepare()
    other.write_answers(0, 4)
    other.score()
    assert garbage(run) == {}
    stale = open_caches(other.config).layouts["words"].name
    other.overrides.clear()
    other.prepare()
    assert garbage(run) == {}  # its pins still name the old recipe
    other.score()
    assert {path.split("/")[0] for path in garbage(run)} == {stale}
    collect_garbage(run.config, False, False)
    assert not (run.root / "caches" / stale).exists()
    assert open_caches(run.config).layouts["words"].name != stale and len(run.shards("words")) == 2


def test_corrupt_shards_old_unfinished_writes_and_outdated_quarantine_go(
    run: FabricatedRun,
) -> None:
    cache = open_caches(run.config).layouts["words"]
    bad = next(iter(run.shards("words")))
    flip_bit(Path(cache.shard(bad)))
    regenerate_inside_job(run.config, Request())
    leftover = run.root / f"sequences/words/.{LEFT}.0123abcd.tmp"
    leftover.write_bytes(b"half")
    scored, refused = run.entries()[0].sequence_id, "f" * 32
    for identifier in (scored, refused):
        path = storage.join(cache.quarantine, f"{identifier}.json")
        storage.write_json(path, {"sequence_id": identifier, "error": "odd"})
    now = time.time()
    expected = {
        f"{cache.name}/g1.aside/{bad}.parquet": "a corrupt shard that was set aside",
        f"{cache.name}/g1.quarantine/{scored}.json": "this sequence has a row by now",
    }
    assert garbage(run, now=now) == expected
    held = next(e.digest for e in load_index(cache) if scored not in e.sequence_ids)
    Path(cache.shard(held)).write_bytes(b"corrupt")
    assert garbage(run, now=now) == expected
    later = garbage(run, now=now + LEFTOVER_AGE_SECONDS + 60)
    assert later == expected | {f"../sequences/words/.{LEFT}.0123abcd.tmp": "an unfinished write"}


def test_an_unfinished_generation_stays_unless_asked_for(
    run: FabricatedRun, pools: FakePools
) -> None:
    pools.fails = TeacherError("killed")
    with pytest.raises(TeacherError):
        force(run)
    assert garbage(run) == {}
    listed = garbage(run, unfinished=True)
    assert {path.split("/")[1][:2] for path in listed} == {"g2"} and len(listed) == 2
    collect_garbage(run.config, False, True)
    pools.fails = None
    force(run)
    assert len(run.shards("words", 2)) == 2 and garbage(run) == {}


def test_a_generation_that_begins_meanwhile_is_not_garbage(
    run: FabricatedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked for before its mark is written, and listed after."""
    folder = open_caches(run.config).layouts["words"].folder
    look = gc.unfinished_generation

    def begin_after(path: str) -> int | None:
        found = look(path)
        if path == folder:
            begin_generation(folder, {"dataset": "d", "where": {}})
            storage.write_bytes(f"{folder}/g2/new.parquet", b"rows")
        return found

    monkeypatch.setattr(gc, "unfinished_generation", begin_after)
    assert garbage(run) == {}


def test_the_mark_of_an_unfinished_generation_is_removed_last(
    run: FabricatedRun, pools: FakePools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools.fails = TeacherError("killed")
    with pytest.raises(TeacherError):
        force(run)
    removed: list[str] = []
    monkeypatch.setattr(gc, "remove_file", lambda root, path: removed.append(path))
    collect_garbage(run.config, False, True)
    assert len(removed) == 2 and removed[-1].endswith("g2.regeneration.json")


def test_nothing_is_garbage_when_a_record_cannot_be_read(run: FabricatedRun) -> None:
    force(run)
    Path(run.layout.pins).write_text("{")
    with pytest.raises(StorageError, match="not valid JSON"):
        collect_garbage(run.config, False, False)
