"""Places where prompts are looked for: folders, devices, pipes, patterns, paths that are none."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.prompts import PromptsConfig, PromptSource
from pipeline.synthesis.prompts import read_prompts
from tests.support.hostile import Case, check_answer
from tests.support.prompt_sources import Source, check_prompts, row

pytestmark = pytest.mark.timeout(30)


def make_socket(path: Path) -> None:
    os.chdir(path.parent)  # names of sockets are short
    socket.socket(socket.AF_UNIX).bind(path.name)


def folder_with(*names: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        for name in names:
            (path / name).write_bytes(b"[]")

    return make


def saved(path: Path, change: Callable[[Path], Any] = lambda path: None) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": ["q"]}).save_to_disk(path)
    change(path)


def cut(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = next(path.glob(name))
        file.write_bytes(file.read_bytes()[:-40])

    return lambda path: saved(path, change)


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


PLACES = [
    Case("missing", Source("p.jsonl", lambda path: None), ("p.jsonl does not exist",)),
    Case("a pattern", Source("*.jsonl", lambda path: None), ("patterns are not read",)),
    Case(
        "a dangling link",
        Source("p.jsonl", lambda path: path.symlink_to("gone")),
        ("does not exist",),
    ),
    Case("a link to itself", Source("p.jsonl", lambda path: path.symlink_to(path)), ("p.jsonl",)),
    Case(
        "a link to a file",
        Source(
            "p.jsonl",
            lambda path: (path.with_name("x").write_text(row()), path.symlink_to("x")),
            ("q",),
        ),
    ),
    Case("a pipe", Source("p.jsonl", os.mkfifo), ("is a pipe, a socket or a device",)),
    Case("a pipe of a table", Source("p.csv", os.mkfifo), ("is a pipe, a socket or a device",)),
    Case("a pipe of Parquet", Source("p.parquet", os.mkfifo), ("is a pipe, a socket or a device",)),
    Case("a socket", Source("p.jsonl", make_socket), ("is a pipe, a socket or a device",)),
    Case(
        "zeros without end",
        Source("p.jsonl", lambda path: path.symlink_to("/dev/zero")),
        ("device",),
    ),
    Case(
        "noise without end",
        Source("p.csv.gz", lambda path: path.symlink_to("/dev/urandom")),
        ("device",),
    ),
    Case("nothing", Source("p.jsonl", lambda path: path.symlink_to("/dev/null")), ("device",)),
    Case("a hole of 1 TB", Source("p.jsonl", sparse), ("p.jsonl:1", "longer than 64 MiB")),
    Case(
        "a hole of 1 TB as array",
        Source("p.json", lambda p: (sparse(p), p.open("r+b").write(b"["))),
        ("p.json:1 row 0",),
    ),
    Case(
        "a hole of 1 TB as Parquet", Source("p.parquet", sparse), ("not a complete Parquet file",)
    ),
    Case("a folder", Source("p", folder_with("a.jsonl")), ("name each file",)),
    Case("a folder with a file's name", Source("p.jsonl", folder_with()), ("name each file",)),
    Case(
        "a folder whose description is no object",
        Source("p", folder_with("dataset_info.json", "state.json")),
        ("not a complete dataset folder",),
    ),
    Case(
        "a dataset whose data is cut off",
        Source("p", cut("*.arrow")),
        ("not a complete dataset folder",),
    ),
    Case(
        "a dataset whose state is cut off",
        Source("p", cut("state.json")),
        ("not a complete dataset folder",),
    ),
    Case(
        "a dataset whose data is gone",
        Source("p", lambda p: saved(p, lambda p: next(p.glob("*.arrow")).unlink())),
        ("not a complete dataset folder",),
    ),
    Case("a dataset", Source("p", saved, ("q",))),
    Case("empty", Source("p.jsonl", b""), ("p.jsonl has no rows",)),
    Case("blank", Source("p.jsonl", b"\n \r\n\t\n"), ("p.jsonl has no rows",)),
    Case("a mark alone", Source("p.jsonl", b"\xef\xbb\xbf"), ("p.jsonl has no rows",)),
    Case("an empty array", Source("p.json", b"[]"), ("p.json has no rows",)),
    Case("an empty table", Source("p.csv", b""), ("p.csv has no rows",)),
    Case("a mark and rows", Source("p.jsonl", b'\xef\xbb\xbf{"text": "q"}', ("q",))),
    Case("UTF-16", Source("p.jsonl", row().encode("utf-16")), ("is in UTF-16",)),
    Case("UTF-32", Source("p.jsonl", row().encode("utf-32")), ("UTF-16",)),
    Case("latin-1", Source("p.jsonl", '{"text": "é"}'.encode("latin-1")), ("p.jsonl:1", "0xe9")),
    Case(
        "latin-1 in an array",
        Source("p.json", '[\n{"text": "é"}]'.encode("latin-1")),
        ("p.json:2", "0xe9"),
    ),
    Case("a text file", Source("p.txt", b"q\n"), ("p.txt is not a file that can be read",)),
    Case("no ending", Source("prompts", b"q\n"), ("is not a file that can be read",)),
    Case("a spreadsheet", Source("p.xlsx", b"PK"), ("is not a file that can be read",)),
    Case("YAML", Source("p.yaml", b"- text: q\n"), ("is not a file that can be read",)),
    Case("large letters", Source("P.JSONL", row().encode(), ("q",))),
]

PATHS = [
    Case("a NUL", "/tmp/a\0b.jsonl", ("'/tmp/a\\x00b.jsonl'", "NUL")),
    Case("a NUL in Parquet's name", "a\0.parquet", ("NUL",)),
    Case("a name of 5000 characters", "/tmp/" + "x" * 5000 + ".jsonl", ("xxx",)),
    Case("an unknown store", "ftp://host/p.jsonl", ("ftp://",)),
    Case("a web page", "https://host/p.jsonl", ("https://",)),
    Case("half a character", "/tmp/\ud83d.jsonl", ("\\ud83d",)),
    Case("empty", "", ("does not exist",)),
    Case("below a file", "/etc/passwd/p.jsonl", ("/etc/passwd/p.jsonl",)),
    Case("a process", "/proc/self/mem.jsonl", ("does not exist",)),
]


@pytest.mark.parametrize("case", PLACES, ids=str)
def test_places_are_answered(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_prompts(case, tmp_path)


@pytest.mark.parametrize("case", PATHS, ids=str)
def test_paths_are_answered(case: Case, tmp_path: Path) -> None:
    source = PromptSource(path="p", domain="d").model_copy(update={"path": case.given})
    config = PromptsConfig.model_construct(sources=[source])
    check_answer(case, lambda: read_prompts(config))
