"""Rows of distributions that no model computes, on their way into a cache and out of one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.cache import logprobs
from pipeline.cache.columns import Column
from pipeline.cache.selection import select
from pipeline.cache.shard import _checksum, read_hidden_states, read_shard, write_shard
from pipeline.config.scoring import HeadAndSampled, TopK
from pipeline.records import HiddenStates, SparseLogprobs
from tests.support.hostile import Case, check_answer

pytestmark = pytest.mark.timeout(30)

NAN, INF = float("nan"), float("inf")
TOP = TopK(type="top_k", max_entries=2)
DRAWN = HeadAndSampled(
    type="head_and_sampled", head_mass=0.5, max_head_entries=1, num_draws=8, renormalise=False
)


def captured(
    ids: Any = ((1, 2, 3),), logprobs: Any = ((-1.0, -2.0, -3.0),), gold: Any = (-1.0,), **more: Any
) -> dict[str, Any]:
    arrays = (np.array(ids), np.array(logprobs, np.float32), np.array(gold, np.float32))
    names = ("token_ids_PK", "logprobs_PK", "gold_logprobs_P")
    return dict(zip(names, arrays, strict=True)) | {"rule": TOP, "num_rows": 100} | more


WIDE = "has the token id {}, but the teacher has the ids 0 to 99"
CAPTURED = [
    Case("an id below 0", captured(ids=[[-1, 2, 3]]), ("position 0", WIDE.format(-1))),
    Case("an id of the LM head's rows", captured(ids=[[1, 100, 3]]), (WIDE.format(100),)),
    Case("2^24 + 7", captured(ids=[[2**24 + 7, 2, 3]]), (WIDE.format(2**24 + 7),)),
    Case("2^32 + 5", captured(ids=[[2**32 + 5, 2, 3]]), (WIDE.format(2**32 + 5),)),
    Case("2^40 + 5", captured(ids=[[2**40 + 5, 2, 3]]), (WIDE.format(2**40 + 5),)),
    Case(
        "2^24 + 7 where the rows are unknown",
        captured(ids=[[2**24 + 7, 2, 3]], num_rows=2**24),
        ("16777223",),
    ),
    Case("an id below 0 that is not kept", captured(ids=[[1, 2, -3]]), (WIDE.format(-3),)),
    Case(
        "an id below 0 at a later position",
        captured([[1, 2, 3], [1, -2, 3]], [[-1, -2, -3]] * 2, [-1, -1]),
        ("position 1",),
    ),
    Case("an id twice", captured(ids=[[1, 1, 3]]), ("position 0 holds the token id 1 twice",)),
    Case(
        "an id twice in the draws",
        captured(ids=[[1, 2, 2]], logprobs=[[-0.7, -1.4, -1.4]], rule=DRAWN),
        ("holds the token id 2 twice",),
    ),
    Case("NaN in front", captured(logprobs=[[NAN, -2, -3]]), ("position 0", "NaN")),
    Case("NaN behind", captured(logprobs=[[-1, -2, NAN]]), ("position 0", "NaN")),
    Case("NaN where the id is padding", captured(logprobs=[[NAN, -2, -3]], vocabulary=1), ("NaN",)),
    Case("gold of NaN", captured(gold=[NAN]), ("position 0", "NaN")),
    Case("all NaN", captured(logprobs=[[NAN] * 3]), ("NaN",)),
    Case("infinity in front", captured(logprobs=[[INF, -2, -3]]), ("no entry of finite",)),
    Case("nothing at a position", captured(logprobs=[[-INF] * 3]), ("no entry of finite",)),
    Case("ascending", captured(logprobs=[[-3, -2, -1]]), ("descending order",)),
    Case("a probability above 1", captured(logprobs=[[5, -2, -3]]), ("kept mass reaches",)),
    Case("a mass of 2", captured(logprobs=[[0, 0, -3]]), ("kept mass reaches 2.0",)),
    Case("padding alone", captured(ids=[[50, 51, 52]], vocabulary=50), ("no entry of finite",)),
    Case("the highest id", captured(ids=[[99, 2, 3]])),
    Case("padding beside", captured(ids=[[1, 51, 2]], vocabulary=50)),
    Case("an odd id without probability", captured(ids=[[1, 2, -1]], logprobs=[[-1, -2, -INF]])),
    Case("gold without probability", captured(gold=[-INF])),
    Case("a probability that float16 calls 0", captured(logprobs=[[-1, -2, -70_000.0]])),
    Case("ids of 64 bits", captured(ids=np.array([[1, 2, 3]], np.uint64))),
]

ROW = SparseLogprobs(
    sequence_id="s",
    num_entries=np.array([2, 1], np.uint8),
    token_ids=np.array([1, 2, 1], np.uint32),
    logprobs=np.array([-1, -2, -1], np.float16),
    counts=np.zeros(0, np.uint8),
    gold_logprobs=np.array([-1, -1], np.float16),
    tail_mass=np.array([0.5, 0.6], np.float16),
    entropies=np.array([1, 1], np.float16),
)


def changed(name: str, *values: Any, dtype: Any = None) -> SparseLogprobs:
    return replace(ROW, **{name: np.array(values, dtype or getattr(ROW, name).dtype)})


ROWS = [
    Case("an id of 2^24", changed("token_ids", 2**24, 2, 1), ("16777216 is not between 0",)),
    Case("an id of 2^32 - 1", changed("token_ids", 2**32 - 1, 2, 1), ("4294967295",)),
    Case("an id below 0", changed("token_ids", 1, -2, 1, dtype=np.int64), ("token id -2",)),
    Case(
        "an id beyond 32 bits",
        changed("token_ids", 2**40, 2, 1, dtype=np.int64),
        ("1099511627776",),
    ),
    Case("an id twice", changed("token_ids", 2, 2, 1), ("position 0 holds the token id 2 twice",)),
    Case("too few ids", changed("token_ids", 1, 2), ("3 entries counted",)),
    Case("too many counts", changed("counts", 1), ("0 entries are drawn",)),
    Case(
        "a position without entries", changed("num_entries", 3, 0), ("a position has no entries",)
    ),
    Case("gold of another length", changed("gold_logprobs", -1), ("different lengths",)),
    Case("NaN", changed("logprobs", NAN, -2, -1), ("not finite",)),
    Case("infinite gold", changed("gold_logprobs", -INF, -1), ("not finite",)),
    Case("a tail of NaN", changed("tail_mass", NAN, 0.6), ("not finite",)),
    Case("infinite entropy", changed("entropies", INF, 1), ("not finite",)),
    Case("ascending", changed("logprobs", -2, -1, -1), ("descending order",)),
    Case("a mass of 2", changed("logprobs", 0, 0, -1), ("kept mass reaches 2.0",)),
    Case("good", ROW),
    Case("one id at two positions", changed("token_ids", 1, 2, 2)),
    Case("the highest id of the format", changed("token_ids", 2**24 - 1, 2, 1)),
]


@pytest.mark.parametrize("case", CAPTURED, ids=str)
def test_captures_are_answered(case: Case, tmp_path: Path) -> None:
    path = str(tmp_path / "shard.parquet")

    def keep() -> list[SparseLogprobs]:
        write_shard(path, [select("s", teacher="t", **case.given)], "f")
        return read_shard(path)

    rows = check_answer(case, keep)
    assert storage.exists(path) == (not case.refusal)
    for row in rows or ():
        ids, logprobs_K = case.given["token_ids_PK"][0], case.given["logprobs_PK"][0]
        usual = case.given.get("vocabulary", 100)
        expected = [i for i, p in zip(ids, logprobs_K, strict=True) if i < usual and p > -60_000]
        assert row.token_ids.tolist() == expected[:2]


@pytest.mark.parametrize("case", ROWS, ids=str)
def test_rows_are_answered(case: Case, tmp_path: Path) -> None:
    path = str(tmp_path / "shard.parquet")

    def keep() -> list[SparseLogprobs]:
        write_shard(path, [case.given], "f")
        return read_shard(path)

    rows = check_answer(case, keep)
    assert storage.exists(path) == (not case.refusal)
    for row in rows or ():
        assert row.token_ids.tolist() == case.given.token_ids.tolist()


def forged(path: Path, *rows: SparseLogprobs, **changes: Any) -> None:
    """Writes a shard of rows that nobody checks, with a checksum that fits.

    Args:
        changes: metadata of the file that is other than the writer's.
    """
    columns = logprobs.encode(rows)
    names = [row.sequence_id for row in rows]
    quality = '{"num_positions": 2, "num_entries": 3, "kept_mass": 0.5, "kept_mass_p01": 0.5, '
    quality += '"gold_logprob": -1.0, "num_masked_gold": 0, "draw_variance": null}'
    checked = {"fingerprint": "f", "quality": quality, "origin": "null", "renormalised": "false"}
    checked |= changes
    metadata = checked | {
        "schema_version": str(logprobs.SCHEMA_VERSION),
        "num_rows": str(len(rows)),
        "checksum": _checksum(names, columns, *checked.values()),
    }
    table = pa.table({"sequence_id": names} | {n: c.to_arrow() for n, c in columns.items()})
    keys = {f"polystill.{key}": value for key, value in metadata.items()}
    pq.write_table(table.replace_schema_metadata(keys), path)


def other_columns(path: Path, **columns: Any) -> None:
    """A good shard some of whose columns are replaced, without a new checksum."""
    write_shard(str(path), [ROW], "f")
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.schema.names.index(name), name, values)
    pq.write_table(table, path)


def damaged(path: Path, place: float, value: int) -> None:
    write_shard(str(path), [ROW], "f")
    data = bytearray(path.read_bytes())
    data[int(len(data) * place)] ^= value
    path.write_bytes(data)


def cut(path: Path, share: float) -> None:
    write_shard(str(path), [ROW], "f")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def states(path: Path) -> None:
    write_shard(str(path), [HiddenStates("s", np.ones((2, 1, 4), np.uint16))], "f")


CORRUPT = ("the cache shard", "is corrupt", "polystill cache regenerate CONFIG")
SHARDS = [
    Case("empty", lambda path: path.write_bytes(b""), CORRUPT),
    Case("garbage", lambda path: path.write_bytes(b"PAR1" * 50), CORRUPT),
    Case("a folder", Path.mkdir, ("cannot read",)),
    Case("missing", lambda path: None, ("does not exist",)),
    Case("cut at a half", lambda path: cut(path, 0.5), CORRUPT),
    Case("cut at its end", lambda path: cut(path, 0.99), CORRUPT),
    Case("a flipped bit of data", lambda path: damaged(path, 0.1, 1), CORRUPT),
    Case("a flipped byte of the footer", lambda path: damaged(path, 0.9, 255), CORRUPT),
    Case("no texts as ids", lambda path: other_columns(path, sequence_id=pa.array([7])), CORRUPT),
    Case(
        "an id of null",
        lambda path: other_columns(path, sequence_id=pa.nulls(1, pa.string())),
        CORRUPT,
    ),
    Case(
        "a cell of null",
        lambda path: other_columns(path, logprobs=pa.nulls(1, pa.binary())),
        CORRUPT,
    ),
    Case("half a number", lambda path: other_columns(path, logprobs=pa.array([b"abc"])), CORRUPT),
    Case(
        "other numbers",
        lambda path: other_columns(path, logprobs=pa.array([b"\0" * 6])),
        (*CORRUPT, "checksum"),
    ),
    Case(
        "a column too many",
        lambda path: pq.write_table(pa.table({"sequence_id": ["s"], "x": [1]}), path),
        CORRUPT,
    ),
    Case(
        "prompts in its place",
        lambda path: pq.write_table(pa.table({"text": ["q"]}), path),
        CORRUPT,
    ),
    Case("hidden states in its place", states, CORRUPT),
    Case(
        "no rows",
        lambda path: pq.write_table(pa.table({"sequence_id": pa.array([], pa.string())}), path),
        CORRUPT,
    ),
    Case(
        "forged: too few ids",
        lambda path: forged(path, changed("token_ids", 1)),
        (*CORRUPT, "3 entries counted"),
    ),
    Case(
        "forged: gold of another length",
        lambda path: forged(path, changed("gold_logprobs", -1)),
        (*CORRUPT, "lengths"),
    ),
    Case(
        "forged: NaN",
        lambda path: forged(path, changed("logprobs", NAN, -2, -1)),
        (*CORRUPT, "not finite"),
    ),
    Case(
        "forged: no entries",
        lambda path: forged(path, changed("num_entries", 3, 0)),
        (*CORRUPT, "no entries"),
    ),
    Case("forged: figures that are a list", lambda path: forged(path, ROW, quality="[]"), CORRUPT),
    Case("forged: figures that are none", lambda path: forged(path, ROW, quality="{"), CORRUPT),
    Case(
        "forged: figures of another kind",
        lambda path: forged(path, ROW, quality='{"mean_norm": 1}'),
        CORRUPT,
    ),
    Case(
        "forged: an origin that is none", lambda path: forged(path, ROW, origin="nothing"), CORRUPT
    ),
    Case("good", lambda path: forged(path, ROW)),
]


@pytest.mark.parametrize("case", SHARDS, ids=str)
def test_shards_are_answered(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    case.given(path)
    rows = check_answer(case, lambda: read_shard(str(path)))
    assert case.refusal or rows[0].token_ids.tolist() == [1, 2, 1]


def with_shape(shape: str) -> Any:
    """Maker of a shard of hidden states whose metadata names another shape."""

    def make(path: Path) -> None:
        states(path)
        table = pq.read_table(path)
        column = Column.of_arrow(table.column("states").combine_chunks(), "<u2")
        metadata = {k.decode(): v.decode() for k, v in table.schema.metadata.items()}
        checked = [metadata[f"polystill.{key}"] for key in ("fingerprint", "quality")]
        checksum = _checksum(["s"], {"states": column}, *checked, shape)
        metadata |= {"polystill.shape": shape, "polystill.checksum": checksum}
        pq.write_table(table.replace_schema_metadata(metadata), path)

    return make


SHAPES = [
    Case("no list", with_shape("4"), CORRUPT),
    Case("no JSON", with_shape("[1,"), CORRUPT),
    Case("texts", with_shape('["1", "4"]'), CORRUPT),
    Case("wider than the cell", with_shape("[3, 5]"), CORRUPT),
    Case("zero", with_shape("[0, 4]"), CORRUPT),
    Case("one axis", with_shape("[4]"), CORRUPT),
    Case("huge", with_shape(json.dumps([10**30, 1])), CORRUPT),
    Case("its own", with_shape("[1, 4]")),
]


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes_are_answered(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    case.given(path)
    rows = check_answer(case, lambda: read_hidden_states(str(path)))
    assert case.refusal or rows[0].states.shape == (2, 1, 4)
