"""A dataset as columns: the same entries, a digest of old, and few bytes for each."""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest

from pipeline import sequences
from pipeline.fingerprint import digest_bytes, digest_json
from pipeline.layout import Layout
from pipeline.records import DatasetEntry
from pipeline.sequences import Dataset, packed_ids, read_dataset, unpacked_ids, write_dataset


def entries(hashed: bool = True) -> Iterator[DatasetEntry]:
    """Any number of entries of two authors, three domains and shards of 2,000."""
    number = 0
    while True:
        identifier = digest_bytes(str(number).encode()) if hashed else f"säq {number}"
        prompt = digest_bytes(str(number // 2).encode()) if hashed or number % 5 else "p"
        yield DatasetEntry(
            identifier,
            prompt,
            f"d{number % 3}",
            "train" if number % 10 else "holdout",
            ("a", "b")[: 1 + number % 2],
            f"sequences/d/{number // 2000:032x}.parquet",
            500 + number % 7,
            400 + number % 7,
        )
        number += 1


@pytest.mark.parametrize("hashed", [True, False])
def test_entries_come_back_in_order_by_place_by_slice_and_by_split(hashed: bool) -> None:
    given = list(islice(entries(hashed), 3000))
    dataset = Dataset.of(given)
    assert list(dataset) == given and len(dataset) == 3000
    assert (dataset[3], dataset[-1]) == (given[3], given[-1])
    assert list(dataset[5:900:7]) == given[5:900:7]
    assert list(dataset[2000:][-1000:]) == given[2000:]
    assert list(dataset.take([5, 3, 2999])) == [given[5], given[3], given[2999]]
    held_out = dataset.of_split("holdout")
    assert list(held_out) == [entry for entry in given if entry.split == "holdout"]
    assert held_out.num_tokens.tolist() == [entry.num_tokens for entry in held_out]
    assert held_out.num_positions.sum() == sum(entry.num_positions for entry in held_out)
    with pytest.raises(IndexError):
        dataset[3000]


def test_a_dataset_is_read_back_and_named_by_its_content(
    tmp_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first digest was that of the whole list as one JSON text."""
    monkeypatch.setattr(sequences, "ENTRIES_AT_ONCE", 64)
    layout = Layout(f"{tmp_path}/out", "run")
    given = [*islice(entries(), 200), *islice(entries(hashed=False), 50), *islice(entries(), 9)]
    for some in (given, given[:64], given[:1], []):
        digest = write_dataset(layout, iter(some))
        rows = [[e.sequence_id, e.domain, e.split, list(e.authors), e.shard] for e in some]
        assert digest == digest_json(rows)
        again = read_dataset(layout, digest)
        assert list(again) == some
        assert write_dataset(layout, again) == digest


def test_an_entry_takes_less_than_a_hundred_bytes() -> None:
    assert Dataset.of(islice(entries(), 100_000)).table.nbytes / 100_000 < 70


@pytest.mark.parametrize(
    "texts",
    [
        ["0" * 32, "f" * 32, "0123456789abcdef" * 2],
        ["0" * 32, "F" * 32],
        ["0" * 32, "0" * 31 + "é"],
        ["0" * 31, "0" * 33],
        [""],
        [],
    ],
)
def test_ids_are_packed_only_if_all_come_back(texts: list[str]) -> None:
    column = pa.array(["x", *texts, "y"], pa.string())[1:-1]
    packed = packed_ids(column)
    assert unpacked_ids(packed) == texts
    assert (packed.type == pa.binary(16)) == (
        texts[:1] == ["0" * 32] and texts[-1] == "0123456789abcdef" * 2
    )
    assert unpacked_ids(packed[1:]) == texts[1:]
    assert np.array_equal(packed.to_pylist(), packed_ids(packed).to_pylist())
