"""Filters inside their stages: a new dataset, no new answers, no new rows."""

import logging
import math
import re
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from jobs.bookkeeping.stage_records import scored_dataset, synthesized_dataset, write_record
from jobs.stages.score import score
from jobs.stages.synthesize import synthesize
from pipeline import storage
from pipeline.cache.reader import open_cache
from pipeline.config.load import load_config
from pipeline.config.rounds import layout_of
from pipeline.config.run import Config
from pipeline.config.synthesis import DATASET_AUTHOR
from pipeline.errors import FilterError
from pipeline.filters.run import filter_identity
from pipeline.run.identities import scoring_identity, synthesis_identity
from pipeline.run.preparation import Prepared
from pipeline.run.prepared_run import Run
from pipeline.sequences import read_dataset
from pipeline.synthesis.prompts import read_prompts, write_prompts
from tests.support import fabricated
from tests.support.command_line import QUICKSTART, ROOT
from tests.support.fabricated import FakePools
from tests.support.quickstart import some_prompts

SYNTHESIS_PAGE = ROOT / "docs/synthesis.md"
NUM_TRAIN, NUM_HOLDOUT = 8, 3  # prompts of each domain


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    sources = {
        0: some_prompts("prompts.jsonl", NUM_TRAIN, tmp_path),
        1: some_prompts("holdout.jsonl", NUM_HOLDOUT, tmp_path),
    }
    return [
        f"storage.root={tmp_path / 'out'}",
        *(f"prompts.sources.{i}.path={path}" for i, path in sources.items()),
        "synthesis.recipes=[{type: dataset}]",
        "scoring.num_logprobs=16",
    ]


def config_with(arguments: list[str], filters: str) -> Config:
    return load_config(QUICKSTART / "config.yaml", [*arguments, f"synthesis.filters={filters}"])


def prepared(config: Config) -> Run:
    layout, (prompts, counts) = layout_of(config), read_prompts(config.prompts)
    recipes = {t: scoring_identity(config, t, {"weights": t}, "hash") for t in config.teachers}
    synthesis = config.synthesis
    before, after = (
        [filter_identity(rule, config.prompts.checker) for rule in rules]
        for rules in (synthesis.filters_before_scoring, synthesis.filters_after_scoring)
    )
    answers = synthesis_identity(config, synthesis.recipes[0], DATASET_AUTHOR, {}, "hash")
    found = Prepared(
        key="key",
        prompts_digest=write_prompts(layout, prompts),
        prompt_counts=counts,
        longest_prompt=16,
        tokenizer_hash="hash",
        eos_token_id=1,
        cache_identities=recipes,
        synthesis_identities={DATASET_AUTHOR: answers},
        student_identity={},
        filters_before_scoring=before,
        filters_after_scoring=after,
    )
    return Run(config, layout, found)


def stage(config: Config, name: str) -> dict[str, Any]:
    """Runs a stage and keeps its record, as its job does."""
    run = prepared(config)
    if name == "synthesize":
        record = synthesize(run)
    else:
        digest = synthesized_dataset(run)
        assert digest is not None
        record = score(run, digest)
    write_record(run.layout, name, record)
    return record.model_dump(exclude_unset=True)


