"""Failures of workers: an error that would come again is told once and at once, and restarts that
lead to a new checkpoint are not counted.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayActorError
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)

from pipeline.errors import TrainingError
from students.departure import NodeLeaves
from students.launching.failures import Failures, advice, described
from students.launching.notices import scratch_folder


def lost(preempted: bool = False) -> WorkerHealthCheckFailedError:
    """What Ray Train gives for a worker whose process or node is gone."""
    return WorkerHealthCheckFailedError(
        "A worker health check failed.", RayActorError(error_msg="gone", preempted=preempted)
    )


def make_spec(folder: Path, max_failures: int = 2) -> Any:
    return SimpleNamespace(
        student="main",
        folder=str(folder),
        metrics_path=str(folder / "metrics.jsonl"),
        config=SimpleNamespace(training=SimpleNamespace(max_failures=max_failures)),
    )


def failures(spec: Any) -> Failures:
    return Failures(spec, "2 workers of 1 CPU each")


def complete_checkpoint(spec: Any, step: int) -> None:
    folder = Path(spec.folder, "checkpoints", f"step-{step:08d}")
    folder.mkdir(parents=True)
    (folder / "state.json").write_text('{"partitioning": {"workers": 1, "zero_optimization": {}}}')
    (folder / "rng-0.pt").touch()
    (folder / "COMPLETE").touch()


def notices(spec: Any) -> list[dict[str, Any]]:
    files = sorted((scratch_folder(spec.folder) / "notices").glob("*.json"))
    return [json.loads(file.read_text()) for file in files]


def test_an_error_for_the_user_ends_the_run_at_any_time(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, max_failures=-1)
    Path(spec.metrics_path).write_text("{}\n")
    with pytest.raises(TrainingError, match="diverged"):
        failures(spec).after_exception(None, {1: lost(), 0: TrainingError("training diverged")})


def test_a_fault_of_the_code_ends_the_run_before_its_first_step_only(tmp_path: Path) -> None:
    spec, errors = make_spec(tmp_path), {1: AttributeError("no `layers`")}
    with pytest.raises(TrainingError, match="before its first step: AttributeError: no `layers`"):
        failures(spec).after_exception(None, dict(errors))
    Path(spec.metrics_path).write_text("{}\n")
    failures(spec).after_exception(None, dict(errors))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("connection closed by peer"),
        OSError("stale"),
        ActorDiedError(),
        lost(),
        WorkerHealthCheckTimeoutError("no answer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_lost_worker_causes_is_left_to_a_restart(tmp_path: Path, error: Exception) -> None:
    """Also before the first step, while large models are loaded."""
    failures(make_spec(tmp_path)).after_exception(None, {0: error})


@pytest.mark.parametrize("max_failures", [0, 1, 2])
def test_failures_without_a_new_checkpoint_end_the_run(tmp_path: Path, max_failures: int) -> None:
    judge = failures(make_spec(tmp_path, max_failures))
    for _ in range(max_failures):
        judge.after_exception(None, {0: lost()})
    with pytest.raises(TrainingError) as caught:
        judge.after_exception(None, {0: lost(), 1: RuntimeError("connection closed by peer")})
    message = str(caught.value)
    assert "rank 0: lost: " in message and "gone" in message and "closed by peer" not in message
    assert f"failure {max_failures + 1} before the first checkpoint" in message
    assert f"training.max_failures is {max_failures}" in message


def test_a_training_that_goes_on_between_losses_outlives_any_number_of_them(
    tmp_path: Path,
) -> None:
    spec = make_spec(tmp_path, max_failures=1)
    complete_checkpoint(spec, 10)
    judge = failures(spec)
    for step in range(20, 100, 10):
        judge.after_exception(None, {1: lost()})
        complete_checkpoint(spec, step)
    judge.after_exception(None, {1: lost()})
    with pytest.raises(TrainingError, match="failure 2 since checkpoint step-00000090"):
        judge.after_exception(None, {1: lost()})


def test_workers_that_end_after_a_notice_are_not_counted(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, max_failures=0)
    judge = failures(spec)
    left: dict[int, Exception] = dict.fromkeys((0, 1), NodeLeaves("node n-s1 goes away soon"))
    judge.after_exception(None, left)
    judge.after_exception(None, {0: RuntimeError("closed by peer"), 1: lost(preempted=True)})
    assert [notice["waits"] for notice in notices(spec)] == [True, True]
    with pytest.raises(TrainingError):
        judge.after_exception(None, {1: lost()})


def test_no_limit_is_no_limit(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, max_failures=-1)
    judge = failures(spec)
    for _ in range(20):
        judge.after_exception(None, {1: lost()})
    assert len(notices(spec)) == 20


def test_a_restart_is_told_with_its_cause_and_what_it_waits_for(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    failures(spec).after_exception(None, {1: lost()})
    (notice,) = notices(spec)
    assert notice["waits"]
    assert notice["text"].startswith("failed: rank 1: lost: ")
    assert notice["text"].endswith(
        "restart 1 of 2 before the first checkpoint, with 2 workers of 1 CPU each"
    )


def test_equal_errors_are_told_once_and_in_few_lines() -> None:
    trace = "\x1b[36mray::x\x1b[39m\n" + "  File y\n" * 60 + "RuntimeError: no route to host"
    text = described({rank: RuntimeError(trace) for rank in (3, 0, 1)})
    assert text.startswith("rank 0, 1, 3: RuntimeError: ")
    assert text.endswith("no route to host")
    assert text.count("\n") == 0 and "\x1b" not in text


def test_resuming_is_advised_only_with_a_checkpoint(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    assert "no checkpoint yet: mend the cause" in advice(spec.folder)
    complete_checkpoint(spec, 10)
    assert "run the same command again to resume" in advice(spec.folder)
