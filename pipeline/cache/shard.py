"""Cache shards on disk: their writer and their reader.

A shard holds one teacher's distributions (`logprobs.py`) or its hidden states
(`hidden_states.py`), one row per sequence. Each array of a row is one binary cell of little-endian
numbers; a reader decodes a whole column at a time. The file's metadata explains the columns and the
alignment.

A shard file is the truth about itself. The index (`index.py`) and the manifest (`manifest.py`) are
derived from shards.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import pyarrow as pa
from xxhash import xxh3_128

from pipeline import storage
from pipeline.cache import hidden_states, logprobs
from pipeline.cache.columns import Column
from pipeline.cache.hidden_states import HiddenStatesFigures
from pipeline.cache.logprobs import DistributionFigures
from pipeline.errors import CacheError, CorruptFileError, CorruptShardError
from pipeline.fingerprint import digest_ids
from pipeline.messages import shorter
from pipeline.records import CacheRow, HiddenStates, SparseLogprobs

CONTENTS: dict[type, ModuleType] = {SparseLogprobs: logprobs, HiddenStates: hidden_states}
"""The module that knows the columns of each kind of row."""
METADATA_KEYS = {
    "polystill.schema_version",
    "polystill.num_rows",
    "polystill.checksum",
    "polystill.fingerprint",
    "polystill.quality",
}
CHECKED_KEYS = ("fingerprint", "quality", "origin")
"""Metadata keys that the checksum covers beside `FACTS`; `origin` is absent where unknown."""
ShardFigures = DistributionFigures | HiddenStatesFigures


@dataclass(frozen=True)
class ShardEntry:
    """Entry of one shard in the index.

    Attributes:
        digest: digest of the sequence ids, which is the file's name.
        positions: number of positions of each sequence.
        num_bytes: bytes of the file.
        checksum: checksum of the decoded payload and of the metadata about it.
        figures: quality of the rows.
        origin: description of the engine or the import that made the rows; None where the shard
            names none.
    """

    digest: str
    sequence_ids: tuple[str, ...]
    positions: tuple[int, ...]
    num_bytes: int
    checksum: str
    figures: ShardFigures
    origin: dict[str, Any] | None

    @property
    def num_positions(self) -> int:
        """Positions of all sequences."""
        return sum(self.positions)


@dataclass(frozen=True)
class Shard:
    """A shard that passed its checks.

    Attributes:
        content: module that knows the columns.
        identifiers: sequence ids of the rows.
        rows: decoded rows, of the shard's kind.
        fingerprint: hash of the identity that the rows were made under.
        checksum, figures, origin: as in `ShardEntry`.
    """

    content: ModuleType
    identifiers: list[str]
    rows: list[Any]
    fingerprint: str
    checksum: str
    figures: ShardFigures
    origin: dict[str, Any] | None

    def entry(self, num_bytes: int) -> ShardEntry:
        """Index entry of the shard, whose file has `num_bytes`."""
        return ShardEntry(
            digest=digest_ids(self.identifiers),
            sequence_ids=tuple(self.identifiers),
            positions=tuple(row.num_positions for row in self.rows),
            num_bytes=num_bytes,
            checksum=self.checksum,
            figures=self.figures,
            origin=self.origin,
        )


def write_shard(
    path: str,
    rows: Sequence[CacheRow],
    fingerprint: str,
    origin: dict[str, Any] | None = None,
) -> ShardEntry:
    """Encodes a shard in memory and writes it in one call.

    Args:
        rows: rows of one kind.
        fingerprint: hash of the identity that the rows were made under.
        origin: description of the engine or the import that made the rows, as a JSON value.

    Raises:
        CacheError: a row breaks an invariant of the format.
        StorageError: the disk is full, or the file cannot be written.
    """
    content = CONTENTS[type(rows[0])]
    content.check(rows)
    columns, facts = content.encode(rows), content.facts(rows)
    identifiers = [row.sequence_id for row in rows]
    figures = content.figures(rows)
    checked = {"fingerprint": fingerprint, "quality": json.dumps(asdict(figures))}
    checked |= ({} if origin is None else {"origin": json.dumps(origin)}) | facts
    checksum = _checksum(identifiers, columns, *checked.values())
    metadata = {
        "polystill.schema_version": str(content.SCHEMA_VERSION),
        "polystill.alignment": content.ALIGNMENT,
        "polystill.dtypes": json.dumps(content.DTYPES),
        "polystill.num_rows": str(len(rows)),
        "polystill.checksum": checksum,
        **{f"polystill.{key}": value for key, value in checked.items()},
    }
    cells = {name: column.to_arrow() for name, column in columns.items()}
    schema = _schema(content).with_metadata(metadata)
    table = pa.table({"sequence_id": identifiers, **cells}, schema=schema)
    num_bytes = storage.write_table(path, table, use_dictionary=False, write_statistics=False)
    return ShardEntry(
        digest=digest_ids(identifiers),
        sequence_ids=tuple(identifiers),
        positions=tuple(row.num_positions for row in rows),
        num_bytes=num_bytes,
        checksum=checksum,
        figures=figures,
        origin=origin,
    )


def read_shard(path: str) -> list[SparseLogprobs]:
    """Reads a shard of distributions and checks its schema version, row count and payload checksum.

    Raises:
        CorruptShardError: the shard is incomplete or was changed after it was written.
        CacheError: the shard has another schema version.
        StorageError: the shard is missing or cannot be read.
    """
    return _rows_of(path, logprobs)


def read_hidden_states(path: str) -> list[HiddenStates]:
    """Reads a shard of hidden states.

    Raises:
        CorruptShardError, CacheError, StorageError: see `read_shard`.
    """
    return _rows_of(path, hidden_states)


def figures_of(values: dict[str, Any]) -> ShardFigures:
    """Figures of a shard of either kind, from their JSON value."""
    if "mean_norm" in values:
        return HiddenStatesFigures(**values)
    return DistributionFigures(**values)


def read_shard_entry(path: str, num_bytes: int) -> ShardEntry:
    """Reads a shard, checks it like `read_shard`, and returns its index entry.

    Raises:
        CorruptShardError, CacheError, StorageError: see `read_shard`.
    """
    return open_shard(path).entry(num_bytes)


def _rows_of(path: str, content: ModuleType) -> list[Any]:
    shard = open_shard(path)
    if shard.content is not content:
        raise CorruptShardError(
            path, f"its columns are {list(shard.content.DTYPES)}, not {list(content.DTYPES)}"
        )
    return shard.rows


def open_shard(path: str) -> Shard:
    """Reads and checks a shard of either kind.

    Raises:
        CorruptShardError, CacheError, StorageError: see `read_shard`.
    """
    try:
        table = storage.read_table(path)
    except CorruptFileError as error:
        raise CorruptShardError(
            path, f"it is no complete Parquet file ({error.__cause__})"
        ) from error
    content, metadata = _metadata(path, table)
    if str(table.num_rows) != metadata["num_rows"]:
        raise CorruptShardError(
            path,
            f"it holds {table.num_rows} rows, but its metadata promises {metadata['num_rows']}",
        )
    if any(column.null_count for column in table.columns):
        raise CorruptShardError(path, "a cell has no value")
    try:
        columns = {
            name: Column.of_arrow(table.column(name).combine_chunks(), dtype)
            for name, dtype in content.DTYPES.items()
        }
    except ValueError as error:
        raise CorruptShardError(path, str(error)) from error
    identifiers = table.column("sequence_id").to_pylist()
    checked = [metadata[key] for key in (*CHECKED_KEYS, *content.FACTS) if key in metadata]
    if _checksum(identifiers, columns, *checked) != metadata["checksum"]:
        reason = "it fails its checksum: its content was changed after it was written"
        raise CorruptShardError(path, reason)
    try:
        return _decoded(content, identifiers, columns, metadata)
    except (ValueError, TypeError) as error:  # whoever wrote it knew the checksum, not the format
        raise CorruptShardError(path, f"it is no shard of polystill: {shorter(error)}") from error


def _decoded(
    content: ModuleType,
    identifiers: list[str],
    columns: dict[str, Column],
    metadata: dict[str, str],
) -> Shard:
    """The shard of checked columns.

    Raises:
        ValueError, TypeError: arrays or metadata do not fit each other.
    """
    if not identifiers:
        raise ValueError("it has no rows")
    facts = {key: metadata[key] for key in content.FACTS}
    rows = content.decode(identifiers, columns, facts)
    for row in rows:
        if problem := content.shape_problem(row):
            raise ValueError(f"sequence {row.sequence_id}: {problem}")
    return Shard(
        content=content,
        identifiers=identifiers,
        rows=rows,
        fingerprint=metadata["fingerprint"],
        checksum=metadata["checksum"],
        figures=figures_of(json.loads(metadata["quality"])),
        origin=json.loads(metadata.get("origin", "null")),
    )


def _schema(content: ModuleType) -> pa.Schema:
    return pa.schema(
        [("sequence_id", pa.string()), *((name, pa.binary()) for name in content.DTYPES)]
    )


def _checksum(identifiers: list[str], columns: Mapping[str, Column], *metadata: str) -> str:
    """XXH3 of the payload and of metadata values.

    BLAKE2b would take longer than all other steps of a reading together.
    """
    hasher = xxh3_128(digest_ids(identifiers).encode())
    for text in metadata:
        hasher.update(f"{len(text)}:{text}".encode())
    for column in columns.values():
        hasher.update(column.starts.astype("<i8").tobytes())
        hasher.update(column.values.data)
    return hasher.hexdigest()


def _metadata(path: str, table: pa.Table) -> tuple[ModuleType, dict[str, str]]:
    """Content of the shard, and its metadata, keys without their prefix."""
    try:
        metadata = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    except UnicodeDecodeError as error:
        raise CorruptShardError(path, str(error)) from error
    fits = [c for c in CONTENTS.values() if table.schema.equals(_schema(c))]
    facts = {f"polystill.{key}" for content in fits for key in content.FACTS}
    if missing := METADATA_KEYS.union(facts) - metadata.keys():
        raise CorruptShardError(path, f"its metadata lacks {sorted(missing)}")
    version = metadata["polystill.schema_version"]
    known = {str(content.SCHEMA_VERSION) for content in fits or CONTENTS.values()}
    if version not in known:
        raise CacheError(
            f"{path} has cache schema version {version}, but this program reads "
            f"{' or '.join(sorted(known))}: use the version of polystill that wrote it"
        )
    if not fits:
        raise CorruptShardError(path, f"its columns are {table.schema.names}")
    return fits[0], {key.removeprefix("polystill."): text for key, text in metadata.items()}
