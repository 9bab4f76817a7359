"""A shard read without this project: by DuckDB alone, and by pandas alone.

Nothing of ours is imported below `decode`; what the columns are is taken from the file's metadata.
"""

import json
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from pipeline.cache.shard import read_shard, write_shard
from pipeline.records import SparseLogprobs
from tests.unit.cache.test_cache import make_row

ROWS = [make_row(f"s{i}", 5 + i, i) for i in range(3)]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard.parquet"
    write_shard(str(path), ROWS, "f")
    return path


def decode(cells: dict[str, bytes], metadata: dict[str, str]) -> list[dict[int, float]]:
    """Each position's token ids with their probabilities, as the metadata explains the cells."""
    dtypes = json.loads(metadata["polystill.dtypes"])
    arrays = {name: np.frombuffer(cells[name], dtype) for name, dtype in dtypes.items()}
    assert "token_id = token_ids_low + 65536 * token_ids_high" in metadata["polystill.alignment"]
    ids = arrays["token_ids_low"].astype(int) + 65536 * arrays["token_ids_high"].astype(int)
    assert "position j owns num_entries[j] consecutive entries" in metadata["polystill.alignment"]
    stops = np.cumsum(arrays["num_entries"].astype(int))
    probabilities = np.exp(arrays["logprobs"].astype(float))
    return [
        dict(zip(ids[a:b].tolist(), probabilities[a:b].tolist(), strict=True))
        for a, b in zip([0, *stops[:-1]], stops, strict=True)
    ]


def expected(row: SparseLogprobs) -> list[dict[int, float]]:
    stops = np.cumsum(row.num_entries.astype(int)).tolist()
    return [
        {int(row.token_ids[n]): float(np.exp(float(row.logprobs[n]))) for n in range(a, b)}
        for a, b in zip([0, *stops[:-1]], stops, strict=True)
    ]


def test_duckdb_alone_reads_a_shard(shard: Path) -> None:
    pairs = duckdb.sql(f"SELECT key, value FROM parquet_kv_metadata('{shard}')").fetchall()
    metadata = {key.decode(): value.decode() for key, value in pairs}
    cursor = duckdb.sql(f"SELECT * FROM '{shard}' ORDER BY sequence_id")
    for row, values in zip(ROWS, cursor.fetchall(), strict=True):
        cells = dict(zip(cursor.columns, values, strict=True))
        assert cells.pop("sequence_id") == row.sequence_id
        assert decode(cells, metadata) == expected(row)
    # Numbers of one byte are readable in SQL itself.
    ((positions,),) = duckdb.sql(f"SELECT sum(octet_length(num_entries)) FROM '{shard}'").fetchall()
    assert positions == sum(row.num_positions for row in ROWS)


def test_pandas_alone_reads_a_shard(shard: Path) -> None:
    frame = pd.read_parquet(shard).set_index("sequence_id")
    # pandas keeps no file metadata; the reader that it uses has it.
    raw = pq.read_schema(shard).metadata
    metadata = {key.decode(): value.decode() for key, value in raw.items()}
    assert int(metadata["polystill.num_rows"]) == len(frame)
    for row in ROWS:
        assert decode(dict(frame.loc[row.sequence_id]), metadata) == expected(row)


def test_both_readings_are_those_of_our_own_reader(shard: Path) -> None:
    assert [expected(row) for row in read_shard(str(shard))] == [expected(row) for row in ROWS]
