"""What the evaluate stage makes of measurements, without any engine."""

import math
from pathlib import Path

import pytest

from jobs.evaluate import _difference, _model
from pipeline.loading import load_config
from pipeline.report import pooled
from teachers.answering import AnsweredPrompts

QUICKSTART = Path(__file__).resolve().parents[2] / "examples/quickstart/config.yaml"
ENGINE = {"num_parameters": 1, "weight_bytes": 4, "peak_memory_bytes": None}


def test_a_domain_without_kept_holdout_answers_is_still_reported() -> None:
    answered = AnsweredPrompts(
        correct={"arithmetic": 0.5, "words": 0.0},
        num_checked={"arithmetic": 4, "words": 4},
        num_too_long=0,
        tokens_per_second=10.0,
        tokens_per_second_range=(9.0, 11.0),
        latency_seconds=0.1,
        gold_logprobs={},
    )
    measured = {
        "holdout_tokens": 9,
        "holdout_loss": 0.5,
        "kl_to_mixture": 0.1,
        "kl_bounded_mass": 0.0,
        "top1_agreement": 0.9,
    }
    figures = {"domains": {"arithmetic": measured}}
    model = _model(load_config(QUICKSTART), "student", answered, ENGINE, figures)
    assert model["domains"]["words"]["exact_match"] == 0.0
    overall = pooled(model)
    assert overall["exact_match"] == 0.25 and overall["holdout_loss"] == 0.5


def test_the_largest_difference_is_over_all_tokens() -> None:
    trained, served = {"a": [-1.0, -2.0], "b": [-3.0]}, {"a": [-1.0, -2.5], "b": [-2.0]}
    assert _difference(trained, served) == pytest.approx(1.0)


def test_a_difference_that_is_no_number_is_not_overlooked() -> None:
    trained, served = {"a": [-1.0, -2.0]}, {"a": [-1.5, math.nan]}
    assert math.isnan(_difference(trained, served))
