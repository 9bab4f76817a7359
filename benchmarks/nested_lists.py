"""What `benchmarks/cache.py` compares with: the same rows as Parquet lists of lists.

One list per position inside one list of positions per row. Of `numbers`, as a table library would
have it, or of `bytes`, as projects that pack their entries have it (`list<list<uint8>>`): 3 of them
an id and 2 a log-probability. Whole columns both ways, no Python loop over positions or entries.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.records import SparseLogprobs

PER_POSITION = ("gold_logprobs", "tail_mass", "entropies")


def write_nested(path: str, rows: list[SparseLogprobs], *, as_bytes: bool) -> int:
    """Writes head entries alone; returns the bytes of the file."""
    positions = pa.array(_edges([row.num_positions for row in rows]))
    entries = _edges(np.concatenate([row.num_entries for row in rows]))
    token_ids = np.concatenate([row.token_ids for row in rows])
    logprobs = np.concatenate([row.logprobs for row in rows])
    sizes = (1, 1)
    if as_bytes:
        token_ids = token_ids.view(np.uint8).reshape(-1, 4)[:, :3].ravel()
        logprobs, sizes = logprobs.view(np.uint8), (3, 2)

    def per_entry(values: np.ndarray, size: int) -> pa.Array:
        inner = pa.ListArray.from_arrays(pa.array(entries * size), pa.array(values))
        return pa.ListArray.from_arrays(positions, inner)

    columns = {
        "sequence_id": pa.array([row.sequence_id for row in rows]),
        "token_ids": per_entry(token_ids, sizes[0]),
        "logprobs": per_entry(logprobs, sizes[1]),
    }
    for name in PER_POSITION:
        values = pa.array(np.concatenate([getattr(row, name) for row in rows]))
        columns[name] = pa.ListArray.from_arrays(positions, values)
    return storage.write_table(path, pa.table(columns))


def read_nested(path: str, *, as_bytes: bool) -> list[SparseLogprobs]:
    """Reads what `write_nested` wrote to the same records."""
    table = storage.read_table(path)
    columns = {name: table.column(name).combine_chunks() for name in table.column_names}
    starts = columns["token_ids"].offsets.to_numpy()
    token_ids, logprobs = (
        columns[name].values.values.to_numpy(zero_copy_only=False)
        for name in ("token_ids", "logprobs")
    )
    edges = columns["logprobs"].values.offsets.to_numpy()
    if as_bytes:
        wide = np.zeros((len(token_ids) // 3, 4), np.uint8)
        wide[:, :3] = token_ids.reshape(-1, 3)
        token_ids, logprobs, edges = wide.view("<u4").ravel(), logprobs.view("<f2"), edges // 2
    num_entries = np.diff(edges).astype(np.uint8)
    per_position = {
        name: columns[name].values.to_numpy(zero_copy_only=False) for name in PER_POSITION
    }
    return [
        SparseLogprobs(
            sequence_id=identifier,
            num_entries=num_entries[first:last],
            token_ids=token_ids[edges[first] : edges[last]],
            logprobs=logprobs[edges[first] : edges[last]],
            counts=np.zeros(0, np.uint8),
            **{name: values[first:last] for name, values in per_position.items()},
        )
        for identifier, (first, last) in zip(
            columns["sequence_id"].to_pylist(), pairwise(starts.tolist()), strict=True
        )
    ]


def _edges(lengths: np.ndarray | list[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
