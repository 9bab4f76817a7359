"""The plan of a run over caches that other runs have filled."""

from pathlib import Path

from jobs.plan import plan_score, score_key
from pipeline import storage
from pipeline.datasets import DatasetEntry, write_dataset
from pipeline.layout import Layout
from pipeline.loading import load_config
from pipeline.prepared import Prepared

PREPARED = Prepared(
    key="key",
    prompts="prompts",
    prompt_counts={},
    longest_prompt=1,
    tokenizer_hash="hash",
    eos_token_id=1,
    scoring_recipes={"t": {"selection": {"type": "top_k", "max_entries": 8}}},
    synthesis_recipes={},
    student={},
)
CONFIG = load_config(Path(__file__).resolve().parents[2] / "examples/quickstart/config.yaml")


def test_a_run_scores_though_nothing_is_missing_until_its_own_record_stands(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path), "run")
    assert plan_score(CONFIG, layout, PREPARED, []).todo == 1
    record = {"key": score_key(CONFIG, layout, PREPARED), "dataset": write_dataset(layout, [])}
    storage.write_json(layout.stage_record("score"), record)
    assert plan_score(CONFIG, layout, PREPARED, []).todo == 0


def test_the_plan_of_scoring_bounds_the_bytes(tmp_path: Path) -> None:
    entry = DatasetEntry("s", "p", "d", "train", ("t",), "sequences/d/x.parquet", 2**20, 2**20)
    plan = plan_score(CONFIG, Layout(str(tmp_path), "run"), PREPARED, [entry])
    # A position takes 7 bytes, and 5 for each of at most 8 entries.
    assert plan.todo == 1 and "at most 47.0 MiB" in plan.summary
