"""Files that a run wrote and something broke: a full disk, an editor, a copy that was cut."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.bookkeeping.stage_records import read_record, unended_attempts
from pipeline import storage
from pipeline.cache.generations import current_generation, pinned_generations
from pipeline.cache.index import quarantined
from pipeline.cache.manifest import manifest_fits, recipe_of
from pipeline.combine.learned import learned_weights
from pipeline.config.combine import CombineConfig, LearnedWeights
from pipeline.layout import CacheLayout, Layout
from pipeline.report.answers import _answers
from pipeline.run.preparation import read_prepared
from pipeline.sequences import read_sequences
from pipeline.synthesis.answered_shards import forget_errors, read_answered_shards
from students.checkpoints.resume import allowed_changes
from teachers.preflight.identity import _file_hashes
from teachers.tasks.judge import read_grades
from tests.support.hostile import Case, check_answer

pytestmark = pytest.mark.timeout(30)

DIGEST = "0" * 32
CACHE = "root/caches/t-0123456789abcdef"
LEARNED = CombineConfig(method="mixture", weights=LearnedWeights(type="learned"))


def layout(folder: Path) -> Layout:
    return Layout(str(folder / "root"), "run")


def cache(folder: Path) -> CacheLayout:
    return CacheLayout(str(folder / CACHE), 1)


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "prepared": ("root/runs/run/prepared.json", lambda f: read_prepared(layout(f))),
    "a stage's record": (
        "root/runs/run/stages/score.json",
        lambda f: read_record(layout(f), "score"),
    ),
    "pins": ("root/runs/run/stages/score.caches.json", lambda f: pinned_generations(layout(f))),
    "a manifest": (f"{CACHE}/manifest.json", lambda f: current_generation(cache(f).folder)),
    "a manifest's totals": (f"{CACHE}/manifest.json", lambda f: manifest_fits(cache(f), [])),
    "a manifest's recipe": (f"{CACHE}/manifest.json", lambda f: recipe_of(cache(f).folder)),
    "a note of quarantine": (f"{CACHE}/g1.quarantine/s.json", lambda f: quarantined(cache(f))),
    "hashes of weights": ("root/weight_hashes.json", lambda f: _file_hashes([], layout(f), f)),
    "learned weights": (
        "root/runs/run/learned_weights.json",
        lambda f: learned_weights(LEARNED, layout(f)),
    ),
    "an answered shard": (
        f"root/synthesis/i/{DIGEST}.json",
        lambda f: read_answered_shards(layout(f), "i"),
    ),
    "errors of a shard": (
        f"root/synthesis/i/{DIGEST}.json",
        lambda f: forget_errors(layout(f), "i"),
    ),
    "grades": (f"root/judgements/i/{DIGEST}.json", lambda f: read_grades(layout(f), "i")),
    "changes of a training": (
        "student/changes.json",
        lambda f: allowed_changes(str(f / "student")),
    ),
    "answers": ("answers.jsonl", lambda f: _answers(str(f / "answers.jsonl"))),
}
BROKEN: dict[str, bytes] = {
    "cut": b'{"key": "x", "generation',
    "a list": b'["key"]',
    "a text": b'"nothing"',
    "a number with a point": b"1.5",
    "null": b"null",
    "NULs": b"\0" * 64,
    "UTF-16": '{"generation": 1}'.encode("utf-16"),
    "half of UTF-8": b'{"key": "\xff"}',
    "a key twice": b'{"key": 1, "key": 2}',
    "deep nesting": b"[" * 10**5,
    "5000 digits": b"7" * 5000,
    "a mark of a merge": b"<<<<<<< HEAD\n{}\n",
    "wrong types": b'{"key": 5, "generation": "1", "recipe": [], "errors": [], "weights": 1}',
}
EMPTY_IS_FINE = {"answers"}

FILES = [
    Case(f"{reader}: {content}", (path, read, data), (path.rpartition("/")[2],))
    for reader, (path, read) in READERS.items()
    for content, data in (BROKEN | ({} if reader in EMPTY_IS_FINE else {"empty": b""})).items()
]


@pytest.mark.parametrize("case", FILES, ids=str)
def test_a_broken_file_is_named(case: Case, tmp_path: Path) -> None:
    path, read, data = case.given
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    check_answer(case, lambda: read(tmp_path))
    assert file.read_bytes() == data


FOLDERS = [
    Case(reader, given, ("cannot read", given[0]))
    for reader, given in READERS.items()
    if "/g1.quarantine" not in given[0] and given[0].count("/i/") == 0
]


@pytest.mark.parametrize("case", FOLDERS, ids=str)
def test_a_folder_in_its_place_is_named(case: Case, tmp_path: Path) -> None:
    path, read = case.given
    (tmp_path / path).mkdir(parents=True)
    check_answer(case, lambda: read(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
@pytest.mark.parametrize("case", FOLDERS, ids=str)
def test_a_file_that_must_not_be_read_is_named(case: Case, tmp_path: Path) -> None:
    path, read = case.given
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
    file.chmod(0)
    check_answer(case, lambda: read(tmp_path))


SOUND: list[Case] = [
    Case("pins", ("pins", b'{"t-0123456789abcdef": 2}', {"t-0123456789abcdef": 2})),
    Case("a manifest of a later version", ("a manifest", b'{"generation": 3, "new": 1}', 3)),
    Case("grades", ("grades", b'{"a": 4, "b": null}', {"a": 4, "b": None})),
    Case("a note", ("a note of quarantine", b'{"sequence_id": "s", "error": "e"}', {"s": "e"})),
    Case("no hashes", ("hashes of weights", b"{}", {})),
    Case("no changes", ("changes of a training", b"[]", [])),
    Case("an empty file of answers", ("answers", b"", {})),
    Case("a mark of Windows' lines", ("grades", b'{\r\n"a": 1\r\n}\r\n', {"a": 1})),
]


@pytest.mark.parametrize("case", SOUND, ids=str)
def test_a_sound_file_is_read(case: Case, tmp_path: Path) -> None:
    reader, data, expected = case.given
    path, read = READERS[reader]
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes(data)
    assert check_answer(case, lambda: read(tmp_path)) == expected


def raw_utf8(text: bytes) -> pa.Array:
    offsets = pa.py_buffer(b"\0\0\0\0" + len(text).to_bytes(4, "little"))
    return pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(text)])


def cut(path: Path) -> None:
    pq.write_table(pa.table({"sequence_id": ["s"]}), path)
    path.write_bytes(path.read_bytes()[:-20])


TABLES = [
    Case("empty", lambda path: path.write_bytes(b""), ("x.parquet", "not a complete Parquet file")),
    Case("garbage", lambda path: path.write_bytes(b"PAR1" * 9), ("x.parquet", "not a complete")),
    Case("cut", cut, ("x.parquet", "not a complete Parquet file")),
    Case("a folder", Path.mkdir, ("cannot read", "x.parquet")),
    Case(
        "a text that is not UTF-8",
        lambda path: pq.write_table(pa.table({"sequence_id": raw_utf8(b"\xff")}), path),
        ("x.parquet", "UTF8"),
    ),
]


@pytest.mark.parametrize("case", TABLES, ids=str)
def test_a_broken_table_is_named(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    case.given(path)
    check_answer(case, lambda: storage.read_table(str(path)))
    check_answer(case, lambda: read_sequences(str(path)))


def test_unended_attempts_are_a_number(tmp_path: Path) -> None:
    path = Path(layout(tmp_path).unended_attempts("score"))
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in (b"[]", b"1.5", b'"1"', b"true"):
        path.write_bytes(text)
        case = Case("unended", text, (path.name, "does not hold what polystill writes"))
        check_answer(case, lambda: unended_attempts(layout(tmp_path), "score"))
    path.write_bytes(b"2")
    assert unended_attempts(layout(tmp_path), "score") == 2
