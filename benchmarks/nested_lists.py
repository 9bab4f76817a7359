"""What `benchmarks/cache.py` compares with: the same rows as Parquet lists of lists.

One list of entries per position inside one list of positions per row, as a table library would have
it; whole columns on both ways, and no Python loop over positions or entries.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.records import SparseLogprobs

PER_POSITION = ("gold_logprobs", "tail_mass", "entropies")


def write_nested(path: str, rows: list[SparseLogprobs]) -> int:
    """Writes head entries alone; returns the bytes of the file."""
    positions = pa.array(_edges([row.num_positions for row in rows]))
    entries = pa.array(_edges(np.concatenate([row.num_entries for row in rows])))

    def per_entry(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(
            positions, pa.ListArray.from_arrays(entries, pa.array(values))
        )

    columns = {
        "sequence_id": pa.array([row.sequence_id for row in rows]),
        "token_ids": per_entry(np.concatenate([row.token_ids for row in rows])),
        "logprobs": per_entry(np.concatenate([row.logprobs for row in rows])),
    }
    for name in PER_POSITION:
        values = pa.array(np.concatenate([getattr(row, name) for row in rows]))
        columns[name] = pa.ListArray.from_arrays(positions, values)
    return storage.write_table(path, pa.table(columns))


def read_nested(path: str) -> list[SparseLogprobs]:
    """Reads what `write_nested` wrote to the same records."""
    table = storage.read_table(path)
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    starts = columns["token_ids"].offsets.to_numpy()
    inner = columns["token_ids"].values
    entry_starts = inner.offsets.to_numpy()
    num_entries = np.diff(entry_starts).astype(np.uint8)
    per_entry = {
        name: columns[name].values.values.to_numpy(zero_copy_only=False)
        for name in ("token_ids", "logprobs")
    }
    per_position = {
        name: columns[name].values.to_numpy(zero_copy_only=False) for name in PER_POSITION
    }
    return [
        SparseLogprobs(
            sequence_id=identifier,
            num_entries=num_entries[first:last],
            counts=np.zeros(0, np.uint8),
            **{n: v[entry_starts[first] : entry_starts[last]] for n, v in per_entry.items()},
            **{n: v[first:last] for n, v in per_position.items()},
        )
        for identifier, (first, last) in zip(
            columns["sequence_id"].to_pylist(), pairwise(starts.tolist()), strict=True
        )
    ]


def _edges(lengths: np.ndarray | list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
