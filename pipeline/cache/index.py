"""A cache as a whole: its index, its manifest, and random access to its rows.

Index and manifest are derived from the shards and can be rebuilt at any time: whoever opens a cache
lists the shard files and trusts the index only for those that it finds with the size that it names;
a shard that the index does not know is read whole and checked. Nobody needs a lock, since all
writers of one shard write the same thing.

Shards may overlap: two jobs at once may group the sequences that they both lack differently, and
halves of a shard may meet the whole. Every sequence then counts once and has one row, that of the
first shard in name order that holds it; all such rows are right, for they share a recipe.
"""

from __future__ import annotations

import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import asdict
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.cache.generations import current_generation
from pipeline.cache.shard import ShardEntry, describe_shard, read_hidden_states, read_shard
from pipeline.errors import CacheError, CorruptFileError, CorruptShardError
from pipeline.layout import CacheLayout
from pipeline.records import CacheRow, DatasetEntry, HiddenStates, SparseLogprobs

logger = logging.getLogger(__name__)

DECODED_BYTES_KEPT = 2**31
"""Of the shards that a reader used last; the very last one stays whatever its size."""
Row = TypeVar("Row", bound=CacheRow)


def load_index(
    cache: CacheLayout,
    written: Container[str] = (),
    corrupt: list[CorruptShardError] | None = None,
) -> list[ShardEntry]:
    """The entries of a generation's complete shards, in name order.

    A shard without an entry, or of another size than its entry says, is read and checked.

    Args:
        written: digests of shards that are described anew, whatever the index says of them.
        corrupt: takes what shards do not pass their checks, which then have no entry.

    Raises:
        CorruptShardError: such a shard does not pass its checks, and `corrupt` is not given.
        StorageError: it cannot be read.
    """
    known = {e.digest: e for e in read_index(cache) or () if e.digest not in written}
    entries = []
    for digest, num_bytes in _shard_files(cache).items():
        entry = known.get(digest)
        if entry is None or entry.num_bytes != num_bytes:
            try:
                entry = describe_shard(cache.shard(digest), num_bytes)
            except CorruptShardError as error:
                if corrupt is None:
                    raise
                corrupt.append(error)
                continue
        entries.append(entry)
    return entries


def publish(
    cache: CacheLayout,
    recipe: dict[str, Any],
    provenance: dict[str, Any],
    written: Container[str] = (),
) -> dict[str, Any]:
    """Writes index and manifest from the shards that exist; returns the manifest.

    The manifest names the newest complete generation: one older than that gets its index alone.
    Several jobs may publish one cache at once: each reads again what lies there after it has
    written, so that the last one to write leaves index and manifest of every shard.

    Args:
        provenance: what the manifest says of the teacher, beside the engines that shards name.
        written: digests of shards that the caller wrote: the index may know others of these names,
            even of the same size.

    Raises:
        CorruptShardError: as `load_index`.
    """
    while True:
        entries = load_index(cache, written)
        _write_index(cache, entries)
        manifest = {
            "recipe": recipe,
            "generation": cache.generation,
            "provenance": provenance | {"engines": origins(entries)},
            "totals": totals(entries),
        }
        if cache.generation >= current_generation(cache.folder):
            storage.write_json(cache.manifest, manifest)
        if is_published(cache):
            return manifest


def is_published(cache: CacheLayout) -> bool:
    """Whether the index has exactly the shards that exist, and the manifest what the index says."""
    entries = read_index(cache)
    if entries is None or [entry.digest for entry in entries] != list(_shard_files(cache)):
        return False
    return storage.exists(cache.manifest) and manifest_fits(cache, entries)


def manifest_fits(cache: CacheLayout, entries: list[ShardEntry]) -> bool:
    """Whether the manifest has the totals and engines of an index, or is about another
    generation.
    """
    manifest = storage.read_json(cache.manifest)
    if manifest["generation"] != cache.generation:
        return True
    if manifest["provenance"]["engines"] != origins(entries):
        return False
    found, expected = manifest["totals"], totals(entries)
    # Sums are added in another order on other machines.
    return found.keys() == expected.keys() and all(
        math.isclose(found[name], expected[name], rel_tol=1e-12) for name in expected
    )


def origins(entries: Iterable[ShardEntry]) -> list[dict[str, Any]]:
    """Whatever made the rows, each once, in the order of the shards."""
    found = {json.dumps(entry.origin): entry.origin for entry in entries}
    return [origin for origin in found.values() if origin is not None]


def totals(entries: list[ShardEntry]) -> dict[str, float]:
    """Sums over sequences, each counted once, where its row is read; bytes and masked gold tokens
    are those of all shards.

    Qualities are means over positions, a shard's mean standing for each of its sequences;
    `kept_mass_p01` is the worst shard's.
    """
    counted: dict[str, int] = {}
    weights = np.zeros(len(entries))
    for i, entry in enumerate(entries):
        for identifier, num_positions in zip(entry.sequence_ids, entry.positions, strict=True):
            if identifier not in counted:
                counted[identifier] = num_positions
                weights[i] += num_positions
    num_positions = int(weights.sum())
    num_bytes = sum(entry.num_bytes for entry in entries)
    sizes: dict[str, float] = {
        "num_shards": len(entries),
        "num_sequences": len(counted),
        "num_positions": num_positions,
        "num_bytes": num_bytes,
    }
    if num_positions == 0:
        return sizes
    weights /= num_positions
    sizes["bytes_per_token"] = num_bytes / num_positions
    names = entries[0].figures.keys() - {"num_masked_gold"}
    shards = {name: [entry.figures[name] for entry in entries] for name in names}
    if "mean_norm" in shards:
        return sizes | {"mean_norm": float(weights @ shards["mean_norm"])}
    kept_mass = float(weights @ shards["kept_mass"])
    density = np.divide(shards["num_entries"], shards["num_positions"])
    return sizes | {
        "entries_per_position": float(weights @ density),
        "kept_mass": kept_mass,
        "kept_mass_p01": min(shards["kept_mass_p01"]),
        **_losses(shards["draw_variance"], weights, kept_mass),
        "gold_logprob": float(weights @ shards["gold_logprob"]),
        "num_masked_gold": sum(entry.figures.get("num_masked_gold", 0) for entry in entries),
    }


