"""Failures of workers: an error that would come again is told once and at once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from pipeline.errors import TrainingError
from students.launch import StopAtOnce, _interrupted


@pytest.fixture
def spec(tmp_path: Path) -> Any:
    folder = str(tmp_path)
    return SimpleNamespace(
        student="main", folder=folder, metrics_path=str(tmp_path / "metrics.jsonl")
    )


def test_an_error_for_the_user_ends_the_run_at_any_time(spec: Any) -> None:
    Path(spec.metrics_path).write_text("{}\n")
    with pytest.raises(TrainingError, match="diverged"):
        StopAtOnce(spec).after_exception(None, {0: TrainingError("training diverged")})


def test_a_fault_of_the_code_ends_the_run_before_its_first_step_only(spec: Any) -> None:
    errors: dict[int, Exception] = {1: AttributeError("no `layers`")}
    with pytest.raises(TrainingError, match="before its first step: AttributeError: no `layers`"):
        StopAtOnce(spec).after_exception(None, errors)
    Path(spec.metrics_path).write_text("{}\n")
    StopAtOnce(spec).after_exception(None, errors)


@pytest.mark.parametrize(
    "error", [RuntimeError("connection closed by peer"), OSError("stale"), ActorDiedError()]
)
def test_what_a_lost_worker_causes_is_left_to_a_restart(spec: Any, error: Exception) -> None:
    StopAtOnce(spec).after_exception(None, {0: error})


def test_resuming_is_advised_only_with_a_checkpoint(spec: Any, monkeypatch) -> None:
    assert "no checkpoint yet: mend the cause" in str(_interrupted(spec, RuntimeError("lost")))
    monkeypatch.setattr("students.launch.complete_checkpoints", lambda folder: [Path(folder)])
    assert "run the same command again to resume" in str(_interrupted(spec, RuntimeError("lost")))
