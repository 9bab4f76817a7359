"""What `benchmarks/cache.py` compares with: the same rows as Parquet lists of lists.

One list of entries per position inside one list of positions per row. Two ways lead from there to
numpy: row by row through Python's lists, as loaders over rows of a table go, and whole columns
flattened at once, the fastest that Arrow can do with this layout.
"""

from __future__ import annotations

from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.records import SparseLogprobs

PER_ENTRY = {"token_ids": np.uint32, "logprobs": np.float16}
PER_POSITION = dict.fromkeys(("gold_logprobs", "tail_mass", "entropies"), np.float16)
NOTHING = np.zeros(0, np.uint8)


def write_nested(path: str, rows: list[SparseLogprobs]) -> int:
    """Writes head entries alone, whole columns at once; returns the bytes of the file."""
    positions = pa.array(_edges([row.num_positions for row in rows]))
    entries = pa.array(_edges(np.concatenate([row.num_entries for row in rows])))
    columns: dict[str, Any] = {"sequence_id": pa.array([row.sequence_id for row in rows])}
    for name in [*PER_ENTRY, *PER_POSITION]:
        values = pa.array(np.concatenate([getattr(row, name) for row in rows]))
        if name in PER_ENTRY:
            values = pa.ListArray.from_arrays(entries, values)
        columns[name] = pa.ListArray.from_arrays(positions, values)
    return storage.write_table(path, pa.table(columns))


def read_by_rows(path: str) -> list[SparseLogprobs]:
    """Reads what `write_nested` wrote, each list through Python."""
    return [
        SparseLogprobs(
            sequence_id=row["sequence_id"],
            num_entries=np.array([len(entries) for entries in row["token_ids"]], np.uint8),
            counts=NOTHING,
            **{
                name: np.array(list(chain.from_iterable(row[name])), dtype)
                for name, dtype in PER_ENTRY.items()
            },
            **{name: np.array(row[name], dtype) for name, dtype in PER_POSITION.items()},
        )
        for row in storage.read_table(path).to_pylist()
    ]


def read_flattened(path: str) -> list[SparseLogprobs]:
    """Reads what `write_nested` wrote; rows are slices of flattened columns."""
    table = storage.read_table(path)
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    starts = columns["token_ids"].offsets.to_numpy()
    edges = columns["token_ids"].values.offsets.to_numpy()
    per_entry = {name: columns[name].values.values.to_numpy() for name in PER_ENTRY}
    per_position = {name: columns[name].values.to_numpy() for name in PER_POSITION}
    num_entries = np.diff(edges).astype(np.uint8)
    return [
        SparseLogprobs(
            sequence_id=identifier,
            num_entries=num_entries[first:last],
            counts=NOTHING,
            **{name: values[edges[first] : edges[last]] for name, values in per_entry.items()},
            **{name: values[first:last] for name, values in per_position.items()},
        )
        for identifier, (first, last) in zip(
            columns["sequence_id"].to_pylist(), pairwise(starts.tolist()), strict=True
        )
    ]


def _edges(lengths: np.ndarray | list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
