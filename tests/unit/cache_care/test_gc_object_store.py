"""Garbage in an object store: the same names are ours as on a disk."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.cache_care.gc import LEFTOVER_AGE_SECONDS, find_garbage, remove_garbage
from pipeline.errors import CacheError
from tests.support.fabricated import FabricatedRun, FakePools
from tests.support.object_store import object_store

HASH = "0123456789abcdef" * 2


def test_only_objects_with_our_names_go(tmp_path: Path, pools: FakePools) -> None:
    root = tmp_path / "root"
    run = FabricatedRun(root)
    gone = FabricatedRun(root, "gone", ["teachers.words.vllm.dtype=bfloat16"])
    for each in (run, gone):
        each.prepare()
        each.write_answers(0, 2)
        each.score()
    used, named = (set(storage.read_json(each.layout.pins)) for each in (run, gone))
    (stale,) = named - used
    shutil.rmtree(root / "runs/gone")
    with object_store() as store:
        layout = replace(run.layout, root=f"{store.root}/here", models_root=str(tmp_path))
        for path in root.rglob("*"):
            if path.is_file():
                storage.write_bytes(f"{layout.root}/{path.relative_to(root)}", path.read_bytes())
        ours = [f"prompts/.{HASH}.parquet.0123abcd.tmp"]
        theirs = ["caches/photos/a.jpg", f"caches/{stale}/notes.txt", f"caches/{stale}/mine/x"]
        theirs += ["prompts/.photo.jpg.0123abcd.tmp"]
        before = storage.files_below(layout.root).keys()
        for path in (*ours, *theirs):
            storage.write_bytes(f"{layout.root}/{path}", b"x")
        found = find_garbage(layout, time.time() + LEFTOVER_AGE_SECONDS + 60)
        assert found.foreign == sorted(
            ["caches/photos", f"caches/{stale}/mine", *theirs[1:2], *theirs[3:]]
        )
        remove_garbage(layout, found.garbage)
        left = storage.files_below(layout.root).keys()
        assert left == {p for p in before if not p.startswith(f"caches/{stale}/")} | {*theirs}
        assert find_garbage(layout, time.time()).garbage == []
        for path in [p for p in left if p.startswith("runs/")]:
            storage.remove(f"{layout.root}/{path}")
        with pytest.raises(CacheError, match="holds no prepared run"):
            find_garbage(layout, time.time())
