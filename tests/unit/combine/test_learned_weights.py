"""Learned weights: the likeliest mixture of the validation split, kept in the run and part of what
its training is.
"""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.bookkeeping.plan import plan_score
from jobs.bookkeeping.stage_records import score_key, scored_dataset
from jobs.stages import score as score_module
from pipeline import storage
from pipeline.combine import learned as learned_weights_module
from pipeline.combine.learned import GAP_NATS, learn_weights, learned_weights, likeliest_mixture
from pipeline.errors import ConfigError
from pipeline.fingerprint import differences
from pipeline.run.training_spec import training_specs
from pipeline.sequences import write_dataset
from tests.support.fabricated import FabricatedRun, FakePools


def mean_log_likelihood(weights: np.ndarray, gold_MP: np.ndarray) -> float:
    return float(np.log((weights[:, None] * np.exp(gold_MP)).sum(axis=0)).mean())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), num_teachers=st.integers(1, 3), spread=st.floats(0.01, 6))
def test_no_weights_on_a_grid_are_likelier(seed, num_teachers, spread):
    gold_MP = -np.abs(np.random.default_rng(seed).normal(0, spread, (num_teachers, 60)))
    weights, gap = likeliest_mixture(gold_MP)
    assert weights.sum() == pytest.approx(1) and weights.min() >= 0
    assert gap <= 10 * GAP_NATS  # where teachers are nearly alike, its steps may not suffice
    found = mean_log_likelihood(weights, gold_MP)
    grid = np.linspace(0, 1, 41)
    for point in itertools.product(grid, repeat=num_teachers - 1):
        if sum(point) <= 1:
            other = np.array([*point, 1 - sum(point)])
            assert mean_log_likelihood(other, gold_MP) <= found + gap + 1e-12


def test_the_order_of_teachers_and_positions_moves_nothing_that_is_stored():
    generator = np.random.default_rng(0)
    gold_MP = -np.abs(generator.normal(0, 2, (3, 400)))
    weights, _ = likeliest_mixture(gold_MP)
    again, _ = likeliest_mixture(gold_MP[::-1][:, generator.permutation(400)])
    np.testing.assert_allclose(again[::-1], weights, atol=1e-9)


def test_a_mixture_that_is_known_is_found():
    """Positions drawn from a mixture of 0.7 and 0.3 of two known distributions."""
    generator = np.random.default_rng(1)
    teachers = np.array([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]])
    drawn = generator.choice(3, 40_000, p=np.array([0.7, 0.3]) @ teachers)
    weights, _ = likeliest_mixture(np.log(teachers[:, drawn]))
    assert weights == pytest.approx([0.7, 0.3], abs=0.02)


@pytest.fixture
def run(tmp_path, monkeypatch) -> FabricatedRun:
    """Run scored by stand-ins, in which every third sequence is in the validation split."""
    monkeypatch.setattr(score_module, "run_pools", FakePools())
    run = FabricatedRun(tmp_path, overrides=["combine={method: mixture, weights: {type: learned}}"])
    split_off(run, run.write_answers(0, 9))
    return run


def split_off(run, entries, splits=("train", "validation", "holdout")) -> None:
    entries = [
        dataclasses.replace(entry, split=splits[n % len(splits)]) for n, entry in enumerate(entries)
    ]
    record = {"key": "none", "dataset": write_dataset(run.layout, entries)}
    storage.write_json(run.layout.stage_record("synthesize"), record)


def test_score_learns_and_the_training_is_what_was_learned(run):
    assert learned_or_none(run) is None
    run.score()
    weights = learned_weights(run.config.combine, run.layout)
    assert weights.keys() == {"arithmetic", "words"}
    spec, *_ = training_specs(run.prepare(), "dataset")
    assert spec.combine.weights.domains == run.prepare().combine().weights.domains
    assert spec.combine.weights.domains == weights
    identity = spec.identity()
    assert identity["combine"]["learned"] == weights
    moved = dataclasses.replace(
        spec, learned=weights | {"words": {"arithmetic": 1.0, "words": 0.0}}
    )
    lines = differences(identity, moved.identity())
    assert lines and all(line.startswith("combine.learned.words.") for line in lines)
    stored = storage.read_json(run.layout.learned_weights)["provenance"]
    entries = run.entries()
    assert stored["split"] == "validation"
    assert stored["caches"]["words"] == {
        "fingerprint": spec.cache_fingerprints["words"],
        "generation": 1,
    }
    for domain, fit in stored["domains"].items():
        members = [e for e in entries if e.domain == domain and e.split == "validation"]
        assert fit["positions"] == sum(e.num_positions for e in members) > 0
        assert fit["gold_logprob_mixture"] >= max(fit["gold_logprob"].values()) - 1e-4


def test_tokens_that_every_teacher_masks_say_nothing(run, monkeypatch):
    read = learned_weights_module._gold_logprobs

    def masked(entries, reader):
        found = read(entries, reader)
        found[:2] = -np.inf
        return found

    run.score()
    monkeypatch.setattr(learned_weights_module, "_gold_logprobs", masked)
    storage.remove(run.layout.learned_weights)
    run.score()
    stored = storage.read_json(run.layout.learned_weights)["provenance"]["domains"]
    assert {fit["impossible_positions"] for fit in stored.values()} == {2}
    for weights in learned_weights(run.config.combine, run.layout).values():
        assert sum(weights.values()) == pytest.approx(1)


def test_lost_weights_are_learned_again(run):
    """Nothing is missing in the caches; only the score stage can make the file."""
    dataset, prepared = run.score(), run.prepare()
    kept = learned_weights(run.config.combine, run.layout)
    record = {"key": score_key(prepared), "dataset": dataset}
    storage.write_json(run.layout.stage_record("score"), record)
    assert plan_score(prepared, run.entries()).todo == 0
    storage.remove(run.layout.learned_weights)
    plan = plan_score(prepared, run.entries())
    assert plan.todo == 1 and "words 0" in plan.summary
    assert scored_dataset(prepared) is None
    run.score()
    assert learned_weights(run.config.combine, run.layout) == kept
    assert plan_score(prepared, run.entries()).todo == 0


def learned_or_none(run):
    try:
        return learned_weights(run.config.combine, run.layout)
    except ConfigError as error:
        assert "the score stage learns combine.weights" in str(error)
        return None


def test_the_holdout_and_the_training_split_are_not_read(run):
    run.score()
    expected = learned_weights(run.config.combine, run.layout)
    entries = [e for e in run.entries() if e.split == "validation"]
    prepared = run.prepare()
    caches = prepared.cache_layouts()
    fingerprints = dict.fromkeys(caches, "f")
    alone = learn_weights(run.layout, caches, fingerprints, "d", entries[::-1])
    assert alone == expected


def test_a_domain_without_validation_sequences_is_refused(run):
    entries = run.entries()
    split_off(run, entries, splits=("train", "holdout"))
    with pytest.raises(ConfigError, match=r"'arithmetic' has 0 sequences in the validation split"):
        run.score()


def test_weights_that_are_given_learn_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(score_module, "run_pools", FakePools())
    run = FabricatedRun(tmp_path)
    run.write_answers(0, 2)
    run.score()
    assert learned_weights(run.config.combine, run.layout) == {}
    assert not storage.exists(run.layout.learned_weights)
    spec, *_ = training_specs(run.prepare(), "dataset")
    assert "learned" not in spec.identity()["combine"]
