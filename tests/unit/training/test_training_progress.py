"""The lines that a person reads while a student trains."""

import json

import pytest

from students.progress import LINES_PER_TRAINING, MetricsLog, Pace, describe_metrics, read_metrics


def values(step, **more):
    return {"step": step, "train/loss": 1.23456, "train/tokens_per_second": 8560.4, **more}


@pytest.mark.parametrize("steps", [1, 6, 20, 500, 99_999])
def test_a_training_says_little_however_long(steps):
    pace = Pace(steps)
    said = [pace.line(values(step, **{"holdout/loss": 2.0})) for step in range(1, steps + 1)]
    said = [line for line in said if line]
    assert min(steps, LINES_PER_TRAINING) <= len(said) <= LINES_PER_TRAINING + 2
    assert said[0].startswith(f"step 1/{steps}: ")
    assert said[-1].startswith(f"step {steps}/{steps}: ")


def test_a_line_has_losses_and_speed_and_keeps_the_last_hold_out_loss():
    pace = Pace(100)
    assert pace.line(values(1)) == "step 1/100: loss 1.235, 8560 tokens/s"
    assert pace.line(values(3, **{"holdout/loss": 2.5})) is None
    assert pace.line(values(6)) == "step 6/100: loss 1.235, hold-out loss 2.5, 8560 tokens/s"
    assert pace.line(values(11)) == "step 11/100: loss 1.235, 8560 tokens/s"


def test_a_restarted_training_is_heard_again():
    pace = Pace(100)
    assert pace.line(values(50))
    assert pace.line(values(41))
    assert pace.line(values(42)) is None
    assert pace.line(values(46))


def test_a_description_leaves_out_what_is_not_there():
    assert describe_metrics({"step": 3}) == ""


def test_metrics_after_the_resumed_step_are_dropped_and_an_unfinished_line_ignored(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(str(path), 0)
    for step in (1, 2, 3):
        log.write(step, {"train/loss": float(step)})
    log.close()
    with path.open("a") as stream:
        stream.write('{"step": 4, "tra')
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    resumed = MetricsLog(str(path), 2)
    resumed.write(3, {"train/loss": 9.0})
    resumed.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 9.0)]
