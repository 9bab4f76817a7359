"""benchmarks/capture.py in its short form: every way is measured, the promised ratios are there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.timeout(600)


def test_the_short_form_measures_every_way(tmp_path: Path) -> None:
    path = tmp_path / "capture.json"
    printed = subprocess.run(
        [
            sys.executable,
            ROOT / "benchmarks/capture.py",
            ROOT / "tests/data/gsm8k",
            "--quick",
            "--json",
            path,
        ],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    document = json.loads(path.read_text())
    assert document.keys() == {"machine", "commit", "rows", "ratios"}
    assert [(row["way"], row["k"]) for row in document["rows"]] == [
        ("bare", None),
        ("dicts", 64),
        ("flat", 64),
        ("arrays", 64),
        ("stage", 64),
        ("siblings", 64),
        ("siblings shared", 64),
        ("alike", 64),
        ("alike shared", 64),
    ]
    for row in document["rows"]:
        assert 0 < row["lowest"] <= row["tokens_per_second"] <= row["highest"]
        assert 0 < row["answer_tokens"] < row["tokens"]
    ratios = document["ratios"]
    assert {"arrays_over_dicts_k64", "stage_over_arrays_k64", "prefix_sharing_8"} <= ratios.keys()
    for name, ratio in ratios.items():
        assert ratio > 0 and f"{name}: {ratio:.3g}" in printed
    shared, alike = document["rows"][6], document["rows"][8]
    for row in document["rows"]:
        is_shared = row["way"].endswith("shared")
        assert (row["cached_tokens"] > 0.5 * row["tokens"]) == is_shared
        assert is_shared or row["cached_tokens"] == row["rescored"] == 0
        # The engine computes in bfloat16; the canary's tolerance for it.
        assert not is_shared or row["gold_difference_nats"] < 0.06
    # The rows of a common beginning are those of the answer before.
    assert shared["rescored"] < shared["sequences"] / 4
    assert alike["rescored"] < alike["sequences"] / 4
