"""Contents of a storage root, read with pyarrow alone and none of our own code."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


@dataclass(frozen=True)
class StoredSequence:
    """One sequence of a dataset. P positions: the tokens inside the loss spans."""

    input_ids: np.ndarray
    positions: np.ndarray
    split: str


def dataset(root: Path, run: str) -> dict[str, StoredSequence]:
    """Sequences of a run's dataset, by sequence id, in order."""
    digest = json.loads((root / "runs" / run / "stages/synthesize.json").read_text())["dataset"]
    entries = pq.read_table(root / "datasets" / f"{digest}.parquet").to_pylist()
    rows = {
        row["sequence_id"]: row
        for shard in sorted({entry["shard"] for entry in entries})
        for row in pq.read_table(root / shard).to_pylist()
    }
    return {
        entry["sequence_id"]: _sequence(rows[entry["sequence_id"]], entry["split"])
        for entry in entries
    }


def _sequence(row: dict, split: str) -> StoredSequence:
    spans = np.frombuffer(row["loss_spans"], "<i4").reshape(-1, 2)
    positions = np.concatenate([np.arange(start, stop) for start, stop in spans])
    return StoredSequence(np.frombuffer(row["input_ids"], "<i4"), positions, split)


def cache_folder(root: Path, teacher: str) -> Path:
    """The only cache of a teacher."""
    (folder,) = (root / "caches").glob(f"{teacher}-*")
    return folder


def shards(root: Path, teacher: str) -> list[Path]:
    """Complete shards of a teacher's cache; an empty list before the first one."""
    return sorted((root / "caches").glob(f"{teacher}-*/g1/[!.]*.parquet"))


def cached_rows(paths: list[Path]) -> dict[str, dict[str, np.ndarray]]:
    """The rows of cache shards, by sequence id.

    Returns:
        For each `gold_logprobs` [P], and `first_logprobs` [P] of the most probable entry at each
        position.
    """
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    twice = [
        name for name, count in Counter(row["sequence_id"] for row in rows).items() if count > 1
    ]
    assert twice == [], f"rows of the same sequence: {twice}"
    return {row["sequence_id"]: _arrays(row) for row in rows}


def _arrays(row: dict) -> dict[str, np.ndarray]:
    num_entries = np.frombuffer(row["num_entries"], "<u1").astype(np.int64)
    starts = np.cumsum(num_entries) - num_entries
    return {
        "gold_logprobs": np.frombuffer(row["gold_logprobs"], "<f2").astype(np.float64),
        "first_logprobs": np.frombuffer(row["logprobs"], "<f2")[starts].astype(np.float64),
    }


def assert_rows_agree(
    found: dict[str, dict[str, np.ndarray]], expected: dict[str, dict[str, np.ndarray]]
) -> None:
    """Compares two scorings of the same sequences by the same engine.

    Batches are composed differently each time, which moves a float32 log-probability by about
    1e-5 nats, and that may round to the neighbouring float16: 2**-10 of its size.
    """
    assert found.keys() == expected.keys()
    for name, arrays in expected.items():
        for column, values in arrays.items():
            np.testing.assert_allclose(
                found[name][column], values, rtol=2**-10, atol=5e-4, err_msg=f"{name} {column}"
            )


def flip_bit(path: Path) -> bytes:
    """Changes one bit of a shard's log-probabilities; returns the new content."""
    groups = pq.read_metadata(path).row_group(0)
    (column,) = [
        column
        for column in (groups.column(i) for i in range(groups.num_columns))
        if column.path_in_schema == "logprobs"
    ]
    content = bytearray(path.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 0x04
    path.write_bytes(content)
    return bytes(content)
