"""The index of a cache: which sequences each shard holds, which sequences it lacks or refuses.

The index is derived from the shards and can be rebuilt at any time. Every reader of a cache lists
the shard files, and trusts the index about a shard only if the file has the size that the index
names; a shard that the index does not know is read whole and checked.

Shards may overlap: two jobs at once may group the sequences that they both lack differently, and
halves of a shard may meet the whole. Every sequence then counts once and has one row, which is read
from the first shard in name order that holds it; all such rows are right, for they share an
identity.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Container, Iterable
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from typing_extensions import TypedDict

from pipeline import storage
from pipeline.cache.shard import ShardEntry, figures_of, read_shard_entry
from pipeline.errors import CorruptFileError, CorruptShardError
from pipeline.layout import CacheLayout
from pipeline.records import DatasetEntry

logger = logging.getLogger(__name__)

NOTE_REMEDY = "remove it, and its sequence is scored again"


class QuarantineNote(TypedDict):
    """Sequence that could not be scored, and the error."""

    sequence_id: str
    error: str


INDEX_SCHEMA = pa.schema(
    [
        ("digest", pa.string()),
        ("sequence_ids", pa.list_(pa.string())),
        ("positions", pa.list_(pa.int64())),
        ("num_bytes", pa.int64()),
        ("checksum", pa.string()),
        ("figures", pa.string()),
        ("origin", pa.string()),
    ]
)


def load_index(
    cache: CacheLayout,
    written: Container[str] = (),
    corrupt: list[CorruptShardError] | None = None,
) -> list[ShardEntry]:
    """The entries of a generation's complete shards, in name order.

    A shard without an entry, or of another size than its entry says, is read and checked.

    Args:
        written: digests of shards that are read anew, whatever the index says about them.
        corrupt: list that takes the error of every shard that fails its checks; such a shard has
            no entry.

    Raises:
        CorruptShardError: a shard fails its checks, and `corrupt` is not given.
        StorageError: a shard cannot be read.
    """
    known = {e.digest: e for e in read_index(cache) or () if e.digest not in written}
    entries = []
    for digest, num_bytes in shard_files(cache).items():
        entry = known.get(digest)
        if entry is None or entry.num_bytes != num_bytes:
            try:
                entry = read_shard_entry(cache.shard(digest), num_bytes)
            except CorruptShardError as error:
                if corrupt is None:
                    raise
                corrupt.append(error)
                continue
        entries.append(entry)
    return entries


def read_index(cache: CacheLayout) -> list[ShardEntry] | None:
    """The index as it was written, whether or not its shards still exist.

    Empty when there is no index, and None when there is one that cannot be used: the next
    publication rebuilds it.
    """
    if not storage.exists(cache.index):
        return []
    try:
        table = storage.read_table(cache.index)
    except CorruptFileError as error:
        logger.warning("%s; the index is rebuilt from the shards", error)
        return None
    if not table.schema.equals(INDEX_SCHEMA):
        return None
    try:
        return [_entry(row) for row in table.to_pylist()]
    except (ValueError, TypeError) as error:
        logger.warning("%s is damaged (%s); it is rebuilt from the shards", cache.index, error)
        return None


def _entry(row: dict[str, Any]) -> ShardEntry:
    return ShardEntry(
        digest=row["digest"],
        sequence_ids=tuple(row["sequence_ids"]),
        positions=tuple(row["positions"]),
        num_bytes=row["num_bytes"],
        checksum=row["checksum"],
        figures=figures_of(json.loads(row["figures"])),
        origin=json.loads(row["origin"]),
    )


def write_index(cache: CacheLayout, entries: Iterable[ShardEntry]) -> None:
    """Writes the entries as the index of a generation."""
    rows = [
        asdict(e) | {"figures": json.dumps(asdict(e.figures)), "origin": json.dumps(e.origin)}
        for e in entries
    ]
    storage.write_table(cache.index, pa.Table.from_pylist(rows, schema=INDEX_SCHEMA))


def shard_files(cache: CacheLayout) -> dict[str, int]:
    """Digest and bytes of every shard that exists, in name order."""
    files = storage.list_files(cache.shards_folder, ".parquet")
    return {info.base_name.removesuffix(".parquet"): info.size for info in files}


def quarantined(cache: CacheLayout) -> dict[str, str]:
    """The sequences that could not be scored, each with its error."""
    files = storage.list_files(cache.quarantine, ".json")
    paths = (storage.join(cache.quarantine, info.base_name) for info in files)
    notes = [storage.read_json(path, QuarantineNote, NOTE_REMEDY) for path in paths]
    return {note["sequence_id"]: note["error"] for note in notes}


def forget_quarantined(cache: CacheLayout, sequence_ids: Collection[str]) -> int:
    """Removes the quarantine notes of the sequences, which are missing from then on; returns how
    many notes there were.
    """
    identifiers = [identifier for identifier in quarantined(cache) if identifier in sequence_ids]
    for identifier in identifiers:
        storage.remove(cache.quarantine_record(identifier))
    return len(identifiers)


def missing_sequences(entries: Iterable[DatasetEntry], cache: CacheLayout) -> list[DatasetEntry]:
    """The sequences of a dataset that a cache has neither scored nor quarantined."""
    scored = {identifier for entry in load_index(cache) for identifier in entry.sequence_ids}
    refused = quarantined(cache)
    return [
        entry
        for entry in entries
        if entry.sequence_id not in scored and entry.sequence_id not in refused
    ]
