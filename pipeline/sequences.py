"""Sequence shards, and the dataset: the ordered list of the sequences that a run trains on.

A sequence shard is immutable and holds sequences of one domain: one Parquet row for each sequence,
arrays as binary cells of little-endian numbers. A dataset names sequences and the shard of each.
Filters make a new dataset and never touch a shard. The columns called `generators` hold the authors
of a sequence.

A dataset is held as columns: some 60 bytes an entry, and an object only for the entry at hand.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.fingerprint import digest_ids, digest_of_rows, is_digest
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
ID_COLUMNS = ("sequence_id", "prompt_id")
ENTRIES_AT_ONCE = 2**16
DIGEST_COLUMNS = ("sequence_id", "domain", "split", "generators", "shard")
HEX_VALUES = np.full(256, 255, np.uint8)
HEX_VALUES[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)
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


class Dataset(Sequence[DatasetEntry]):
    """The entries of a dataset, in order.

    Attributes:
        table: the columns of `DATASET_SCHEMA`; names that repeat are dictionaries, and ids that are
            hex digests are 16 bytes each.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table

    @classmethod
    def of(cls, entries: Iterable[DatasetEntry]) -> Dataset:
        """A dataset of any entries."""
        if isinstance(entries, Dataset):
            return entries
        remaining, chunks = iter(entries), []
        while rows := [_row(entry) for entry in islice(remaining, ENTRIES_AT_ONCE)]:
            chunks.append(_packed(pa.Table.from_pylist(rows, schema=DATASET_SCHEMA)))
        return cls(_joined(chunks))

    @classmethod
    def joined(cls, datasets: Iterable[Dataset]) -> Dataset:
        """All entries, each sequence once: at its first place, as its last entry describes it."""
        whole = cls(_joined([dataset.table for dataset in datasets]))
        identifiers = whole.table["sequence_id"].combine_chunks().dictionary_encode()
        places = np.empty(len(identifiers.dictionary), np.int64)
        places[identifiers.indices.to_numpy()] = np.arange(len(whole))
        return whole.take(places)

    @cached_property
    def num_tokens(self) -> np.ndarray:
        """int32[N]: tokens of each sequence."""
        return self.table["num_tokens"].to_numpy()

    @cached_property
    def num_positions(self) -> np.ndarray:
        """int32[N]: positions of each sequence."""
        return self.table["num_positions"].to_numpy()

    @property
    def num_prompts(self) -> int:
        """Number of different prompts."""
        return pc.call_function("count_distinct", [self.table["prompt_id"]]).as_py()

    def of_split(self, *splits: str) -> Dataset:
        """The entries of some splits, in order."""
        return self.where(self.has_value("split", splits))

    def has_value(self, name: str, values: Iterable[str]) -> np.ndarray:
        """bool[N]: which entries have one of the values in the column of that name, which is no
        column of ids or authors.
        """
        return _is_in(self.table[name], pa.array(values, pa.string()))

    def has_id(self, identifiers: Collection[str]) -> np.ndarray:
        """bool[N]: which entries have one of the ids."""
        column = self.table["sequence_id"]
        wanted = [i for i in identifiers if column.type == pa.string() or is_digest(i)]
        if column.type != pa.string():
            wanted = [bytes.fromhex(identifier) for identifier in wanted]
        return _is_in(column, pa.array(wanted, column.type))

    def where(self, mask: np.ndarray) -> Dataset:
        """The entries at which a mask is true, in order."""
        return Dataset(self.table.filter(mask))

    def take(self, places: np.ndarray | Sequence[int]) -> Dataset:
        """The entries at some places, in the order of the places."""
        return Dataset(self.table.take(pa.array(places, pa.int64())))

    def __len__(self) -> int:
        return self.table.num_rows

    @overload
    def __getitem__(self, place: int) -> DatasetEntry: ...
    @overload
    def __getitem__(self, place: slice) -> Dataset: ...
    def __getitem__(self, place: int | slice) -> DatasetEntry | Dataset:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        place = range(len(self))[place]
        return next(iter(Dataset(self.table.slice(place, 1))))

    def __iter__(self) -> Iterator[DatasetEntry]:
        for rows in self._rows(DATASET_SCHEMA.names):
            for identifier, prompt, domain, split, authors, *rest in rows:
                yield DatasetEntry(identifier, prompt, domain, split, tuple(authors), *rest)

    def _rows(self, names: Sequence[str]) -> Iterator[list[tuple[Any, ...]]]:
        """Values of some columns, in batches."""
        for batch in self.table.select(names).to_batches(ENTRIES_AT_ONCE):
            if batch.num_rows:
                yield list(zip(*map(_values, batch.columns), strict=True))

    def digest(self) -> str:
        """Digest of the content."""
        return digest_of_rows(lambda: self._rows(DIGEST_COLUMNS))


