"""A run that is killed ends like one that nobody disturbed, on heads that leave nothing.

Kills while scoring are in `test_faults.py`.
"""

import json
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.local_head import LocalHead
from tests.support.caches import assert_rows_agree, cached_rows, dataset, shards
from tests.support.command_line import (
    QUICKSTART,
    ROOT,
    RunningCommand,
    file_times,
    local_head_folder,
    polystill,
    processes_of_head,
    start_polystill,
    token_environment,
)
from tests.support.quickstart import DOMAINS, read_lines, some_prompts

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]
TEACHERS = DOMAINS
STAGES = ("prepare", "synthesize", "score", "train", "export", "evaluate")
NUM_TRAIN, NUM_HOLDOUT = 150, 20  # prompts of each domain
STEPS, CHECKPOINT_EVERY = 60, 10
SECONDS_TO_VANISH = 60


@dataclass(frozen=True)
class Run:
    """One complete run: its command without an address, its storage root and what it printed."""

    arguments: list[str]
    root: Path
    printed: str

    @property
    def folder(self) -> Path:
        return self.root / "runs/quickstart"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "student/metrics.jsonl")


@dataclass(frozen=True)
class Disturbed(Run):
    """A run of two commands, the first of which was killed.

    Attributes:
        metrics_at_kill: lines of the metrics after the kill.
        checkpoint_at_kill: step of the newest complete checkpoint then.
    """

    metrics_at_kill: list[dict[str, Any]]
    checkpoint_at_kill: int


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The quickstart made small: 18 shards a teacher, and steps slow enough to be interrupted."""
    folder = tmp_path_factory.mktemp("prompts")
    return {
        "prompts.sources.0.path": some_prompts("prompts.jsonl", NUM_TRAIN, folder),
        "prompts.sources.1.path": some_prompts("holdout.jsonl", NUM_HOLDOUT, folder),
        "synthesis.prompts_per_shard": 20,
        "training.steps": STEPS,
        "training.warmup_steps": 5,
        "training.sequences_per_step": 256,
        "training.tokens_per_micro_batch": 512,
        "training.log_every_steps": 1,
        "training.evaluate_every_steps": STEPS,
        "training.checkpoint_every_steps": CHECKPOINT_EVERY,
        "evaluation.twin": "false",
        "evaluation.max_prompts_per_domain": 4,
    }


def run_arguments(settings: dict[str, Any], root: Path) -> list[str]:
    values = {"storage.root": root, **settings}
    config = str(QUICKSTART / "config.yaml")
    return ["run", config, *(f"{key}={value}" for key, value in values.items())]


@pytest.fixture(scope="module")
def undisturbed(
    ray_head: LocalHead, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """The run on a cluster that is there already."""
    root = tmp_path_factory.mktemp("undisturbed")
    seen_by_all = {"storage.shared_roots": f"[{root.parent}, {ROOT}]"}
    arguments = run_arguments(settings | seen_by_all, root)
    token = token_environment(ray_head.token)
    finished = polystill(*arguments, "--address", ray_head.address, seconds=800, env=token)
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    return Run(arguments, root, finished.stdout)


@pytest.fixture(scope="module")
def disturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    """The run on heads of its own: killed while it trains, then ended."""
    root = tmp_path_factory.mktemp("disturbed")
    arguments = run_arguments(settings, root)
    student = root / "runs/quickstart/student"

    command = start_polystill(tmp_path_factory.mktemp("logs"), *arguments)
    command.wait_until("a checkpoint", lambda: bool(complete_checkpoints(student)), 700)
    end_and_leave_nothing(command, signal.SIGKILL)
    metrics_at_kill = read_lines(student / "metrics.jsonl")
    checkpoint_at_kill = complete_checkpoints(student)[-1]
    assert not (student / "training.json").exists(), "training ended before the kill"

    finished = polystill(*arguments, seconds=800)
    assert finished.returncode == 0, f"{finished.stdout}\n{finished.stderr}"
    return Disturbed(arguments, root, finished.stdout, metrics_at_kill, checkpoint_at_kill)


def complete_checkpoints(student: Path) -> list[int]:
    """The steps of the checkpoints that are complete."""
    markers = student.glob("checkpoints/step-*/COMPLETE")
    return sorted(int(marker.parent.name.removeprefix("step-")) for marker in markers)


def end_and_leave_nothing(command: RunningCommand, number: signal.Signals) -> None:
    """Signals the command alone and checks that all processes of its head end soon."""
    family = command.family()
    assert any(process.name() == "raylet" for process in family)
    folder = local_head_folder(family)
    command.process.send_signal(number)
    deadline = time.monotonic() + SECONDS_TO_VANISH
    command.process.wait(SECONDS_TO_VANISH)
    _, alive = psutil.wait_procs(family, timeout=deadline - time.monotonic())
    assert alive == []
    assert processes_of_head(folder) == [] and not folder.exists()


def test_ctrl_c_says_one_line_and_leaves_no_process(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    command = start_polystill(tmp_path / "log", *run_arguments(settings, tmp_path / "out"))
    command.wait_until("a job", lambda: "[1/6 prepare] job" in command.stdout.read_text(), 120)
    end_and_leave_nothing(command, signal.SIGINT)
    assert command.process.returncode == 130
    expected = "polystill: interrupted; run the same command again to go on\n"
    assert command.stderr.read_text() == expected
    assert "nothing to do" not in command.stdout.read_text()


def test_every_stage_of_the_undisturbed_run_is_told(undisturbed: Run) -> None:
    found = re.findall(r"^\[(\d)/6 (\w+)\] done in \d+ s$", undisturbed.printed, re.MULTILINE)
    assert found == [(str(number), stage) for number, stage in enumerate(STAGES, start=1)]
    assert str(undisturbed.folder / "report.html") in undisturbed.printed


@pytest.mark.parametrize("teacher", TEACHERS)
def test_both_runs_have_the_same_rows(undisturbed: Run, disturbed: Disturbed, teacher: str) -> None:
    sequences = dataset(undisturbed.root, "quickstart")
    assert list(dataset(disturbed.root, "quickstart")) == list(sequences)
    # Most answers of these teachers are right and kept.
    assert len(sequences) > len(DOMAINS) * NUM_TRAIN
    expected = cached_rows(shards(undisturbed.root, teacher))
    assert expected.keys() == sequences.keys()
    assert_rows_agree(cached_rows(shards(disturbed.root, teacher)), expected)


def test_a_kill_while_training_resumes_from_the_last_checkpoint(disturbed: Disturbed) -> None:
    step = disturbed.checkpoint_at_kill
    assert 0 < step < STEPS and step % CHECKPOINT_EVERY == 0
    assert step <= disturbed.metrics_at_kill[-1]["step"] < STEPS
    assert f"student: step {step} of {STEPS}, workers" in disturbed.printed
    # The lines hold measured speeds, so those of a step that was taken again would differ.
    assert disturbed.metrics[:step] == disturbed.metrics_at_kill[:step]
    for number, stage in enumerate(STAGES[:3], start=1):
        assert f"[{number}/6 {stage}] up to date" in disturbed.printed


def test_both_trainings_take_the_same_steps_to_the_same_loss(
    undisturbed: Run, disturbed: Disturbed
) -> None:
    losses = []
    for run in (undisturbed, disturbed):
        summary = json.loads((run.folder / "student/training.json").read_text())
        assert summary["steps"] == STEPS
        steps = [line["step"] for line in run.metrics if "train/loss" in line]
        assert steps == list(range(1, STEPS + 1))
        losses.append([line["train/loss"] for line in run.metrics if "train/loss" in line])
        (holdout,) = [line["holdout/loss"] for line in run.metrics if "holdout/loss" in line]
        losses[-1].append(holdout)
    assert losses[0][-1] < 0.9 * losses[0][0]
    # Same data in the same order; at most the rounding of a few float16 targets differs.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def state_of(name: str, status: str) -> str:
    """The state of a job in what `status` prints."""
    (state,) = re.findall(rf"^{re.escape(name)} +([A-Z]+) ", status, re.MULTILINE)
    return state


def test_a_cluster_shows_its_jobs_and_their_logs(ray_head: LocalHead, undisturbed: Run) -> None:
    token = token_environment(ray_head.token)
    submitted = re.findall(r"\] job (\S+)", undisturbed.printed)
    assert len(submitted) == len(STAGES)
    status = polystill("status", "--address", ray_head.address, env=token)
    assert {state_of(name, status.stdout) for name in submitted} == {"SUCCEEDED"}
    log = polystill("logs", submitted[2], "--address", ray_head.address, env=token)
    assert log.returncode == 0
    told = [line for line in undisturbed.printed.splitlines() if "new shards" in line]
    assert len(told) == 1 and told[0].removeprefix("[3/6 score] ") in log.stdout
    other = polystill("status", "--address", ray_head.address, "--run", "another", env=token)
    assert other.stdout == "no jobs of the run another\n"


def test_a_finished_stage_is_up_to_date(ray_head: LocalHead, undisturbed: Run) -> None:
    before = file_times(undisturbed.root)
    finished = polystill(
        "submit",
        "score",
        *undisturbed.arguments[1:],
        "--address",
        ray_head.address,
        env=token_environment(ray_head.token),
    )
    assert finished.returncode == 0, finished.stderr
    assert "up to date (of " in finished.stdout
    assert file_times(undisturbed.root) == before


def test_a_detached_run_goes_on_in_the_cluster(ray_head: LocalHead, undisturbed: Run) -> None:
    token, address = token_environment(ray_head.token), ["--address", ray_head.address]
    finished = polystill(*undisturbed.arguments, *address, "--detach", env=token)
    assert finished.returncode == 0, finished.stderr
    submitted, follow = finished.stdout.splitlines()
    name = submitted.removeprefix("submitted ")
    assert follow == f"follow it with: polystill logs {name} --address {ray_head.address}"
    deadline = time.monotonic() + 120
    while (state := state_of(name, polystill("status", *address, env=token).stdout)) != "SUCCEEDED":
        assert time.monotonic() < deadline and state in ("PENDING", "RUNNING"), state
    log = polystill("logs", name, *address, env=token).stdout
    assert "nothing to do: every stage is complete" in log
    assert str(undisturbed.folder / "report.html") in log
