"""The loss benchmark runs, reports the promised figures, and needs torch alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BENCHMARK = ROOT / "benchmarks" / "loss.py"


LOSSES = sorted(path.stem for path in (ROOT / "students" / "losses").glob("[!_]*.py"))
TORCH_ALONE = """
import importlib, sys, torch
for name in ("pyarrow", "pydantic", "ray", "deepspeed", "transformers", "pipeline", "yaml"):
    sys.modules[name] = None  # an import of it fails
before = set(sys.modules)
root, *modules = sys.argv[1:]
sys.path.insert(0, root)
for module in modules:
    importlib.import_module(module)
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names) - {"torch", "students", "benchmarks"}))
"""


def test_the_losses_import_nothing_but_torch_and_the_standard_library():
    """The benchmark runs on a machine that has nothing else of what this project needs."""
    modules = ["benchmarks.loss", *(f"students.losses.{name}" for name in LOSSES)]
    command = [sys.executable, "-c", TORCH_ALONE, str(ROOT), *modules]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


@pytest.mark.timeout(600)
def test_the_shortest_form_writes_rows_and_ratios(tmp_path):
    path = tmp_path / "loss.json"
    command = [sys.executable, BENCHMARK, "--quick", "--json", path]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    result = json.loads(path.read_text())
    assert result["machine"]["device"] and result["machine"]["torch"]
    assert {"sparse_kl", "cross_entropy", "dense_kl"} <= {row["method"] for row in result["rows"]}
    for row in result["rows"]:
        assert len(row["seconds"]) == 3 and min(row["seconds"]) > 0
        assert row["tokens_per_second"] == row["positions"] / row["median_seconds"]
        assert row["peak_memory_bytes"] > 0
        assert row["method"] in done.stdout
    assert list(result["ratios"]) == [
        "sparse_over_ce_tokens_per_second",
        "sparse_over_ce_peak_memory",
        "dense_over_sparse_peak_memory",
    ]
    assert "Liger" in done.stdout