def _is_in(column: pa.ChunkedArray, values: pa.Array) -> np.ndarray:
    options = pc.SetLookupOptions(values)
    return pc.call_function("is_in", [column], options).to_numpy()


def packed_ids(column: pa.Array) -> pa.Array:
    """A column of texts as binary(16) if all are hex digests, or else as it is."""
    if column.type != pa.string() or column.null_count or not len(column):
        return column
    offsets = np.frombuffer(column.buffers()[1], "<i4")[column.offset :][: len(column) + 1]
    if not (np.diff(offsets) == 32).all():
        return column
    text = np.frombuffer(column.buffers()[2], np.uint8)[offsets[0] : offsets[-1]]
    digits = HEX_VALUES[text].reshape(-1, 2)
    if (digits > 15).any():
        return column
    values = pa.py_buffer(np.ascontiguousarray(digits[:, 0] << 4 | digits[:, 1]))
    return pa.Array.from_buffers(pa.binary(16), len(column), [None, values])


def unpacked_ids(column: pa.Array) -> list[str]:
    """The texts of a column that `packed_ids` may have packed."""
    if column.type != pa.binary(16):
        return column.to_pylist()
    start = 16 * column.offset
    text = column.buffers()[1][start : start + 16 * len(column)].to_pybytes().hex()
    return [text[i : i + 32] for i in range(0, len(text), 32)]


def _values(column: pa.Array) -> list[Any]:
    """The values of a packed column; `to_pylist` makes an Arrow scalar of each, and is slow."""
    if isinstance(column, pa.DictionaryArray):
        names = column.dictionary.to_pylist()
        return [names[i] for i in column.indices.to_numpy().tolist()]
    if isinstance(column, pa.ListArray):
        members, places = _values(column.flatten()), column.value_lengths().to_numpy()
        ends = np.cumsum(places)
        pairs = zip((ends - places).tolist(), ends.tolist(), strict=True)
        return [members[start:end] for start, end in pairs]
    if pa.types.is_integer(column.type):
        return column.to_numpy().tolist()
    return unpacked_ids(column)


def _packed(table: pa.Table) -> pa.Table:
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        column = column.combine_chunks()
        if name in ID_COLUMNS:
            column = packed_ids(column)
        elif name == "generators":
            column = pa.ListArray.from_arrays(column.offsets, column.values.dictionary_encode())
        elif column.type == pa.string():
            column = column.dictionary_encode()
        columns[name] = column
    return pa.table(columns)


def _joined(tables: list[pa.Table]) -> pa.Table:
    """Packed tables as one; an id column that is packed in some only is not packed."""
    if not tables:
        return _packed(DATASET_SCHEMA.empty_table())
    for name in ID_COLUMNS:
        if len({table.schema.field(name).type for table in tables}) > 1:
            tables = [_with_texts(table, name) for table in tables]
    return pa.concat_tables(tables).unify_dictionaries()


def _with_texts(table: pa.Table, name: str) -> pa.Table:
    texts = [text for chunk in table[name].chunks for text in unpacked_ids(chunk)]
    return table.set_column(table.column_names.index(name), name, pa.array(texts, pa.string()))


def write_dataset(layout: Layout, entries: Iterable[DatasetEntry]) -> str:
    """Writes a dataset under the digest of its content; returns the digest."""
    dataset = Dataset.of(entries)
    digest = dataset.digest()
    if not storage.exists(layout.dataset(digest)):
        tables = _as_stored(dataset.table)
        storage.write_tables(layout.dataset(digest), DATASET_SCHEMA, tables)
    return digest


def _as_stored(table: pa.Table) -> Iterator[pa.Table]:
    for batch in table.to_batches(ENTRIES_AT_ONCE):
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        columns |= {name: pa.array(unpacked_ids(batch[name]), pa.string()) for name in ID_COLUMNS}
        yield pa.table(columns).cast(DATASET_SCHEMA)


def _row(entry: DatasetEntry) -> dict[str, Any]:
    values = {name: value for name, value in vars(entry).items() if name != "authors"}
    return values | {"generators": list(entry.authors)}


def read_dataset(layout: Layout, digest: str) -> Dataset:
    """Reads the dataset of a digest.

    Raises:
        StorageError: the dataset is missing or corrupt.
    """
    batches = storage.read_batches(layout.dataset(digest), ENTRIES_AT_ONCE)
    return Dataset(_joined([_packed(pa.Table.from_batches([batch])) for batch in batches]))


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