def _losses(
    variances: list[float | None], weights: np.ndarray, kept_mass: float
) -> dict[str, float]:
    """What the selection costs: nats of the mass in buckets, or mass and variance of the draws."""
    if None in variances:
        return {"tail_nats": float(-np.log(kept_mass))}
    return {
        "lost_mass": 1 - kept_mass,
        "draw_variance": float(weights @ np.array(variances)),
    }


class CacheReader(Generic[Row]):
    """Random access to the rows of one generation of a cache; keeps the last decoded shards."""

    def __init__(self, cache: CacheLayout, read: Callable[[str], list[Row]]) -> None:
        """`read` reads a shard of the cache's kind."""
        self._cache, self._read = cache, read
        self._place: dict[str, tuple[str, int]] = {}
        for entry in load_index(cache):
            for row, identifier in enumerate(entry.sequence_ids):
                self._place.setdefault(identifier, (entry.digest, row))
        self._decoded: OrderedDict[str, list[Row]] = OrderedDict()
        self._num_bytes = 0

    def __contains__(self, sequence_id: str) -> bool:
        return sequence_id in self._place

    def row(self, sequence_id: str) -> Row | None:
        """The teacher's row for a sequence, or None when it was never scored.

        Raises:
            CacheError: the shard holds another sequence where the index says, or is corrupt.
        """
        if sequence_id not in self._place:
            return None
        digest, index = self._place[sequence_id]
        if digest in self._decoded:
            self._decoded.move_to_end(digest)
        else:
            self._decoded[digest] = self._read(self._cache.shard(digest))
            self._num_bytes += _bytes_of(self._decoded[digest])
            while self._num_bytes > DECODED_BYTES_KEPT and len(self._decoded) > 1:
                self._num_bytes -= _bytes_of(self._decoded.popitem(last=False)[1])
        found = self._decoded[digest][index]
        if found.sequence_id != sequence_id:
            raise CacheError(
                f"{self._cache.shard(digest)} row {index} holds {found.sequence_id}, not "
                f"{sequence_id}"
            )
        return found


def _bytes_of(rows: Sequence[CacheRow]) -> int:
    arrays = (value for row in rows for value in vars(row).values())
    return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))


def open_cache(cache: CacheLayout) -> CacheReader[SparseLogprobs]:
    """Opens one generation of a cache of distributions for reading.

    Raises:
        StorageError: a shard cannot be read.
    """
    return CacheReader(cache, read_shard)


def open_hidden_states(cache: CacheLayout) -> CacheReader[HiddenStates]:
    """Opens one generation of a cache of hidden states for reading.

    Raises:
        StorageError: a shard cannot be read.
    """
    return CacheReader(cache, read_hidden_states)


def quarantined(cache: CacheLayout) -> dict[str, str]:
    """The sequences that could not be scored and the error of each."""
    files = storage.list_files(cache.quarantine, ".json")
    records = [
        json.loads(storage.read_bytes(storage.join(cache.quarantine, info.base_name)))
        for info in files
    ]
    return {record["sequence_id"]: record["error"] for record in records}


def forget_quarantined(cache: CacheLayout, sequence_ids: Collection[str]) -> int:
    """Makes those of the sequences missing that were quarantined; returns how many they are."""
    found = [identifier for identifier in quarantined(cache) if identifier in sequence_ids]
    for identifier in found:
        storage.remove(storage.join(cache.quarantine, f"{identifier}.json"))
    return len(found)


def missing_sequences(entries: Iterable[DatasetEntry], cache: CacheLayout) -> list[DatasetEntry]:
    """The sequences of a dataset that a cache has neither scored nor quarantined."""
    scored = {identifier for entry in load_index(cache) for identifier in entry.sequence_ids}
    refused = quarantined(cache)
    return [
        entry
        for entry in entries
        if entry.sequence_id not in scored and entry.sequence_id not in refused
    ]


_INDEX_SCHEMA = pa.schema(
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


def _write_index(cache: CacheLayout, entries: list[ShardEntry]) -> None:
    rows = [
        asdict(e) | {"figures": json.dumps(e.figures), "origin": json.dumps(e.origin)}
        for e in entries
    ]
    storage.write_table(cache.index, pa.Table.from_pylist(rows, schema=_INDEX_SCHEMA))


def _shard_files(cache: CacheLayout) -> dict[str, int]:
    """Digest and bytes of every shard that exists, in name order."""
    files = storage.list_files(cache.shards_folder, ".parquet")
    return {info.base_name.removesuffix(".parquet"): info.size for info in files}


def read_index(cache: CacheLayout) -> list[ShardEntry] | None:
    """The index as it was written, whether or not its shards still exist.

    Empty when there is none, and None when there is one that cannot be used: it is made again.
    """
    if not storage.exists(cache.index):
        return []
    try:
        table = storage.read_table(cache.index)
    except CorruptFileError as error:
        logger.warning("%s; it is made again from the shards", error)
        return None
    if not table.schema.equals(_INDEX_SCHEMA):
        return None
    return [
        ShardEntry(
            **row
            | {name: tuple(row[name]) for name in ("sequence_ids", "positions")}
            | {name: json.loads(row[name]) for name in ("figures", "origin")}
        )
        for row in table.to_pylist()
    ]
