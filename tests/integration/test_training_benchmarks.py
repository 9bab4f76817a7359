"""The benchmarks of loader and training step run, and say what they promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import ROOT

pytestmark = pytest.mark.timeout(300)


def result_of(name: str, folder: Path) -> tuple[dict, str]:
    command = [sys.executable, f"benchmarks/{name}", "--quick", "--json", folder / "result.json"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads((folder / "result.json").read_text()), done.stdout


def test_the_loader_is_measured_for_one_two_and_four_teachers(tmp_path: Path) -> None:
    result, printed = result_of("loader.py", tmp_path)
    assert [row["teachers"] for row in result["rows"]] == [1, 2, 4]
    for row in result["rows"]:
        assert 0 < row["lowest"] <= row["tokens_per_second_per_core"] <= row["highest"]
        assert row["through_one_process"] > 0
    per_core = result["rows"][1]["tokens_per_second_per_core"]
    assert result["ratios"] == {"ktok_per_second_per_core_2_teachers": per_core / 1000}
    assert "ktok_per_second_per_core_2_teachers" in printed and result["machine"]["cpu"]


def test_the_training_step_is_measured_against_cross_entropy(tmp_path: Path) -> None:
    result, printed = result_of("train.py", tmp_path)
    rows = {row["losses"]: row for row in result["rows"]}
    assert rows["cross_entropy"]["over_cross_entropy"] == 1
    for row in rows.values():
        assert 0 < row["lowest"] <= row["tokens_per_second"] <= row["highest"]
        assert len(row["seconds"]) == 3
    found = rows["forward_kl"]["over_cross_entropy"]
    assert result["ratios"] == {"kd_over_ce_tokens_per_second": found}
    assert "forward_kl_2_teachers" in printed
