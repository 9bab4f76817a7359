"""Sequence shards, and the dataset: the ordered list of the sequences that a run trains on.

A sequence shard is immutable and holds sequences of one domain: one Parquet row for each sequence,
arrays as binary cells of little-endian numbers. A dataset names sequences and the shard of each.
Filters make a new dataset and never touch a shard. The columns called `generators` hold the authors
of a sequence.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.fingerprint import digest_ids, digest_json
from pipeline.layout import Layout
from pipeline.records import DatasetEntry, TokenSequence

SHARDS_KEPT = 16
"""Sequence shards that a `SequenceReader` keeps in memory."""
SEQUENCE_SCHEMA = pa.schema(
    [
        ("sequence_id", pa.string()),
        ("prompt_id", pa.string()),
        ("domain", pa.string()),
        ("generators", pa.list_(pa.string())),
        ("finish_reason", pa.string()),
        ("input_ids", pa.binary()),
        ("loss_spans", pa.binary()),
    ],
    metadata={
        "polystill.schema_version": "1",
        "polystill.dtypes": (
            '{"input_ids": "<i4[T]", "loss_spans": "<i4[S,2] half-open token ranges"}'
        ),
    },
)
DATASET_SCHEMA = pa.schema(
    [
        ("sequence_id", pa.string()),
        ("prompt_id", pa.string()),
        ("domain", pa.string()),
        ("split", pa.string()),
        ("generators", pa.list_(pa.string())),
        ("shard", pa.string()),
        ("num_tokens", pa.int32()),
        ("num_positions", pa.int32()),
    ],
    metadata={"polystill.schema_version": "1"},
)


def write_sequences(layout: Layout, domain: str, sequences: Sequence[TokenSequence]) -> str:
    """Writes a sequence shard of one domain; returns its path relative to the storage root."""
    table = pa.table(
        {
            "sequence_id": [s.sequence_id for s in sequences],
            "prompt_id": [s.prompt_id for s in sequences],
            "domain": [s.domain for s in sequences],
            "generators": [list(s.authors) for s in sequences],
            "finish_reason": [s.finish_reason for s in sequences],
            "input_ids": [s.input_ids.astype("<i4").tobytes() for s in sequences],
            "loss_spans": [np.asarray(s.loss_spans, dtype="<i4").tobytes() for s in sequences],
        },
        schema=SEQUENCE_SCHEMA,
    )
    digest = digest_ids(
        [s.sequence_id for s in sequences] + [name for s in sequences for name in s.authors]
    )
    path = storage.join(layout.sequences_folder(domain), f"{digest}.parquet")
    storage.write_table(path, table)
    return path[len(layout.root.rstrip("/")) + 1 :]


def read_sequences(path: str) -> list[TokenSequence]:
    """Reads all sequences of a shard.

    Raises:
        StorageError: the shard is missing or corrupt.
    """
    return [
        TokenSequence(
            sequence_id=row["sequence_id"],
            input_ids=np.frombuffer(row["input_ids"], dtype="<i4"),
            loss_spans=tuple(
                (int(a), int(b)) for a, b in np.frombuffer(row["loss_spans"], "<i4").reshape(-1, 2)
            ),
            prompt_id=row["prompt_id"],
            domain=row["domain"],
            authors=tuple(row["generators"]),
            finish_reason=row["finish_reason"],
        )
        for row in storage.read_table(path).to_pylist()
    ]


def write_dataset(layout: Layout, entries: Iterable[DatasetEntry]) -> str:
    """Writes a dataset under the digest of its content; returns the digest."""
    rows = [_row(entry) for entry in entries]
    digest = digest_json(
        [
            [row["sequence_id"], row["domain"], row["split"], row["generators"], row["shard"]]
            for row in rows
        ]
    )
    if not storage.exists(layout.dataset(digest)):
        storage.write_table(
            layout.dataset(digest), pa.Table.from_pylist(rows, schema=DATASET_SCHEMA)
        )
    return digest


def _row(entry: DatasetEntry) -> dict[str, Any]:
    values = {name: value for name, value in vars(entry).items() if name != "authors"}
    return values | {"generators": list(entry.authors)}


def read_dataset(layout: Layout, digest: str) -> list[DatasetEntry]:
    """Reads the dataset of a digest.

    Raises:
        StorageError: the dataset is missing or corrupt.
    """
    rows = storage.read_table(layout.dataset(digest)).to_pylist()
    return [DatasetEntry(authors=tuple(row.pop("generators")), **row) for row in rows]


class SequenceShards:
    """Reader of sequences by shard and id, in any order; it keeps the shards read last.

    Args:
        shards_kept: number of shards to keep in memory.
    """

    def __init__(self, layout: Layout, shards_kept: int) -> None:
        self._root, self._shards_kept = layout.root, shards_kept
        self._read: OrderedDict[str, dict[str, TokenSequence]] = OrderedDict()

    def get(self, shard: str, sequence_id: str) -> TokenSequence | None:
        """Sequence of that id; None if the shard does not hold it.

        Raises:
            StorageError: the shard is missing or corrupt.
        """
        if shard not in self._read:
            sequences = read_sequences(storage.join(self._root, shard))
            self._read[shard] = {sequence.sequence_id: sequence for sequence in sequences}
            if len(self._read) > self._shards_kept:
                self._read.popitem(last=False)
        self._read.move_to_end(shard)
        return self._read[shard].get(sequence_id)


class SequenceReader:
    """Reader of the sequences of dataset entries by id."""

    def __init__(self, layout: Layout, entries: Iterable[DatasetEntry]) -> None:
        self._shards = SequenceShards(layout, SHARDS_KEPT)
        self._shard_of = {entry.sequence_id: entry.shard for entry in entries}

    def get(self, sequence_id: str) -> TokenSequence | None:
        """Sequence of that id; None if no entry names it.

        Raises:
            StorageError: the shard of the sequence is missing or corrupt.
        """
        shard = self._shard_of.get(sequence_id)
        return None if shard is None else self._shards.get(shard, sequence_id)
