"""Prompt files as people have them: formats, marks, damage, and a limit on large files."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.stages.synthesize import synthesize
from pipeline.config.load import load_config
from pipeline.config.prompts import PromptsConfig, PromptSource
from pipeline.errors import PromptError
from pipeline.sequences import read_dataset
from pipeline.synthesis import rows as reading
from pipeline.synthesis.prompts import load_prompts, read_prompts
from pipeline.synthesis.rows import numbered_rows
from pipeline.synthesis.stored_file import StoredFile
from tests.support.command_line import QUICKSTART
from tests.unit.filters.test_filtering import prepared

ROWS = [
    {"text": 'Say "é, ü"\nin two lines', "reference": "1"},
    {"text": "U+2028 \u2028 stands in the line", "reference": None},
    {"text": "brackets ]}[{ \\ and commas,", "reference": "3"},
]
BOM = b"\xef\xbb\xbf"


def lines(rows: list[Any], end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def table(rows: list[dict[str, Any]], mark: str = ",") -> bytes:
    cells = [list(rows[0])] + [["" if v is None else v for v in row.values()] for row in rows]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in row] for row in cells]
    return "\r\n".join(mark.join(row) for row in quoted).encode()


def in_parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue().to_pybytes()


FORMS: dict[str, tuple[str, bytes]] = {
    "lines": ("p.jsonl", lines(ROWS)),
    "lines with a mark, CRLF and blank lines": (
        "p.jsonl",
        BOM + b"\r\n \r\n" + lines(ROWS, "\r\n"),
    ),
    "lines in a .json file": ("p.json", lines(ROWS)),
    "an array": ("p.json", json.dumps(ROWS).encode()),
    "an indented array": ("p.json", b"\n " + json.dumps(ROWS, indent=2).encode() + b"\n"),
    "an array with a mark": ("p.json", BOM + json.dumps(ROWS, ensure_ascii=False).encode()),
    "an array in a .jsonl file": ("p.jsonl", json.dumps(ROWS).encode()),
    "a table": ("p.csv", table(ROWS)),
    "a table with a mark and a blank line": ("p.csv", BOM + table(ROWS) + b"\r\n\r\n"),
    "a table with an unnamed column": ("p.csv", table([{"": "0"} | row for row in ROWS])),
    "a table of tabs": ("p.tsv", table(ROWS, "\t")),
    "compressed lines": ("p.jsonl.gz", gzip.compress(lines(ROWS))),
    "lines by another name": ("p.ndjson", lines(ROWS)),
    "a name in capitals": ("P.JSONL", lines(ROWS)),
    "compressed lines without the ending": ("p.jsonl", gzip.compress(BOM + lines(ROWS))),
    "lines that were decompressed on the way": ("p.jsonl.gz", lines(ROWS)),
    "a compressed array": ("p.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    "a compressed table": ("p.csv.gz", gzip.compress(table(ROWS))),
    "Parquet": ("p.parquet", in_parquet(ROWS)),
    "Parquet in small row groups": ("p.parquet", in_parquet(ROWS, row_group_size=1)),
}


def written(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


@pytest.fixture(params=[1 << 20, 16], ids=["usual pieces", "tiny pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("name", "content"), FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_rows(name: str, content: bytes, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    found = list(numbered_rows(path))
    assert [row for _, row in found] == ROWS
    assert [row for _, row in numbered_rows(path, limit=2)] == [row for _, row in found[:2]]


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("p.jsonl", lines(ROWS[:1]) + b"\n" + lines(ROWS[2:]), [":1", ":3"]),
        ("p.json", json.dumps([{"a": 1}, {"a": 2}], indent=1).encode(), [":2 row 0", ":5 row 1"]),
        ("p.csv", table(ROWS[:2]), [":2", ":4"]),
        ("p.parquet", in_parquet(ROWS[:2]), [" row 0", " row 1"]),
    ],
)
def test_places_lead_to_the_row(
    name: str, content: bytes, places: list[str], tmp_path: Path
) -> None:
    path = written(tmp_path, name, content)
    assert [place for place, _ in numbered_rows(path)] == [f"{path}{place}" for place in places]


DAMAGE: dict[str, tuple[str, bytes, str]] = {
    "no row": ("p.jsonl", b"\n\n", "has no rows"),
    "an empty array": ("p.json", b" [ ] ", "has no rows"),
    "a header alone": ("p.csv", b"text,domain\n", "has no rows"),
    "a byte of Latin-1": (
        "p.jsonl",
        b'{"a": 1}\n{"a": "\xe9"}',
        ":2: not UTF-8, found the byte 0xe9",
    ),
    "Latin-1 in an array": ("p.json", b'[{"a": 1},\n{"a": "\xe9"}]', ":2: not UTF-8"),
    "Latin-1 in a table": ("p.csv", b"text\nfine\ncaf\xe9\n", ":3: not UTF-8"),
    "UTF-16": ("p.jsonl", '{"a": 1}'.encode("utf-16"), "is in UTF-16: save it as UTF-8"),
    "an object over several lines": (
        "p.json",
        b'{\n "rows": []}',
        ":1: not valid JSON: .* in one array",
    ),
    "an array that is cut off": ("p.json", b'[{"a": 1},\n{"a": "x', ":2 row 1: not valid JSON"),
    "an array that is not closed": ("p.json", b'[{"a": 1},\n', ":2 row 1: not valid JSON"),
    "a wrong value in an array": (
        "p.json",
        b'[{"a": 1},\n{"a":\n yes}]',
        ":3 row 1: not valid JSON",
    ),
    "text behind an array": ("p.json", b'[{"a": 1}]\n[{"a": 1}]', ":2: the file goes on behind"),
    "a compressed file that is cut off": (
        "p.csv.gz",
        gzip.compress(b"a\n1\n" * 99)[:-9],
        "damaged or cut",
    ),
    "a table of semicolons": (
        "p.csv",
        b"text;domain\nx;d\n",
        "separate the columns by ',' in place of ';'",
    ),
    "a comma without quotes": ("p.csv", b"text,domain\nx, y,d\n", ":2: the row has 3 cells"),
    "a quote that stays open": (
        "p.csv",
        b'text,domain\na,d\n"x,d\ny,d\n',
        ":3: not a row of a table",
    ),
    "one name for two columns": ("p.csv", b"text,text\nx,y\n", r"names \['text'\] twice"),
    "another compression": ("p.jsonl.zst", b"(\xb5/\xfd", "name ends in .jsonl"),
}


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize(("name", "content", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_with_its_place(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(PromptError, match=message) as caught:
        list(numbered_rows(path))
    assert str(caught.value).startswith(path)


def test_a_damaged_parquet_file_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "p.parquet", in_parquet(ROWS)[:-20])
    with pytest.raises(PromptError, match=r"p\.parquet is not a complete Parquet file"):
        list(numbered_rows(path))


def test_a_real_error_in_an_array_is_found_without_the_rest_of_the_file(
    tmp_path: Path, bytes_read: Callable[[], int]
) -> None:
    rest = json.dumps([{"text": "x" * 1000}] * 20_000)[1:]
    path = written(tmp_path, "p.json", b'[{"text": oops},' + rest.encode())
    with pytest.raises(PromptError, match=":1 row 0: not valid JSON"):
        list(numbered_rows(path))
    assert bytes_read() < 4 << 20 < Path(path).stat().st_size


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Number of bytes that were read from files so far."""
    pieces: list[int] = []
    read = StoredFile._piece

    def counted(file: StoredFile, start: int, num_bytes: int) -> bytes:
        data = read(file, start, num_bytes)
        pieces.append(len(data))
        return data

    monkeypatch.setattr(StoredFile, "_piece", counted)
    return lambda: sum(pieces)


