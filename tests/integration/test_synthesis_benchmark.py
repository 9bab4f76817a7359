"""benchmarks/synthesis.py in its short form: engine and stage answer the same prompts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.command_line import ROOT

pytestmark = pytest.mark.timeout(600)


def test_the_stage_is_measured_beside_the_engine(tmp_path: Path) -> None:
    path = tmp_path / "synthesis.json"
    command = [sys.executable, ROOT / "benchmarks/synthesis.py", ROOT / "tests/data/gsm8k"]
    done = subprocess.run(
        [*command, "--quick", "--json", path], check=True, stdout=subprocess.PIPE, text=True
    )
    document = json.loads(path.read_text())
    assert document.keys() == {"machine", "commit", "rows", "ratios"}
    engine, stage = document["rows"]
    assert (engine["way"], stage["way"]) == ("engine", "stage")
    for row in (engine, stage):
        assert 0 < row["lowest"] <= row["tokens_per_second"] <= row["highest"]
        assert row["prompts"] == 128 + 12
    # The same seeds; in bfloat16 what is computed beside an answer may still turn it elsewhere.
    assert stage["generated_tokens"] == pytest.approx(engine["generated_tokens"], rel=0.2)
    assert stage["kept"] > 100 > stage["dropped_by_filters"] >= 0
    assert engine["share_asking"] == 1 > stage["share_asking"] > 0
    ratio = stage["tokens_per_second"] / engine["tokens_per_second"]
    assert document["ratios"] == {"stage_over_engine": ratio}
    assert f"stage_over_engine: {ratio:.3g}" in done.stdout