def test_another_filter_makes_another_dataset_and_asks_nobody_again(
    arguments: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = config_with(arguments, "[]")
    whole = stage(config, "synthesize")
    layout = layout_of(config)
    before = storage.file_states(f"{layout.root}/synthesis")
    varied = config_with(arguments, "[{type: repetition, ngram: 1, max_share: 0.3}]")
    assert synthesized_dataset(prepared(varied)) is None
    outcome = stage(varied, "synthesize")
    assert outcome["filters"][0]["dropped_by_domain"] == {"arithmetic": 1, "words": 1}
    assert "dropped by filters: repetition 2 of 22" in outcome["summary"]
    everything = read_dataset(layout, whole["dataset"])
    kept = list(read_dataset(layout, outcome["dataset"]))
    assert len(kept) == 20 and [entry for entry in everything if entry in kept] == kept
    assert storage.file_states(f"{layout.root}/synthesis") == before
    (path,) = Path(layout.root).glob("rejected/*/0-repetition.parquet")
    rows = pq.read_table(path).to_pylist()
    assert {(row["split"], row["answer"]) for row in rows} == {
        ("train", "555"),
        ("holdout", "cbcb"),
    }
    row = next(row for row in rows if row["split"] == "train")
    said = [r.getMessage() for r in caplog.records if r.name == "pipeline.filters.run"]
    assert said == [f"filter repetition dropped 2 answers, see {path}"]
    (block,) = re.findall(r"SELECT .* = 'ID'", SYNTHESIS_PAGE.read_text())
    query = block.replace("ROOT", layout.root).replace("'ID'", f"'{row['prompt_id']}'")
    assert duckdb.sql(query).fetchall() == [(row["reason"], row["detail"], row["answer"])]


def test_the_filters_of_the_quickstart_find_bad_answers(
    arguments: list[str], tmp_path: Path
) -> None:
    """Given answers equal their references; one prompt is a hold-out prompt with a space more."""
    holdout = (tmp_path / "holdout.jsonl").read_text().splitlines()
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(holdout[0].replace('"content": "', '"content": " ') + "\n")
    shipped = load_config(QUICKSTART / "config.yaml", arguments)
    outcome = stage(shipped, "synthesize")
    assert {c["filter"]: c["dropped"] for c in outcome["filters"]} == {
        "checker": 0,
        "near_duplicate": 0,
        "contamination": 1,
    }
    assert "hold-out prompt" in outcome["filters"][2]["examples"][0]


def test_an_answer_at_which_the_checker_raises_is_dropped_and_said(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "numeric_rules.py").write_text(
        "def of_numbers(one, other):\n    return int(int(one, 16) == int(other, 16))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = [*arguments, "prompts.checker=numeric_rules.of_numbers"]
    (counts,) = stage(config_with(mine, "[{type: checker}]"), "synthesize")["filters"]
    assert counts["dropped_by_domain"] == {"words": 6}, "g and h are no digits"
    first, last = [
        r.message for r in caplog.records if r.name == "pipeline.checkers.answer_checkers"
    ]
    assert "numeric_rules.of_numbers raised ValueError" in first
    assert "raised at 6 of 22 answers" in last


def test_filters_that_leave_nothing_lose_no_answer(arguments: list[str]) -> None:
    config = config_with(arguments, "[{type: length, min_tokens: 99}]")
    with pytest.raises(FilterError, match=r"no sequence of the holdout split.*length 22 of 22"):
        stage(config, "synthesize")
    assert stage(config_with(arguments, "[]"), "synthesize")["counts"]["dataset"]["kept"] == 22


def test_perplexity_comes_from_the_cached_rows_and_scores_nothing_again(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pools = FakePools()
    monkeypatch.setattr(fabricated, "VOCABULARY", 64)
    monkeypatch.setattr("jobs.stages.score.run_pools", pools)
    config = config_with(arguments, "[]")
    stage(config, "synthesize")
    stage(config, "score")
    layout, num_scored = layout_of(config), len(pools.scored)
    digest = scored_dataset(prepared(config))
    assert digest is not None
    entries = read_dataset(layout, digest)
    cache = open_cache(prepared(config).cache_layouts()["words"])
    means = {}
    for entry in entries:
        row = cache.row(entry.sequence_id)
        assert row is not None
        means[entry.sequence_id] = float(row.gold_logprobs.astype(float).mean())
    low, high = sorted(means.values())[1:3]  # each domain of a split has three answers or more
    bound = f"[{{type: perplexity, teacher: words, max: {math.exp(-(low + high) / 2)}}}]"
    strict = config_with(arguments, bound)
    assert scored_dataset(prepared(strict)) is None
    outcome = stage(strict, "score")
    kept = list(read_dataset(layout, outcome["dataset"]))
    assert [e.sequence_id for e in kept] == [i for i in means if means[i] >= high]
    assert outcome["filters"][0]["dropped"] == len(entries) - len(kept) == 2
    assert (
        "dropped by filters: perplexity" in outcome["summary"] and len(pools.scored) == num_scored
    )
