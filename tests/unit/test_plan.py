"""The plan of a run over caches that other runs have filled."""

from dataclasses import replace
from pathlib import Path

import pytest

from jobs.dry_run import describe
from jobs.plan import make_plan, plan_score, score_key
from pipeline import storage
from pipeline.datasets import DatasetEntry, write_dataset
from pipeline.errors import ConfigError
from pipeline.layout import Layout
from pipeline.loading import load_config
from pipeline.prepared import Prepared, preparation_key
from pipeline.training import stage_cost

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
QUICKSTART = Path(__file__).resolve().parents[2] / "examples/quickstart/config.yaml"
CONFIG = load_config(QUICKSTART)


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


@pytest.mark.parametrize(("dimensions", "bytes_each"), [(None, 2 * 2 * 1024), (16, 2 * 2 * 16)])
def test_the_plan_of_scoring_counts_hidden_states(
    dimensions: int | None, bytes_each: int, tmp_path: Path
) -> None:
    """Of two layers, 2 bytes a dimension; and 47 bytes of the distributions."""
    projection = None if dimensions is None else {"dimensions": dimensions, "seed": 0}
    recipes = PREPARED.scoring_recipes | {
        "t+features": {"layers": [1, 2], "projection": projection}
    }
    prepared = replace(PREPARED, scoring_recipes=recipes, hidden_sizes={"t": 1024})
    entry = DatasetEntry("s", "p", "d", "train", ("t",), "sequences/d/x.parquet", 2**20, 2**20)
    plan = plan_score(CONFIG, Layout(str(tmp_path), "run"), prepared, [entry])
    assert f"at most {47 + bytes_each:,}.0 MiB" in plan.summary


def test_a_missing_model_folder_is_found_without_a_cluster(tmp_path: Path) -> None:
    changes = [f"storage.root={tmp_path}", f"teachers.words.model={tmp_path}/nope"]
    with pytest.raises(ConfigError, match=r"teachers.words.model: the model folder .*/nope does"):
        make_plan(load_config(QUICKSTART, changes))


def test_prices_and_placement_ask_for_no_new_preparation() -> None:
    changes = [
        "teachers.words.cost_per_hour=3",
        "student.cost_per_hour=2",
        "teachers.words.replicas=2",
    ]
    changed = load_config(QUICKSTART, changes)
    assert preparation_key(changed) == preparation_key(CONFIG)
    assert preparation_key(load_config(QUICKSTART, ["seed=3"])) != preparation_key(CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teachers.words.vllm.max_num_seq=3", "max_num_seq"),
        ("synthesis.recipes.0.sampling.temprature=1", "temprature"),
        ("teachers.words.domains=[poems]", r"no teacher names \['words'\]"),
    ],
)
def test_a_dry_run_refuses_what_prepare_would(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        describe(load_config(QUICKSTART, [f"storage.root={tmp_path}", change]))


def test_engines_and_workers_are_priced_by_the_config_of_the_report() -> None:
    changes = ["teachers.words.cost_per_hour=3", "student.cost_per_hour=1"]
    changes += ["training.cost_per_hour=2", "teachers.arithmetic.cost_per_hour=0"]
    config = load_config(QUICKSTART, changes)
    engines = {"engine_seconds": {"words": 1200.0, "student": 1800.0, "arithmetic": 9.0}}
    assert stage_cost(config, engines) == pytest.approx(1.0 + 0.5)
    assert stage_cost(config, {"worker_seconds": 7200.0}) == pytest.approx(4.0)
    assert stage_cost(config, {}) == 0
