"""Random access to the rows of one generation of a cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from pipeline.cache.index import load_index
from pipeline.cache.shard import read_hidden_states, read_shard
from pipeline.errors import CacheError
from pipeline.layout import CacheLayout
from pipeline.records import CacheRow, HiddenStates, SparseLogprobs

DECODED_BYTES_KEPT = 2**31
"""Bytes of decoded shards that a reader keeps; the shard used last stays whatever its size."""
Row = TypeVar("Row", bound=CacheRow)


class CacheReader(Generic[Row]):
    """Random access to the rows of one generation of a cache; keeps the last decoded shards."""

    def __init__(self, cache: CacheLayout, read: Callable[[str], list[Row]]) -> None:
        """Reads the index; `read` reads a shard of the cache's kind."""
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
            CacheError: the shard is corrupt, or holds another sequence at the place that the index
                gives.
        """
        if sequence_id not in self._place:
            return None
        digest, index = self._place[sequence_id]
        rows = self._rows(digest)
        held = rows[index].sequence_id if index < len(rows) else None
        if held != sequence_id:
            raise CacheError(
                f"{self._cache.shard(digest)} holds sequence {held} at row {index}, but its index "
                f"promises {sequence_id} there; `polystill cache regenerate CONFIG` rebuilds the "
                "index"
            )
        return rows[index]

    def _rows(self, digest: str) -> list[Row]:
        """The decoded rows of a shard, which becomes the last used one."""
        if digest in self._decoded:
            self._decoded.move_to_end(digest)
        else:
            self._decoded[digest] = self._read(self._cache.shard(digest))
            self._num_bytes += _num_bytes(self._decoded[digest])
            while self._num_bytes > DECODED_BYTES_KEPT and len(self._decoded) > 1:
                self._num_bytes -= _num_bytes(self._decoded.popitem(last=False)[1])
        return self._decoded[digest]


def _num_bytes(rows: Sequence[CacheRow]) -> int:
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
