"""Prompts in Parquet files that are damaged, or hold types that nobody expects."""

import decimal
import io
import struct
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.hostile import Case
from tests.support.prompt_sources import Source, check_prompts

pytestmark = pytest.mark.timeout(30)


def parquet(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


def raw_utf8(*texts: bytes) -> pa.Array:
    """A column of strings that are not checked."""
    offsets = np.cumsum([0, *map(len, texts)]).astype("<i4").tobytes()
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(texts))]
    return pa.Array.from_buffers(pa.string(), len(texts), buffers)


def q(kind: Any = None, text: str = "q") -> pa.Array:
    return pa.array([text], kind)


def some_parquet(**options: Any) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"text": [f"question {i} of many" for i in range(200)]})
    pq.write_table(table, sink, write_page_checksum=True, compression="none", **options)
    return sink.getvalue()


WHOLE = some_parquet()
PARQUET = [
    Case("empty", Source("p.parquet", b""), ("not a complete Parquet file",)),
    Case("garbage", Source("p.parquet", b"garbage" * 100), ("not a complete Parquet file",)),
    Case("cut at its end", Source("p.parquet", WHOLE[:-100]), ("not a complete Parquet file",)),
    Case("cut in the middle", Source("p.parquet", WHOLE[: len(WHOLE) // 2]), ("not a complete",)),
    Case("cut at its beginning", Source("p.parquet", WHOLE[100:]), ("p.parquet",)),
    Case("its marks alone", Source("p.parquet", b"PAR1PAR1"), ("not a complete Parquet file",)),
    Case(
        "a footer longer than the file",
        Source("p.parquet", WHOLE[:-8] + struct.pack("<i", 2**31 - 1) + b"PAR1"),
        ("not a complete",),
    ),
    Case(
        "a footer of negative length",
        Source("p.parquet", WHOLE[:-8] + struct.pack("<i", -5) + b"PAR1"),
        ("not a complete",),
    ),
    Case(
        "zeros for a footer",
        Source("p.parquet", WHOLE[:-300] + b"\0" * 292 + WHOLE[-8:]),
        ("not a complete",),
    ),
    Case(
        "a flipped byte of data",
        Source("p.parquet", WHOLE[:300] + bytes([WHOLE[300] ^ 1]) + WHOLE[301:]),
        ("not a complete Parquet file",),
    ),
    Case("encrypted", Source("p.parquet", WHOLE[:-4] + b"PARE"), ("not a complete Parquet file",)),
    Case(
        "a pointer of Git LFS",
        Source("p.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"),
        ("not a complete",),
    ),
    Case("no rows", Source("p.parquet", parquet(text=pa.array([], pa.string()))), ("has no rows",)),
    Case(
        "no columns",
        Source("p.parquet", lambda p: pq.write_table(pa.table({}), p)),
        ("has no rows",),
    ),
    Case("other columns", Source("p.parquet", parquet(body=q())), ("row 0", "fields: body")),
    Case(
        "two columns of one name",
        Source(
            "p.parquet",
            lambda p: pq.write_table(pa.Table.from_arrays([q(), q()], ["text", "text"]), p),
        ),
        ("['text'] twice",),
    ),
    Case(
        "two unused columns of one name",
        Source(
            "p.parquet",
            lambda p: pq.write_table(pa.Table.from_arrays([q()] * 3, ["text", "x", "x"]), p),
        ),
        ("['x'] twice",),
    ),
    Case(
        "text that is not UTF-8",
        Source("p.parquet", parquet(text=raw_utf8(b"q", b"\xff"))),
        ("the column 'text'", "not UTF-8", "rows 0 to 1"),
    ),
    Case(
        "an unused text that is not UTF-8",
        Source("p.parquet", parquet(text=q(), x=raw_utf8(b"\xe9"))),
        ("the column 'x'", "not UTF-8"),
    ),
    Case(
        "a nested text that is not UTF-8",
        Source(
            "p.parquet",
            parquet(
                messages=pa.ListArray.from_arrays(
                    [0, 1],
                    pa.StructArray.from_arrays(
                        [q(text="user"), raw_utf8(b"\xff")], ["role", "content"]
                    ),
                )
            ),
        ),
        ("the column 'messages'", "not UTF-8"),
    ),
    Case(
        "bytes as text",
        Source("p.parquet", parquet(text=pa.array([b"q"]))),
        ("row 0", "found b'q'"),
    ),
    Case(
        "bytes of 1 MB as text",
        Source("p.parquet", parquet(text=pa.array([b"q" * 10**6]))),
        ("row 0", "found b'qqq"),
    ),
    Case(
        "a list as text",
        Source("p.parquet", parquet(text=pa.array([["q"]]))),
        ("row 0", "found ['q']"),
    ),
    Case(
        "a struct as text",
        Source("p.parquet", parquet(text=pa.array([{"a": "q"}]))),
        ("row 0", "found {'a': 'q'}"),
    ),
    Case(
        "a map as messages",
        Source(
            "p.parquet",
            parquet(
                messages=pa.array(
                    [[("role", "user"), ("content", "q")]], pa.map_(pa.string(), pa.string())
                )
            ),
        ),
        ("row 0", "messages[0]"),
    ),
    Case(
        "a decimal as reference",
        Source("p.parquet", parquet(text=q(), reference=pa.array([decimal.Decimal("1.50")]))),
        ("`reference`", "Decimal('1.50')"),
    ),
    Case(
        "a time as reference",
        Source(
            "p.parquet", parquet(text=q(), reference=pa.array([datetime(2020, 1, 1, tzinfo=UTC)]))
        ),
        ("`reference`", "datetime"),
    ),
    Case(
        "a time as id",
        Source("p.parquet", parquet(text=q(), id=pa.array([datetime(2020, 1, 1, tzinfo=UTC)]))),
        ("`id`", "datetime"),
    ),
    Case(
        "bytes as id",
        Source("p.parquet", parquet(text=q(), id=pa.array([b"\x01"]))),
        ("`id`", "found b'\\x01'"),
    ),
    Case(
        "NaN as id",
        Source("p.parquet", parquet(text=q(), id=pa.array([float("nan")]))),
        ("`id`", "found nan"),
    ),
    Case(
        "a text of null type", Source("p.parquet", parquet(text=pa.nulls(1))), ("row 0", "neither")
    ),
    Case("dictionary encoding", Source("p.parquet", parquet(text=q().dictionary_encode()), ("q",))),
    Case("large strings", Source("p.parquet", parquet(text=q(pa.large_string())), ("q",))),
    Case("string views", Source("p.parquet", parquet(text=q(pa.string_view())), ("q",))),
    Case(
        "decimal ids",
        Source("p.parquet", parquet(text=q(), id=pa.array([decimal.Decimal("7")])), ("q",)),
    ),
    Case("float ids", Source("p.parquet", parquet(text=q(), id=pa.array([1.0])), ("q",))),
    Case(
        "ids that are UUIDs",
        Source("p.parquet", parquet(text=q(), id=pa.array([uuid.UUID(int=7)], pa.uuid())), ("q",)),
    ),
    Case(
        "numbers of 64 bits as reference",
        Source(
            "p.parquet", parquet(text=q(), reference=pa.array([2**64 - 1], pa.uint64())), ("q",)
        ),
    ),
    Case(
        "a struct with one name twice as text",
        Source("p.parquet", parquet(text=pa.StructArray.from_arrays([q(), q()], ["a", "a"]))),
        ("`text`", "struct<a: string, a: string>"),
    ),
    Case(
        "a time behind the year 9999 as reference",
        Source("p.parquet", parquet(text=q(), reference=pa.array([2**55], pa.timestamp("ms")))),
        ("`reference`", "timestamp[ms]"),
    ),
    Case(
        "an unused time behind the year 9999",
        Source("p.parquet", parquet(text=q(), x=pa.array([2**55], pa.timestamp("ms"))), ("q",)),
    ),
    Case(
        "an unused time in nanoseconds",
        Source("p.parquet", parquet(text=q(), x=pa.array([2**61 + 1], pa.timestamp("ns"))), ("q",)),
    ),
    Case(
        "an unused duration in nanoseconds",
        Source("p.parquet", parquet(text=q(), x=pa.array([2**61 + 1], pa.duration("ns"))), ("q",)),
    ),
    Case(
        "an unused time in a zone that is unknown",
        Source(
            "p.parquet", parquet(text=q(), x=pa.array([0], pa.timestamp("s", "Mars/Base"))), ("q",)
        ),
    ),
    Case(
        "an unused map, struct, decimal, bytes, half",
        Source(
            "p.parquet",
            parquet(
                text=q(),
                a=pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())),
                b=pa.array([{"x": None}]),
                c=pa.array([decimal.Decimal(1)]),
                d=pa.array([b"\xff"]),
                e=pa.array([np.float16(1)]),
            ),
            ("q",),
        ),
    ),
    Case(
        "an unused struct with one name twice",
        Source(
            "p.parquet",
            parquet(text=q(), x=pa.StructArray.from_arrays([q(), q()], ["a", "a"])),
            ("q",),
        ),
    ),
    Case(
        "2000 columns",
        Source(
            "p.parquet", parquet(text=q(), **{f"c{i}": pa.nulls(1) for i in range(2000)}), ("q",)
        ),
    ),
    Case(
        "half a character in a binary column beside",
        Source("p.parquet", parquet(text=q(), x=pa.array([b"\xed\xa0\xbd"])), ("q",)),
    ),
    Case(
        "many texts of 1 MB in few bytes",
        Source(
            "p.parquet",
            parquet(text=pa.array(["x" * 2**20] * 100).dictionary_encode()),
            ("x" * 2**20,),
        ),
    ),
]


@pytest.mark.parametrize("case", PARQUET, ids=str)
def test_parquet_files_are_answered(case: Case, tmp_path: Path) -> None:
    check_prompts(case, tmp_path)
