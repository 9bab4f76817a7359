"""Prompts in JSON that is none, or that says two things."""

from pathlib import Path

import pytest

from tests.support.hostile import Case
from tests.support.prompt_sources import Source, check_prompts, lines, row

pytestmark = pytest.mark.timeout(30)

DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "7" * 5000
LONG = "k" * 10**6
NO_JSON = [
    Case("a broken line", lines("{"), ("p.jsonl:2", "not valid JSON")),
    Case("a line cut off", lines('{"text": "q'), ("p.jsonl:2", "not valid JSON")),
    Case("two rows in a line", lines(row() + row()), ("p.jsonl:2", "more text stands behind")),
    Case("a trailing comma", lines('{"text": "q",}'), ("p.jsonl:2", "not valid JSON")),
    Case("single quotes of Python", lines("{'text': 'q'}"), ("p.jsonl:2", "not valid JSON")),
    Case("a comment", lines("// more"), ("p.jsonl:2", "not valid JSON")),
    Case("an HTML page", Source("p.jsonl", b"<!DOCTYPE html>\n"), ("p.jsonl:1", "not valid JSON")),
    Case(
        "a pointer of Git LFS",
        Source("p.jsonl", b"version https://git-lfs.github.com/spec/v1\n"),
        ("p.jsonl:1", "not valid JSON"),
    ),
    Case("one row over many lines", Source("p.json", b'{\n"text": "q"\n}'), ("p.json:1", "JSON")),
    Case("a raw control character", lines('{"text": "a\x01"}'), ("p.jsonl:2", "control char")),
    Case("a raw NUL", lines('{"text": "a\0"}'), ("p.jsonl:2", "NUL byte")),
    Case("a tail of NULs", lines("\0" * 4096), ("p.jsonl:2", "NUL byte")),
    Case("a file of NULs", Source("p.jsonl", b"\0" * 4096), ("p.jsonl:1", "NUL byte")),
    Case("deep nesting", lines(DEEP), ("p.jsonl:2", "nested too deeply")),
    Case(
        "deep nesting of objects in an unused column",
        lines('{"text": "q", "x": ' + '{"a":' * 50_000 + "1" + "}" * 50_001),
        ("p.jsonl:2", "nested too deeply"),
    ),
    Case(
        "deep nesting in an array",
        Source("p.json", b'[{"text": "q"}, ' + DEEP.encode() + b"]"),
        ("p.json:1 row 1", "nested too deeply"),
    ),
    Case("5000 digits", lines(f'{{"text": {DIGITS}}}'), ("p.jsonl:2", "4300 digits")),
    Case(
        "5000 digits in an unused column",
        lines(f'{{"text": "q", "x": -{DIGITS}}}'),
        ("p.jsonl:2", "4300 digits"),
    ),
    Case(
        "5000 digits in an array",
        Source("p.json", f'[{{"text": "q", "x": {DIGITS}}}]'.encode()),
        ("p.json:1 row 0", "4300 digits"),
    ),
    Case("a key twice", lines('{"text": "q", "text": "r"}'), ("p.jsonl:2", "key 'text'", "twice")),
    Case(
        "a key twice with one value",
        lines('{"text": "q", "reference": "1", "reference": "1"}'),
        ("p.jsonl:2", "key 'reference'", "twice"),
    ),
    Case(
        "a key twice in a message",
        lines('{"messages": [{"role": "user", "content": "a", "content": "b"}]}'),
        ("p.jsonl:2", "key 'content'", "twice"),
    ),
    Case(
        "a key twice in an array",
        Source("p.json", b'[\n{"text": "q", "text": "r"}]'),
        ("p.json:2 row 0", "key 'text'", "twice"),
    ),
    Case(
        "a key of a megabyte twice",
        lines(f'{{"{LONG}": 1, "{LONG}": 2}}'),
        ("p.jsonl:2", "kkk", "twice"),
    ),
    Case("an array cut off", Source("p.json", b'[{"text": "q"},'), ("p.json:1 row 1",)),
    Case("an array and a tail", Source("p.json", b'[{"text": "q"}]x'), ("goes on behind",)),
    Case("two arrays", Source("p.json", b'[{"text": "q"}]\n[{"text": "r"}]'), ("goes on behind",)),
    Case(
        "columns in place of rows",
        Source("p.json", b'{"text": {"0": "q"}}'),
        ("p.json:1", "`text` must be a non-empty text"),
    ),
    Case("escaped NUL", lines('{"text": "a\\u0000b"}', prompts=("a\0b",))),
    Case("a line of 10 MB", lines(row(text="x" * 10**7), prompts=("x" * 10**7,))),
    Case("NaN in an unused column", lines('{"text": "q", "x": NaN}', prompts=("q",))),
    Case("1e400 in an unused column", lines('{"text": "q", "x": 1e400}', prompts=("q",))),
    Case(
        "4000 digits in an unused column",
        lines(f'{{"text": "q", "x": {DIGITS[:4000]}}}', prompts=("q",)),
    ),
    Case(
        "line separators in a text",
        lines('{"text": "a\u2028b\u0085c"}', prompts=("a\u2028b\u0085c",)),
    ),
    Case("escape sequences", lines('{"text": "\\u001b[2Jx"}', prompts=("\x1b[2Jx",))),
    Case("NFC beside NFD", lines('{"text": "é"}', '{"text": "e\u0301"}', prompts=("é", "e\u0301"))),
    Case("a pair of surrogates", lines('{"text": "\\ud83d\\ude00"}', prompts=("😀",))),
    Case(
        "nesting of 100", lines('{"text": "q", "x": ' + "[" * 100 + "]" * 100 + "}", prompts=("q",))
    ),
]


@pytest.mark.parametrize("case", NO_JSON, ids=str)
def test_json_is_answered(case: Case, tmp_path: Path) -> None:
    check_prompts(case, tmp_path)
