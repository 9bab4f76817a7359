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

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.errors import CacheError, CorruptFileError, CorruptShardError
from pipeline.fingerprint import digest_bytes, digest_ids
from pipeline.records import SparseLogprobs

SCHEMA_VERSION = 1
ALIGNMENT = (
    "Position j of a row is the j-th token index i_j of the sequence's loss spans, in order. Its "
    "entries are the teacher's distribution over the token at index i_j given all tokens before "
    "it; input_ids[i_j] is the gold token. Student logits at index i_j - 1 are trained against "
    "position j. Log-probabilities are normalised over the full vocabulary at temperature 1. "
    "token_id = token_ids_low + 65536 * token_ids_high; position j owns num_entries[j] "
    "consecutive entries, descending."
)
DTYPES = {
    "num_entries": "<u1",
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
}
CACHE_SCHEMA = pa.schema([("sequence_id", pa.string()), *((name, pa.binary()) for name in DTYPES)])


@dataclass(frozen=True)
class ShardEntry:
    """What index and manifest keep of one shard.

    Attributes:
        digest: of the sequence ids; the file's name.
        positions: of each sequence.
        num_bytes: of the file.
        checksum: of the decoded payload and of what its metadata says about it.
        kept_mass: mean probability inside the kept entries, over positions.
        kept_mass_p01: its 1st percentile.
        gold_logprob: mean log-probability of the gold tokens in nats.
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


def write_shard(path: str, rows: Sequence[SparseLogprobs], fingerprint: str) -> ShardEntry:
    """Encodes a shard in memory and writes it in one call.

    Raises:
        CacheError: a row breaks an invariant of the format.
        StorageError: the disk is full or the place cannot be written.
    """
    columns = {name: [_encode(row, name) for row in rows] for name in DTYPES}
    identifiers = [row.sequence_id for row in rows]
    for row in rows:
        check_row(row)
    quality = _describe(rows)
    figures = json.dumps(quality)
    checksum = _checksum(identifiers, columns, fingerprint, figures)
    metadata = {
        "polystill.schema_version": str(SCHEMA_VERSION),
        "polystill.alignment": ALIGNMENT,
        "polystill.dtypes": json.dumps(DTYPES),
        "polystill.num_rows": str(len(rows)),
        "polystill.checksum": checksum,
        "polystill.fingerprint": fingerprint,
        "polystill.quality": figures,
    }
    table = pa.table(
        {"sequence_id": identifiers, **columns}, schema=CACHE_SCHEMA.with_metadata(metadata)
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
    identifiers, columns, _ = _read_columns(path)
    return [_decode(identifier, columns, i) for i, identifier in enumerate(identifiers)]


def describe_shard(path: str, num_bytes: int) -> ShardEntry:
    """The index entry of a shard, which is checked as in `read_shard`.

    Raises:
        CorruptShardError, CacheError, StorageError: as `read_shard`.
    """
    identifiers, columns, metadata = _read_columns(path)
    positions = [len(cell) for cell in columns["num_entries"]]
    quality = json.loads(metadata["polystill.quality"])
    return _shard_entry(identifiers, positions, quality, metadata["polystill.checksum"], num_bytes)


def _read_columns(path: str) -> tuple[list[str], dict[str, list[bytes]], dict[str, str]]:
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
    columns = {name: table.column(name).combine_chunks().to_pylist() for name in DTYPES}
    identifiers = table.column("sequence_id").to_pylist()
    described = metadata["polystill.fingerprint"], metadata["polystill.quality"]
    if _checksum(identifiers, columns, *described) != metadata["polystill.checksum"]:
        reason = "it fails its checksum: its content was changed after it was written"
        raise CorruptShardError(path, reason)
    return identifiers, columns, metadata


def check_row(row: SparseLogprobs) -> None:
    """Checks the invariants of one row.

    Raises:
        CacheError: lengths disagree, a value is not finite, entries are not descending, or mass
            exceeds 1.
    """
    starts = np.concatenate([[0], np.cumsum(row.num_entries, dtype=np.int64)])
    problem = None
    if starts[-1] != len(row.token_ids) or len(row.token_ids) != len(row.logprobs):
        problem = (
            f"{starts[-1]} entries counted, {len(row.token_ids)} ids, {len(row.logprobs)} "
            "log-probabilities"
        )
    elif (
        len({len(row.num_entries), len(row.gold_logprobs), len(row.tail_mass), len(row.entropies)})
        != 1
    ):
        problem = "per-position arrays have different lengths"
    elif not all(
        np.isfinite(a).all()
        for a in (row.logprobs, row.gold_logprobs, row.tail_mass, row.entropies)
    ):
        problem = "a value is not finite"
    elif len(row.num_entries) and row.num_entries.min() < 1:
        problem = "a position has no entries"
    else:
        steps = np.diff(row.logprobs.astype(np.float32))
        inside = np.ones(len(steps), dtype=bool)
        inside[starts[1:-1] - 1] = False
        mass = (
            np.add.reduceat(np.exp(row.logprobs.astype(np.float32)), starts[:-1])
            if len(starts) > 1
            else np.zeros(1)
        )
        if (steps[inside] > 0).any():
            problem = "entries are not in descending order"
        elif mass.max() > 1.01:
            problem = f"kept mass reaches {mass.max():.4f}"
    if problem:
        raise CacheError(f"sequence {row.sequence_id}: {problem}")


def _encode(row: SparseLogprobs, name: str) -> bytes:
    if name == "token_ids_low":
        return (row.token_ids & 0xFFFF).astype("<u2").tobytes()
    if name == "token_ids_high":
        return (row.token_ids >> 16).astype("<u1").tobytes()
    return getattr(row, name).astype(DTYPES[name]).tobytes()


def _decode(sequence_id: str, columns: dict[str, list[bytes]], i: int) -> SparseLogprobs:
    arrays = {name: np.frombuffer(columns[name][i], dtype=dtype) for name, dtype in DTYPES.items()}
    low, high = arrays.pop("token_ids_low"), arrays.pop("token_ids_high")
    return SparseLogprobs(
        sequence_id=sequence_id,
        token_ids=low.astype(np.uint32) | (high.astype(np.uint32) << 16),
        **arrays,
    )


def _checksum(identifiers: list[str], columns: dict[str, list[bytes]], *described: str) -> str:
    """Hash of the decoded payload and of what the metadata says about it."""
    return digest_bytes(
        digest_ids(identifiers).encode(),
        *(cell for name in DTYPES for cell in columns[name]),
        *(text.encode() for text in described),
    )


def _describe(rows: Sequence[SparseLogprobs]) -> dict[str, float | int]:
    kept = 1 - np.concatenate([row.tail_mass for row in rows]).astype(np.float64)
    gold = np.concatenate([row.gold_logprobs for row in rows]).astype(np.float64)
    return {
        "num_positions": len(kept),
        "num_entries": sum(len(row.token_ids) for row in rows),
        "kept_mass": float(kept.mean()),
        "kept_mass_p01": float(np.quantile(kept, 0.01)),
        "gold_logprob": float(gold.mean()),
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
