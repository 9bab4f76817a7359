"""Weights of models that are broken, incomplete or those of something else."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from pipeline.config.load import load_config
from teachers.preflight.models import check_models
from teachers.preflight.weights import check_weights
from tests.support.hostile import Case, check_answer
from tests.support.model_folders import (
    LFS_POINTER,
    SOUND,
    Change,
    all_of,
    copy_of_sound,
    file,
    json_file,
    safetensors,
    setting,
    tensor,
    without,
)
from tests.support.old_run import copy_old_run

pytestmark = pytest.mark.timeout(30)

ROWS = 64
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WHOLE = (SOUND / SINGLE).read_bytes()
EMBEDDING = safetensors({"embedding": tensor("F32", [ROWS, 2], 0, 512)}, bytes(512))
OTHER = safetensors({"other": tensor("BF16", [8], 0, 16)}, bytes(16))
LORA = safetensors({"lora_A": tensor("F32", [2, 8], 0, 64)}, bytes(64))
NOT_WHOLE = "is no whole file of safetensors"


def single(header: Any, data: bytes = bytes(8), length: int | None = None) -> Change:
    return file(SINGLE, safetensors(header, data, length))


def sharded(weight_map: Any, **shards: bytes) -> Change:
    """An index, and the files `<name>.safetensors` beside it."""

    def change(folder: Path) -> None:
        (folder / SINGLE).unlink()
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for name, data in shards.items():
            (folder / f"{name}.safetensors").write_bytes(data)

    return change


TWO = {"embedding": "a.safetensors", "other": "b.safetensors"}


def of_one(name: str) -> Change:
    return sharded({"embedding": "a.safetensors", "other": name}, a=EMBEDDING)


SOUND_ONES = [
    Case("as they were written", lambda folder: None),
    Case("two files by an index", sharded(TWO, a=EMBEDDING, b=OTHER)),
    Case("a file that the index leaves out", sharded(TWO, a=EMBEDDING, b=OTHER, c=b"broken")),
    Case(
        "files without an index",
        all_of(without(SINGLE), file("a.safetensors", EMBEDDING), file("b.safetensors", OTHER)),
    ),
    Case("more rows than tokens", setting("config.json", vocab_size=60)),
    Case(
        "numbers of 8, 6 and 4 bits",
        single(
            {
                "embedding": tensor("F8_E4M3", [ROWS, 2], 0, 128),
                "scales": tensor("F8_E8M0", [4], 128, 132),
                "packed": tensor("F4", [4], 132, 134),
            },
            bytes(134),
        ),
    ),
    Case(
        "words about the file",
        single(
            {"__metadata__": {"format": "pt"}, "embedding": tensor("U8", [ROWS], 0, 64)}, bytes(64)
        ),
    ),
    Case(
        "an empty tensor",
        single(
            {"embedding": tensor("U8", [ROWS], 0, 64), "none": tensor("F32", [0, 4], 64, 64)},
            bytes(64),
        ),
    ),
    Case("pickles beside safetensors", file("pytorch_model.bin", LFS_POINTER)),
]
HEADERS = [
    Case("empty", file(SINGLE, b""), (SINGLE, "(0 bytes)", NOT_WHOLE, "header too small")),
    Case("4 bytes", file(SINGLE, b"1234"), ("(4 bytes)", NOT_WHOLE, "header too small")),
    Case("garbage", file(SINGLE, b"garbage, and more of it" * 99), (NOT_WHOLE, "header too large")),
    Case("zeros", file(SINGLE, bytes(4096)), (SINGLE, NOT_WHOLE)),
    Case("git-LFS", file(SINGLE, LFS_POINTER), (SINGLE, "pointer of git-LFS", "`git lfs pull` in")),
    Case("git-annex", file(SINGLE, "/annex/objects/SHA256E-s9--9"), ("`git annex get .` in ",)),
    Case("a page of HTML", file(SINGLE, "<html><body>404"), (SINGLE, "a page of HTML")),
    Case("a zip archive", file(SINGLE, b"PK\3\4" + bytes(999)), (SINGLE, NOT_WHOLE)),
    Case("cut in the header", file(SINGLE, WHOLE[:100]), (SINGLE, NOT_WHOLE)),
    Case("cut by one byte", file(SINGLE, WHOLE[:-1]), (SINGLE, NOT_WHOLE, "not fully covered")),
    Case("a byte too many", file(SINGLE, WHOLE + b"0"), (SINGLE, NOT_WHOLE)),
    Case("a header of 10 GB", single({}, length=10**10), (NOT_WHOLE, "header too large")),
    Case("a header of 2^64", single({}, length=2**64 - 1), (NOT_WHOLE, "header too large")),
    Case("a header behind the end", single({}, length=90), (SINGLE, NOT_WHOLE)),
    Case("a header that is no JSON", single(b"{,,,,,,}"), (NOT_WHOLE, "invalid JSON")),
    Case("a list as header", single(b"[]      "), (NOT_WHOLE, "invalid JSON")),
    Case("invalid UTF-8", single(b'{"\xff": 1}'), (NOT_WHOLE, "invalid UTF-8")),
    Case("nested", single(b"[" * 10**5), (SINGLE, NOT_WHOLE)),
    Case("no tensors", single({}, b""), ("its safetensors hold no tensors",)),
    Case("an unknown dtype", single({"a": tensor("Q9", [2], 0, 8)}), (NOT_WHOLE, "`Q9`")),
    Case("a negative size", single({"a": tensor("F32", [-2], 0, 8)}), (NOT_WHOLE, "`-2`")),
    Case("a size of 10^30", single({"a": tensor("F32", [10**30], 0, 8)}), (SINGLE, NOT_WHOLE)),
    Case("a text as size", single({"a": tensor("F32", ["2"], 0, 8)}), (SINGLE, NOT_WHOLE)),
    Case("sizes that overflow", single({"a": tensor("F32", [2**33, 2**33], 0, 8)}), (NOT_WHOLE,)),
    Case("a shape of another size", single({"a": tensor("F32", [3], 0, 8)}), (SINGLE, NOT_WHOLE)),
    Case("offsets out of the file", single({"a": tensor("F32", [2], 0, 10**12)}), (NOT_WHOLE,)),
    Case("offsets that go back", single({"a": tensor("F32", [2], 8, 0)}), (SINGLE, NOT_WHOLE)),
    Case(
        "tensors that overlap",
        single({"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}, bytes(12)),
        (NOT_WHOLE, "invalid offset"),
    ),
    Case(
        "a hole between tensors",
        single({"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 12, 20)}, bytes(20)),
        (NOT_WHOLE, "invalid offset"),
    ),
    Case("no offsets", single({"a": {"dtype": "F32", "shape": [2]}}), (SINGLE, NOT_WHOLE)),
]
FILES = [
    Case("no weights", without(SINGLE), ("has no safetensors", "unpickled")),
    Case(
        "one of two files, and no index",
        all_of(without(SINGLE), file("model-00001-of-00002.safetensors", WHOLE)),
        ("1 of 2 files model", "number 2 is missing"),
    ),
    Case(
        "pickles alone",
        all_of(without(SINGLE), file("pytorch_model.bin", b"PK")),
        ("has no safetensors", "unpickled", "`vllm.load_format`"),
    ),
    Case(
        "an adapter beside pickles",
        all_of(
            without(SINGLE),
            file("pytorch_model.bin", b"PK"),
            file("adapter_model.safetensors", LORA),
        ),
        ("are not the weights of its config.json", "each of the 64 tokens", "adapter"),
    ),
    Case("fewer rows than tokens", setting("config.json", vocab_size=65), ("the 65 tokens",)),
    Case("broken beside whole ones", file("z.safetensors", b""), ("z.safetensors", NOT_WHOLE)),
    Case("an index of a missing file", sharded(TWO, a=EMBEDDING), ("1 of them is missing (b.saf",)),
    Case("an index without its files", sharded(TWO), ("names 2 files", "2 of them are missing")),
    Case(
        "an old index beside one file",
        json_file(INDEX, {"weight_map": {"a": "model-00001-of-00009.safetensors"}}),
        ("1 of them is missing", "remove the index if it belongs to other weights"),
    ),
    Case(
        "a hundred missing files",
        sharded({str(i): f"{i:03}.safetensors" for i in range(100)}),
        ("100 of them are missing (000.safetensors, 001.safetensors", "and 97 more"),
    ),
    Case("a file above the folder", of_one("../../etc/passwd"), (INDEX, "'../../etc/passwd'")),
    Case("an absolute path", of_one("/etc/passwd"), (INDEX, "'/etc/passwd'", "itself")),
    Case("a file below the folder", of_one("more/b.safetensors"), ("'more/b.safetensors'",)),
    Case("no name of a file", of_one(""), (INDEX, "names the file ''")),
    Case("the folder itself", of_one(".."), (INDEX, "names the file '..'")),
    Case("a long name", of_one("b" * 300 + ".safetensors"), (INDEX, "names the file 'bbb")),
    Case("a pickle", of_one("b.bin"), (INDEX, "names the file 'b.bin'", "safetensors of")),
    Case("control characters", of_one("\x1b[2J/b"), (INDEX, r"\\x1b[2J/b")),
    Case("a number as file", sharded({"embedding": 5}), (INDEX, "names the file '5'")),
    Case("no map", file(INDEX, "{}"), (INDEX, "has no weight_map")),
    Case("an empty map", json_file(INDEX, {"weight_map": {}}), (INDEX, "has no weight_map")),
    Case("a list as map", json_file(INDEX, {"weight_map": ["a"]}), (INDEX, "has no weight_map")),
    Case("an index that is a list", file(INDEX, "[]"), (INDEX, "holds an array")),
    Case("an index that is cut", file(INDEX, '{"weight_map": {'), (INDEX, "is not valid JSON")),
    Case("an index of git-LFS", file(INDEX, LFS_POINTER), (INDEX, "pointer of git-LFS")),
    Case(
        "a tensor that is not in its file",
        sharded(TWO | {"lost": "b.safetensors"}, a=EMBEDDING, b=OTHER),
        ("names tensors that are not in their files: b.safetensors lacks lost",),
    ),
    Case(
        "files changed for one another",
        sharded(TWO, a=OTHER, b=EMBEDDING),
        ("names tensors that are not in their files",),
    ),
    Case("one file cut", sharded(TWO, a=EMBEDDING, b=OTHER[:-1]), ("b.safetensors", NOT_WHOLE)),
    Case("one file of git-LFS", sharded(TWO, a=EMBEDDING, b=LFS_POINTER), ("b.safetensors", "LFS")),
]
FOR_TRANSFORMERS = [
    Case("one file", lambda folder: None),
    Case("an index", sharded(TWO, a=EMBEDDING, b=OTHER)),
    Case("a broken file that is not read", file("z.safetensors", b"")),
    Case("no safetensors", without(SINGLE), ("has no safetensors",)),
    Case(
        "files without an index",
        all_of(without(SINGLE), file("a.safetensors", EMBEDDING)),
        ("(a.safetensors)", "neither model.safetensors nor model.safetensors.index.json"),
    ),
    Case("one file that is cut", file(SINGLE, WHOLE[:-1]), (SINGLE, NOT_WHOLE)),
    Case("a missing file", sharded(TWO, a=EMBEDDING), ("1 of them is missing",)),
]
KEYS = [
    Case("teacher", ("first", file(SINGLE, LFS_POINTER)), ("teachers.first.model: ", "git-LFS")),
    Case(
        "teacher's config",
        ("second", setting("config.json", hidden_size=None)),
        ("teachers.second.model: cannot use the config.json of ", "/second: "),
    ),
    Case(
        "student's tokenizer",
        ("student", json_file("tokenizer.json", {})),
        ("student.model: ", "/student/tokenizer.json does not describe a vocabulary"),
    ),
    Case("student without weights that start at random", ("student", lambda folder: None)),
]


@pytest.mark.parametrize("case", [*HEADERS, *FILES, *SOUND_ONES], ids=str)
def test_weights_for_an_engine_are_answered(case: Case, tmp_path: Path) -> None:
    folder = copy_of_sound(tmp_path / "model")
    case.given(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    check_answer(case, lambda: check_weights(str(folder), None, rows))


@pytest.mark.parametrize("case", FOR_TRANSFORMERS, ids=str)
def test_weights_for_transformers_are_answered(case: Case, tmp_path: Path) -> None:
    folder = copy_of_sound(tmp_path / "model")
    case.given(folder)
    check_answer(case, lambda: check_weights(str(folder), None, ROWS, by_transformers=True))


@pytest.mark.parametrize("case", KEYS, ids=str)
def test_a_message_begins_with_the_key_of_the_model(case: Case, tmp_path: Path) -> None:
    old = copy_old_run(tmp_path / "old")
    name, change = case.given
    change(old.folder / name)
    config = load_config(old.path, [])
    check_answer(case, lambda: check_models(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(SINGLE), "neither a complete checkpoint"),
        (file(SINGLE, LFS_POINTER), "pointer of git-LFS"),
        (without("config.json"), "no config.json"),
        (all_of(without(SINGLE), file("a.safetensors", EMBEDDING)), "neither model.safetensors"),
    ],
)
def test_initial_weights_are_looked_at(change: Change, message: str, tmp_path: Path) -> None:
    old = copy_old_run(tmp_path / "old")
    folder = copy_of_sound(tmp_path / "weights")
    override = f"student.initial_weights={folder}"
    check_models(load_config(old.path, [override]))
    change(folder)
    case = Case("broken", change, ("student.initial_weights: ", message))
    check_answer(case, lambda: check_models(load_config(old.path, [override])))


SNAPSHOTS = [
    Case("complete", lambda folder: None),
    Case("without weights", without(SINGLE), ("is not complete in the hub cache", "`hf download")),
    Case("without one file", sharded(TWO, a=EMBEDDING), ("not complete", "1 of them is missing")),
]


@pytest.mark.parametrize("case", SNAPSHOTS, ids=str)
def test_a_model_in_the_cache_of_the_hub_is_complete_where_the_hub_is_away(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--owner--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    folder = copy_of_sound(repository / "snapshots" / commit)
    case.given(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    move_into_blobs(folder, repository / "blobs")
    check_answer(case, lambda: check_weights("owner/model", None, ROWS))


def move_into_blobs(folder: Path, blobs: Path) -> None:
    """Makes the files of a snapshot links to `blobs`, as the hub's cache has them."""
    blobs.mkdir()
    for path in sorted(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
