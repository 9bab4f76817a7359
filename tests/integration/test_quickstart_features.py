"""The README's quickstart with losses on hidden states, made small: every stage for real."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.caches import cache_folder, dataset, shards
from tests.support.command_line import QUICKSTART, polystill
from tests.support.quickstart import read_lines, some_prompts
from tests.unit.test_readme import of_kind, with_stand_ins

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
NAMES = ("hidden_state_cosine_words_4_2", "relation_distance_arithmetic_4_2")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The README's own, with fewer prompts and steps."""
    (written,) = [c for c in of_kind("polystill run") if "hidden_state" in c]
    root, prompts = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("prompts")
    settings = {
        "storage.root": root,
        "prompts.sources.0.path": some_prompts("prompts.jsonl", 24, prompts),
        "prompts.sources.1.path": some_prompts("holdout.jsonl", 4, prompts),
        "training.steps": 6,
        "training.warmup_steps": 1,
        "training.sequences_per_step": 16,
        "training.log_every_steps": 1,
        "training.evaluate_every_steps": 3,
        "training.checkpoint_every_steps": 6,
        "evaluation.twin": "false",
    }
    small = [f"{key}={value}" for key, value in settings.items()]
    return [*with_stand_ins(written)[1:], *small], root


def test_the_whole_run_with_losses_on_hidden_states(command: tuple[list[str], Path]) -> None:
    arguments, root = command
    finished = polystill(*arguments, seconds=850)
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    metrics = read_lines(root / "runs/features/student/metrics.jsonl")
    for name in NAMES:
        values = [line[f"train/{name}"] for line in metrics]
        assert len(values) == 6 and all(np.isfinite(values)) and min(values) > 0
        assert [line["step"] for line in metrics if f"holdout/{name}" in line] == [3, 6]
    first = metrics[0]
    parts = [first["train/forward_kl"], *(0.2 * first[f"train/{name}"] for name in NAMES)]
    assert first["train/loss"] == pytest.approx(sum(parts), rel=1e-5)
    exported = AutoModelForCausalLM.from_pretrained(root / "runs/features/export/student")
    assert not [name for name in exported.state_dict() if "projection" in name]

    for teacher in ("words", "arithmetic"):
        _assert_states(root, teacher)
    again = polystill(*arguments)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    checked = polystill("cache", "verify", *arguments[1:])
    assert checked.returncode == 0, checked.stdout
    assert "words+features:" in checked.stdout
    manifest = json.loads((cache_folder(root, "words+features") / "manifest.json").read_text())
    assert manifest["provenance"]["engines"][0]["hidden_layers"] == [4]


def _assert_states(root: Path, teacher: str) -> None:
    """The stored states are those that transformers gives to the teacher's final norm."""
    folder = QUICKSTART / "teachers" / teacher
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before_norm = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0][0]))
    stored = {
        row["sequence_id"]: np.frombuffer(row["states"], "<u2").reshape(-1, 128)
        for path in shards(root, f"{teacher}+features")
        for row in pq.read_table(path).to_pylist()
    }
    sequences = dataset(root, "features")
    assert stored.keys() == sequences.keys()
    for identifier, sequence in list(sequences.items())[:4]:
        with torch.no_grad():
            model(torch.tensor(sequence.input_ids[None].astype(np.int64)))
        expected = before_norm.pop()[sequence.positions - 1].numpy()
        values = (stored[identifier].astype("<u4") << 16).view("<f4")
        # half a step of bfloat16 is 2**-9 of a value; and float32 sums in another order
        np.testing.assert_allclose(values, expected, rtol=2**-8, atol=1e-3)
