"""A long Parquet table of cache rows, one line per entry, for analysis with any tool.

Legend: N entries of all positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.cache.selection import probabilities
from pipeline.records import SparseLogprobs, TokenSequence

SEQUENCES_PER_FILE = 256
LONG_SCHEMA = pa.schema(
    [
        ("sequence_id", pa.string()),
        ("domain", pa.string()),
        ("position", pa.int32()),
        ("token_index", pa.int32()),
        ("gold_token_id", pa.int32()),
        ("gold_logprob", pa.float32()),
        ("tail_mass", pa.float32()),
        ("entropy", pa.float32()),
        ("rank", pa.int32()),
        ("token_id", pa.int32()),
        ("logprob", pa.float32()),
        ("count", pa.int32()),
        ("probability", pa.float32()),
    ]
)
Scored = tuple[TokenSequence, SparseLogprobs]
"""A sequence and a teacher's row for it."""


def export_long(scored: Iterable[Scored], folder: str) -> int:
    """Writes one line per entry; returns the number of sequences.

    Exact entries have a `logprob`, drawn entries a `count`; `probability` is the probability that
    training gives an entry of either kind.
    """
    return write_files(scored, folder, _long_table)


def write_files(
    scored: Iterable[Scored], folder: str, table_of: Callable[[Sequence[Scored]], pa.Table]
) -> int:
    """Writes tables of many sequences each as `data_<number>.parquet`; returns the number of
    sequences.
    """
    remaining, number, written = iter(scored), 0, 0
    while batch := list(islice(remaining, SEQUENCES_PER_FILE)):
        path = storage.join(folder, f"data_{number}.parquet")
        storage.write_table(path, table_of(batch))
        number, written = number + 1, written + len(batch)
    return written


def _long_table(batch: Sequence[Scored]) -> pa.Table:
    return pa.concat_tables([_long_rows(sequence, row) for sequence, row in batch])


def _long_rows(sequence: TokenSequence, row: SparseLogprobs) -> pa.Table:
    counts = row.num_entries.astype(np.int64)
    positions = np.repeat(np.arange(row.num_positions), counts)
    starts = np.cumsum(counts) - counts
    exact_N = row.is_exact_N
    logprobs_N, counts_N = np.zeros(len(exact_N), np.float32), np.zeros(len(exact_N), np.int32)
    logprobs_N[exact_N], counts_N[~exact_N] = row.logprobs, row.counts
    columns = {
        "sequence_id": [sequence.sequence_id] * len(positions),
        "domain": [sequence.domain] * len(positions),
        "position": positions,
        "token_index": sequence.position_indices[positions],
        "gold_token_id": sequence.gold_ids[positions],
        "gold_logprob": row.gold_logprobs[positions].astype(np.float32),
        "tail_mass": row.tail_mass[positions].astype(np.float32),
        "entropy": row.entropies[positions].astype(np.float32),
        "rank": np.arange(len(positions)) - starts[positions],
        "token_id": row.token_ids.astype(np.int32),
        "logprob": pa.array(logprobs_N, mask=~exact_N),
        "count": pa.array(counts_N, mask=exact_N),
        "probability": probabilities(row),
    }
    arrays = [pa.array(columns[f.name]).cast(f.type) for f in LONG_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=LONG_SCHEMA)