def large(name: str) -> bytes:
    """A file of some 20 MB whose rows do not compress."""
    import random

    draw = random.Random(1)
    rows = [{"text": draw.randbytes(500).hex()} for _ in range(20_000)]
    if name.endswith(".json"):
        return json.dumps(rows).encode()
    if name.endswith(".parquet"):
        return in_parquet(rows, row_group_size=len(rows), use_dictionary=False)
    content = lines(rows) if "jsonl" in name else table(rows)
    return gzip.compress(content, 1) if name.endswith(".gz") else content


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.jsonl.gz", "p.parquet"])
def test_a_limit_reads_no_more_than_it_needs(
    name: str, tmp_path: Path, bytes_read: Callable[[], int]
) -> None:
    content = large(name)
    path = written(tmp_path, name, content)
    assert len(list(numbered_rows(path, limit=10))) == 10
    assert bytes_read() <= 4 << 20 < len(content) / 2
    before = bytes_read()
    assert len(list(numbered_rows(path))) == 20_000
    assert bytes_read() - before < 1.1 * len(content), "the whole file is read once"


def test_a_limit_parses_no_row_behind_it(tmp_path: Path) -> None:
    path = written(tmp_path, "p.jsonl", lines([{"text": "x"}]) + b"{oops\n")
    source = PromptSource(path=path, domain="d", limit=1)
    prompts, counts = read_prompts(PromptsConfig(sources=[source]))
    assert [prompt.text for prompt in prompts] == ["x"] and counts["read"] == 1


