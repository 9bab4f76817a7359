"""The benchmark of the cache in its shortest form: its structure, never its times."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.cache import ON_SYNTHETIC, READERS, SELECTIONS, Scale, measure
from benchmarks.common import write_json

DATA = Path(__file__).resolve().parents[1] / "data/gsm8k"
SHORTEST = Scale(
    seconds=0.1,
    positions=2_000,
    batches=1,
    draws=1,
    synthetic_batches=1,
    synthetic_vocabulary=2_000,
    rounds=1,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On cores that other tests keep busy, waiting for a second thread takes longest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_benchmark_measures_every_selection_and_format(tmp_path: Path) -> None:
    rows, ratios = measure(DATA, tmp_path, SHORTEST)
    write_json(tmp_path / "found.json", rows, ratios)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {"machine", "commit", "rows", "ratios"}
    assert found["ratios"].keys() >= {
        "bytes_per_token",
        "read_over_nested",
        "read_mtok_per_second",
    }
    times = [row for row in found["rows"] if "format" in row]
    assert {row["format"] for row in times} == set(READERS)
    assert {row["format"] for row in times if row["what"] == "read"} == set(READERS)
    assert all(row["tokens_per_second"] > 0 and row["tokens"] >= 2_000 for row in times)
    selected = [row for row in found["rows"] if "angle_degrees" in row]
    assert [row["selection"] for row in selected] == [*SELECTIONS, *ON_SYNTHETIC]
    for row in selected:
        assert 0 < row["angle_degrees"] < 90 and 0 < row["bias_degrees"] < 90
        assert 0 < row["kept_mass"] <= 1 and row["bytes_per_token"] > 0
    entries = {row["selection"]: row["entries"] for row in selected[: len(SELECTIONS)]}
    assert entries["top_k 50"] == 50 and entries["sampled 8"] <= 8
