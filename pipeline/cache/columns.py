"""Columns of a cache shard: one binary cell of little-endian numbers per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa

from pipeline.errors import CacheError

MOST_BYTES = 2**31 - 1
"""Bytes that one column can hold: Arrow's offsets are int32."""


@dataclass(frozen=True)
class Column:
    """The cells of one column, one after another: row i owns `values[starts[i]:starts[i + 1]]`."""

    values: np.ndarray
    starts: np.ndarray

    @classmethod
    def of_arrays(cls, arrays: Sequence[np.ndarray]) -> Column:
        """A column with one cell per array of numbers, which may have any shape."""
        starts = np.cumsum([0] + [array.size for array in arrays], dtype=np.int64)
        return cls(np.concatenate([array.ravel() for array in arrays]), starts)

    @classmethod
    def of_arrow(cls, cells: pa.Array, dtype: str) -> Column:
        """A view of the cells.

        Raises:
            ValueError: the bytes of the cells are not a whole number of values.
        """
        _, offsets, data = cells.buffers()
        edges = np.frombuffer(offsets, "<i4")[cells.offset : cells.offset + len(cells) + 1]
        payload = np.frombuffer(data or b"", np.uint8)[edges[0] : edges[-1]]
        size = np.dtype(dtype).itemsize
        if ((edges - edges[0]) % size).any():
            raise ValueError(f"a cell is no whole number of values of {size} bytes")
        return cls(payload.view(dtype), (edges.astype(np.int64) - edges[0]) // size)

    def to_arrow(self) -> pa.Array:
        """The cells as Arrow's `binary`.

        Raises:
            CacheError: the cells take 2 GiB or more together.
        """
        num_bytes = int(self.starts[-1]) * self.values.itemsize
        if num_bytes > MOST_BYTES:
            raise CacheError(
                f"a column of one shard would take {num_bytes} bytes and can hold {MOST_BYTES}: "
                "its sequences are too long for the bytes kept at each position; lower "
                "scoring.selection.max_entries or scoring.features.dimensions, name fewer layers, "
                "or leave such sequences out with synthesis.max_sequence_tokens"
            )
        edges = (self.starts * self.values.itemsize).astype("<i4")
        buffers = [None, pa.py_buffer(edges), pa.py_buffer(self.values)]
        return pa.Array.from_buffers(pa.binary(), len(edges) - 1, buffers)

    def cells(self) -> list[np.ndarray]:
        """A view of every row's cell."""
        return [self.values[a:b] for a, b in pairwise(self.starts.tolist())]