def test_prompts_of_every_form_end_up_in_the_dataset(tmp_path: Path) -> None:
    """From the files, through prepare's table and the given answers, to what is trained on."""
    questions = iter(f"{i} + 1 =" for i in range(99))
    forms = {
        "lines.jsonl": lambda rows: BOM + lines(rows, "\r\n"),
        "array.json": lambda rows: json.dumps(rows, indent=1).encode(),
        "table.csv": lambda rows: BOM + table(rows),
        "tabs.tsv": lambda rows: table(rows, "\t"),
        "lines.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
        "table.csv.gz": lambda rows: gzip.compress(table(rows)),
        "array.json.gz": lambda rows: gzip.compress(json.dumps(rows).encode()),
        "rows.parquet": in_parquet,
    }
    sources, wanted = [], set()
    for name, form in forms.items():
        rows = [{"instruction": next(questions), "input": text} for text in ("", "reverse ab")]
        written(tmp_path, name, form([row | {"output": str(i)} for i, row in enumerate(rows)]))
        settings = {"template": "{instruction}\n\n{input}", "fields": {"reference": "output"}}
        sources.append({"path": str(tmp_path / name), "chat": True} | settings)
        wanted |= {rows[0]["instruction"], f"{rows[1]['instruction']}\n\nreverse ab"}
    question = {"from": "human", "value": next(questions), "weight": None}
    chats = [{"conversations": [question, {"from": "gpt", "value": "0", "weight": None}]}]
    written(tmp_path, "chats.parquet", in_parquet(chats))
    settings = {"answered": True, "fields": {"messages": "conversations"}}
    sources.append({"path": str(tmp_path / "chats.parquet")} | settings)
    wanted.add(question["value"])
    sources = [source | {"domain": "arithmetic", "split": "train"} for source in sources]
    held = {"messages": [{"role": "user", "content": "9 + 9 ="}], "reference": "18"}
    path = written(tmp_path, "held.jsonl", lines([held]))
    sources.append({"path": path, "domain": "arithmetic", "split": "holdout"})
    config = load_config(
        QUICKSTART / "config.yaml",
        [
            f"storage.root={tmp_path / 'out'}",
            f"prompts.sources={json.dumps(sources)}",
            "synthesis.recipes=[{type: dataset}]",
            "synthesis.filters=[]",
        ],
    )
    run = prepared(config)
    record = synthesize(run)
    assert record.dataset is not None
    prompts = load_prompts(run.layout, run.prepared.prompts_digest)
    texts = {prompt.prompt_id: prompt.words for prompt in prompts}
    entries = read_dataset(run.layout, record.dataset)
    assert {texts[entry.prompt_id] for entry in entries} == wanted | {"9 + 9 ="}
    assert len(entries) == len(wanted) + 1 == 2 * len(forms) + 2
