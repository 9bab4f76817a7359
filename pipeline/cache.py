"""The logit cache on disk: the Parquet schema of a shard, its writer and its reader.

One row per sequence; each array is one binary cell of little-endian numbers, which a reader decodes
with `np.frombuffer` a whole column at a time. Token ids are split into two planes, so that the high
plane, nearly always zero, costs nothing after compression. The file's metadata explains the columns
and the alignment.

A shard file is the truth about itself. Index and manifest are derived from shards
(`pipeline/cache_index.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from xxhash import xxh3_128

from pipeline import storage
from pipeline.cache_checks import check_row
from pipeline.errors import CacheError, CorruptFileError, CorruptShardError
from pipeline.fingerprint import digest_ids
from pipeline.records import SparseLogprobs
from pipeline.selection import draw_variance

SCHEMA_VERSION = 2
ALIGNMENT = (
    "Position j of a row is the j-th token index i_j of the sequence's loss spans, in order. Its "
    "entries are the teacher's distribution over the token at index i_j given all tokens before "
    "it; input_ids[i_j] is the gold token. Student logits at index i_j - 1 are trained against "
    "position j. Log-probabilities are normalised over the full vocabulary at temperature 1. "
    "token_id = token_ids_low + 65536 * token_ids_high; position j owns num_entries[j] "
    "consecutive entries, descending. Where num_head is empty, all are head entries, of the given "
    "logprobs, and tail_mass is the probability outside them. Otherwise the first num_head[j] are; "
    "the others were drawn with replacement, counts[i] times each, and stand for their share of "
    "the position's draws in 1 - tail_mass - sum(exp(head logprobs)); tail_mass lies outside what "
    "draws could reach. With renormalised, everything is divided by 1 - tail_mass."
)
DTYPES = {
    "num_entries": "<u1",
    "num_head": "<u1",
    "token_ids_low": "<u2",
    "token_ids_high": "<u1",
    "logprobs": "<f2",
    "counts": "<u1",
    "gold_logprobs": "<f2",
    "tail_mass": "<f2",
    "entropies": "<f2",
}
METADATA_KEYS = {
    "polystill.schema_version",
    "polystill.num_rows",
    "polystill.checksum",
    "polystill.fingerprint",
    "polystill.quality",
    "polystill.renormalised",
}
ID_PLANES = ("token_ids_low", "token_ids_high")
CACHE_SCHEMA = pa.schema([("sequence_id", pa.string()), *((name, pa.binary()) for name in DTYPES)])


@dataclass(frozen=True)
class _Column:
    """The cells of one column, one after another: row i owns `values[starts[i]:starts[i + 1]]`."""

    values: np.ndarray
    starts: np.ndarray

    @classmethod
    def of_arrow(cls, cells: pa.Array, dtype: str) -> _Column:
        """A view of the cells; their lengths must be whole numbers of values."""
        _, offsets, data = cells.buffers()
        edges = np.frombuffer(offsets, "<i4")[cells.offset : cells.offset + len(cells) + 1]
        payload = np.frombuffer(data or b"", np.uint8)[edges[0] : edges[-1]]
        size = np.dtype(dtype).itemsize
        return cls(payload.view(dtype), (edges.astype(np.int64) - edges[0]) // size)

    def to_arrow(self) -> pa.Array:
        edges = (self.starts * self.values.itemsize).astype("<i4")
        buffers = [None, pa.py_buffer(edges), pa.py_buffer(self.values)]
        return pa.Array.from_buffers(pa.binary(), len(edges) - 1, buffers)


@dataclass(frozen=True)
class ShardEntry:
    """What index and manifest keep of one shard.

    Attributes:
        digest: of the sequence ids; the file's name.
        positions: of each sequence.
        num_bytes: of the file.
        checksum: of the decoded payload and of what its metadata says about it.
        kept_mass: mean over positions of the probability inside the kept entries; with draws,
            inside the captured ones.
        kept_mass_p01: its 1st percentile.
        gold_logprob: mean log-probability of the gold tokens in nats.
        draw_variance: mean over positions of the variance that draws give the estimate, summed
            over the vocabulary; None where nothing is drawn.
    """

    digest: str
    sequence_ids: tuple[str, ...]
    positions: tuple[int, ...]
    num_positions: int
    num_entries: int
    num_bytes: int
    checksum: str
    kept_mass: float
    kept_mass_p01: float
    gold_logprob: float
    draw_variance: float | None


def write_shard(path: str, rows: Sequence[SparseLogprobs], fingerprint: str) -> ShardEntry:
    """Encodes a shard in memory and writes it in one call.

    Raises:
        CacheError: a row breaks an invariant of the format.
        StorageError: the disk is full or the place cannot be written.
    """
    for row in rows:
        check_row(row)
    kinds = {(row.is_drawn, row.renormalised) for row in rows}
    if len(kinds) > 1:
        raise CacheError(f"{path}: rows of several selections cannot share a shard")
    columns = _encode(rows)
    identifiers = [row.sequence_id for row in rows]
    renormalised = json.dumps(any(row.renormalised for row in rows))
    quality = _describe(rows)
    figures = json.dumps(quality)
    checksum = _checksum(identifiers, columns, fingerprint, figures, renormalised)
    metadata = {
        "polystill.schema_version": str(SCHEMA_VERSION),
        "polystill.alignment": ALIGNMENT,
        "polystill.dtypes": json.dumps(DTYPES),
        "polystill.num_rows": str(len(rows)),
        "polystill.checksum": checksum,
        "polystill.fingerprint": fingerprint,
        "polystill.quality": figures,
        "polystill.renormalised": renormalised,
    }
    cells = {name: column.to_arrow() for name, column in columns.items()}
    table = pa.table(
        {"sequence_id": identifiers, **cells}, schema=CACHE_SCHEMA.with_metadata(metadata)
    )
    num_bytes = storage.write_table(path, table, use_dictionary=False, write_statistics=False)
    positions = [row.num_positions for row in rows]
    return _shard_entry(identifiers, positions, quality, checksum, num_bytes)


def read_shard(path: str) -> list[SparseLogprobs]:
    """Reads a shard and checks its schema version, row count and payload checksum.

    Raises:
        CorruptShardError: the shard is incomplete or was changed after it was written.
        CacheError: it has another schema version.
        StorageError: it is missing or cannot be read.
    """
    identifiers, columns, metadata = _read_columns(path)
    return _decode(identifiers, columns, metadata["polystill.renormalised"] == "true")


def describe_shard(path: str, num_bytes: int) -> ShardEntry:
    """The index entry of a shard, which is checked as in `read_shard`.

    Raises:
        CorruptShardError, CacheError, StorageError: as `read_shard`.
    """
    identifiers, columns, metadata = _read_columns(path)
    positions = np.diff(columns["num_entries"].starts).tolist()
    quality = json.loads(metadata["polystill.quality"])
    return _shard_entry(identifiers, positions, quality, metadata["polystill.checksum"], num_bytes)


def _read_columns(path: str) -> tuple[list[str], dict[str, _Column], dict[str, str]]:
    try:
        table = storage.read_table(path)
    except CorruptFileError as error:
        raise CorruptShardError(
            path, f"it is no complete Parquet file ({error.__cause__})"
        ) from error
    metadata = _metadata(path, table)
    if not table.schema.equals(CACHE_SCHEMA):
        raise CorruptShardError(path, f"its columns are {table.schema.names}")
    if str(table.num_rows) != metadata["polystill.num_rows"]:
        raise CorruptShardError(
            path,
            f"it holds {table.num_rows} rows, its header says {metadata['polystill.num_rows']}",
        )
    try:
        columns = {
            name: _Column.of_arrow(table.column(name).combine_chunks(), dtype)
            for name, dtype in DTYPES.items()
        }
    except ValueError as error:
        raise CorruptShardError(path, str(error)) from error
    identifiers = table.column("sequence_id").to_pylist()
    described = [metadata[f"polystill.{key}"] for key in ("fingerprint", "quality", "renormalised")]
    if _checksum(identifiers, columns, *described) != metadata["polystill.checksum"]:
        reason = "it fails its checksum: its content was changed after it was written"
        raise CorruptShardError(path, reason)
    return identifiers, columns, metadata


def _encode(rows: Sequence[SparseLogprobs]) -> dict[str, _Column]:
    columns = {}
    for name, dtype in DTYPES.items():
        attribute = "token_ids" if name in ID_PLANES else name
        arrays = [getattr(row, attribute) for row in rows]
        values = np.concatenate(arrays)
        if name in ID_PLANES:
            values = values >> 16 if name == "token_ids_high" else values & 0xFFFF
        starts = np.cumsum([0] + [len(array) for array in arrays], dtype=np.int64)
        columns[name] = _Column(values.astype(dtype), starts)
    return columns


def _decode(
    identifiers: list[str], columns: dict[str, _Column], renormalised: bool
) -> list[SparseLogprobs]:
    """Rows whose arrays are slices of whole decoded columns."""
    low, high = columns["token_ids_low"], columns["token_ids_high"]
    token_ids = low.values.astype(np.uint32)
    if high.values.any():
        token_ids |= high.values.astype(np.uint32) << 16
    whole = {name: column for name, column in columns.items() if name not in ID_PLANES}
    whole["token_ids"] = _Column(token_ids, low.starts)
    slices = {
        name: [c.values[a:b] for a, b in pairwise(c.starts.tolist())] for name, c in whole.items()
    }
    return [
        SparseLogprobs(
            sequence_id=identifier,
            renormalised=renormalised,
            **{name: parts[i] for name, parts in slices.items()},
        )
        for i, identifier in enumerate(identifiers)
    ]


def _checksum(identifiers: list[str], columns: dict[str, _Column], *described: str) -> str:
    """XXH3 of the payload and of what the metadata says about it.

    BLAKE2b would take longer than all else that reading does.
    """
    hasher = xxh3_128(digest_ids(identifiers).encode())
    for text in described:
        hasher.update(f"{len(text)}:{text}".encode())
    for column in columns.values():
        hasher.update(column.starts.astype("<i8").tobytes())
        hasher.update(column.values.data)
    return hasher.hexdigest()


def _describe(rows: Sequence[SparseLogprobs]) -> dict[str, float | int | None]:
    kept = 1 - np.concatenate([row.tail_mass for row in rows]).astype(np.float64)
    gold = np.concatenate([row.gold_logprobs for row in rows]).astype(np.float64)
    return {
        "num_positions": len(kept),
        "num_entries": sum(len(row.token_ids) for row in rows),
        "kept_mass": float(kept.mean()),
        "kept_mass_p01": float(np.quantile(kept, 0.01)),
        "gold_logprob": float(gold.mean()),
        "draw_variance": (
            float(np.concatenate([draw_variance(row) for row in rows]).mean())
            if any(row.is_drawn for row in rows)
            else None
        ),
    }


def _shard_entry(
    sequence_ids: list[str], positions: list[int], quality: dict, checksum: str, num_bytes: int
) -> ShardEntry:
    return ShardEntry(
        digest=digest_ids(sequence_ids),
        sequence_ids=tuple(sequence_ids),
        positions=tuple(positions),
        num_bytes=num_bytes,
        checksum=checksum,
        **quality,
    )


def _metadata(path: str, table: pa.Table) -> dict[str, str]:
    try:
        table.validate(full=True)
        metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise CorruptShardError(path, str(error)) from error
    if missing := METADATA_KEYS - metadata.keys():
        raise CorruptShardError(path, f"its metadata lacks {sorted(missing)}")
    version = metadata["polystill.schema_version"]
    if version != str(SCHEMA_VERSION):
        raise CacheError(
            f"{path} has cache schema version {version}, this program reads {SCHEMA_VERSION}"
        )
    return metadata
