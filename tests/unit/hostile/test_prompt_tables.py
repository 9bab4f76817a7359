"""Prompts from spreadsheets, and compressed files that are cut, damaged or made to grow."""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.hostile import Case
from tests.support.prompt_sources import Source, check_prompts

pytestmark = pytest.mark.timeout(30)


def members(*contents: bytes) -> bytes:
    return b"".join(map(gzip.compress, contents))


def bomb(piece: bytes, megabytes: int, start: bytes = b"") -> Callable[[Path], None]:
    """Maker of a gzip file that grows to so many MB of one piece, made in little memory."""

    def make(path: Path) -> None:
        pack = zlib.compressobj(1, wbits=31)
        block = piece * (2**20 // len(piece))
        with path.open("wb") as file:
            file.write(pack.compress(start))
            for _ in range(megabytes):
                file.write(pack.compress(block))
            file.write(pack.flush())

    return make


TABLES = [
    Case("empty cells and blank lines", Source("p.csv", b"text,x\n\nq,\n,,\n", ("q",))),
    Case("a header alone", Source("p.csv", b"text,x\n"), ("has no rows",)),
    Case("no header", Source("p.csv", b"What is 1+1?,2\nq,3\n"), ("p.csv:2", "What is 1+1?")),
    Case(
        "semicolons", Source("p.csv", b"text;x\nq;1\n"), ("p.csv:1", "separate the columns by ','")
    ),
    Case("tabs in .csv", Source("p.csv", b"text\tx\nq\t1\n"), ("p.csv:1", "'\\t'")),
    Case(
        "commas in .tsv",
        Source("p.tsv", b"text,x\nq,1\n"),
        ("p.tsv:1", "separate the columns by '\\t'"),
    ),
    Case("too few cells", Source("p.csv", b"text,x\nq\n"), ("p.csv:2", "1 cells", "2 columns")),
    Case("too many cells", Source("p.csv", b"text,x\nq,1,2\n"), ("p.csv:2", "3 cells")),
    Case("a quote left open", Source("p.csv", b'text\n"q\nr\n'), ("p.csv:2", "in quotes")),
    Case(
        "a quote left open in 20 MB",
        Source("p.csv", b'text\n"q\n' + b"rrrrrrrrr\n" * 2_000_000),
        ("p.csv:2", "in quotes"),
    ),
    Case("a text behind a quote", Source("p.csv", b'text\n"q"r\n'), ("p.csv:2", "in quotes")),
    Case(
        "a cell of 20 MB",
        Source("p.csv", b"text\n" + b"x" * 20_000_000 + b"\n"),
        ("p.csv:2", "field larger"),
    ),
    Case("a cell of 10 MB", Source("p.csv", b"text\n" + b"x" * 10**7 + b"\n", ("x" * 10**7,))),
    Case("a NUL", Source("p.csv", b"text\nq\0r\n"), ("p.csv:2", "NUL byte")),
    Case("a NUL in quotes", Source("p.csv", b'text\n"q\nr\0"\n'), ("p.csv:3", "NUL byte")),
    Case("UTF-16 with a mark", Source("p.csv", "text\nq\n".encode("utf-16")), ("UTF-16",)),
    Case(
        "UTF-16 without a mark",
        Source("p.csv", "text\nq\n".encode("utf-16-le")),
        ("p.csv:1", "NUL byte", "UTF-16"),
    ),
    Case(
        "latin-1", Source("p.csv", "text\né\n".encode("latin-1")), ("p.csv:2", "not UTF-8", "0xe9")
    ),
    Case(
        "latin-1 in quotes",
        Source("p.csv", 'text\n"a\né"\n'.encode("latin-1")),
        ("p.csv:3", "0xe9"),
    ),
    Case(
        "latin-1 in the header",
        Source("p.csv", "text,é\nq,1\n".encode("latin-1")),
        ("p.csv:1", "0xe9"),
    ),
    Case("surrogates in UTF-8", Source("p.csv", b"text\n\xed\xa0\xbd\n"), ("p.csv:2", "not UTF-8")),
    Case(
        "one name for two columns",
        Source("p.csv", b"text,text\nq,r\n"),
        ("p.csv:1", "['text'] twice"),
    ),
    Case(
        "10^4 names for two columns each",
        Source("p.csv", b",".join(b"c%d" % (i // 2) for i in range(20_000)) + b"\n"),
        ("twice", "and 9980 more"),
    ),
    Case("one name with spaces", Source("p.csv", b"text, text\nq,r\n"), ("['text'] twice",)),
    Case("a header of 1 MB", Source("p.csv", b"x" * 10**6 + b"\nq\n"), ("p.csv:2", "neither")),
    Case(
        "10^5 columns",
        Source(
            "p.csv",
            b",".join(b"c%d" % i for i in range(10**5)) + b"\n" + b"," * (10**5 - 1) + b"1\n",
        ),
        ("p.csv:2", "and 99980 more"),
    ),
    Case("old Mac's lines", Source("p.csv", b"text\rq\rr\r"), ("p.csv:1",)),
    Case(
        "bytes of a spreadsheet",
        Source("p.csv", b"PK\x03\x04\x14\0\x06\0"),
        ("p.csv:1", "NUL byte"),
    ),
    Case("an id without value", Source("p.csv", b"text,id\nq,\n", ("q",))),
    Case(
        "a mark, CRLF and a break in quotes",
        Source("p.csv", b'\xef\xbb\xbftext\r\n"q\r\nr"\r\n', ("q\r\nr",)),
    ),
    Case("no line break at the end", Source("p.tsv", b"x\ttext\n1\tq", ("q",))),
    Case("an unnamed column of row numbers", Source("p.csv", b",text\n0,q\n1,r\n", ("q", "r"))),
    Case("formulas", Source("p.csv", b"text\n=cmd|'/c calc'!A0\n", ("=cmd|'/c calc'!A0",))),
]

GOOD_GZIP = gzip.compress(b'{"text": "q"}\n')
COMPRESSED = [
    Case("cut off", Source("p.jsonl.gz", GOOD_GZIP[:-4]), ("damaged or cut off",)),
    Case("cut in its header", Source("p.jsonl.gz", GOOD_GZIP[:5]), ("damaged or cut off",)),
    Case("two bytes", Source("p.jsonl.gz", b"\x1f\x8b"), ("damaged or cut off",)),
    Case(
        "a flipped byte",
        Source("p.jsonl.gz", GOOD_GZIP[:14] + b"\xff" + GOOD_GZIP[15:]),
        ("damaged or cut off",),
    ),
    Case(
        "a wrong checksum",
        Source("p.jsonl.gz", GOOD_GZIP[:-8] + b"\0" * 4 + GOOD_GZIP[-4:]),
        ("damaged or cut off",),
    ),
    Case(
        "a wrong length",
        Source("p.jsonl.gz", GOOD_GZIP[:-4] + b"\x01\0\0\0"),
        ("damaged or cut off",),
    ),
    Case(
        "garbage behind it", Source("p.jsonl.gz", GOOD_GZIP + b"garbage"), ("damaged or cut off",)
    ),
    Case(
        "an unknown method",
        Source("p.jsonl.gz", b"\x1f\x8b\x09" + GOOD_GZIP[3:]),
        ("damaged or cut off",),
    ),
    Case("nothing inside", Source("p.jsonl.gz", gzip.compress(b"")), ("has no rows",)),
    Case(
        "a bomb without line breaks",
        Source("p.jsonl.gz", bomb(b"x", 80)),
        (":1", "longer than 64 MiB"),
    ),
    Case(
        "a bomb of one text",
        Source("p.json.gz", bomb(b"x", 80, b'[{"text": "')),
        ("row 0", "longer than 64 MiB"),
    ),
    Case("a bomb of nested lists", Source("p.json.gz", bomb(b"[", 80)), ("nested too deeply",)),
    Case("a bomb of empty lines", Source("p.jsonl.gz", bomb(b"\n", 80)), ("million blank lines",)),
    Case(
        "a bomb of empty lines in a table",
        Source("p.csv.gz", bomb(b"\n", 80)),
        ("million blank lines",),
    ),
    Case("a bomb of commas", Source("p.csv.gz", bomb(b",", 80)), ("longer than 64 MiB",)),
    Case("a bomb of zeros", Source("p.jsonl.gz", bomb(b"\0", 80)), ("longer than 64 MiB",)),
    Case(
        "zstandard", Source("p.jsonl", b"\x28\xb5\x2f\xfd" + b"x" * 50), ("p.jsonl:1", "not UTF-8")
    ),
    Case(
        "xz by its name", Source("p.jsonl.xz", b"\xfd7zXZ\0"), ("is not a file that can be read",)
    ),
    Case("a zip file", Source("p.jsonl", b"PK\x03\x04\x14\0\0\0"), ("p.jsonl:1", "NUL byte")),
    Case(
        "a tar inside",
        Source("p.jsonl.gz", gzip.compress(b"p.jsonl" + b"\0" * 505)),
        (":1", "NUL byte"),
    ),
    Case("gzip in gzip", Source("p.jsonl.gz", gzip.compress(GOOD_GZIP)), (":1",)),
    Case(
        "two members",
        Source("p.jsonl.gz", members(b'{"text": "q"}\n{"te', b'xt": "r"}\n'), ("q", "r")),
    ),
    Case("zeros behind it", Source("p.jsonl.gz", GOOD_GZIP + b"\0" * 512, ("q",))),
    Case("gzip without the name", Source("p.jsonl", GOOD_GZIP, ("q",))),
    Case("the name without gzip", Source("p.jsonl.gz", b'{"text": "q"}\n', ("q",))),
    Case("a mark inside", Source("p.csv.gz", gzip.compress(b"\xef\xbb\xbftext\nq\n"), ("q",))),
]


@pytest.mark.parametrize("case", TABLES, ids=str)
def test_tables_are_answered(case: Case, tmp_path: Path) -> None:
    check_prompts(case, tmp_path)


@pytest.mark.parametrize("case", COMPRESSED, ids=str)
def test_compressed_files_are_answered(case: Case, tmp_path: Path) -> None:
    check_prompts(case, tmp_path)
