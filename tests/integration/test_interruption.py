"""A run that is killed ends like one that nobody disturbed, on heads that leave nothing.

It is the quickstart of docs/running.md with losses on hidden states, made small: every stage for
real. Kills while scoring are in `test_faults.py`. The run that is killed while it trains has the
caches of the other: two engines' float16 targets may differ in the last bit, and trainings then in
more.
"""

import json
import random
import re
import shlex
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from jobs.cluster.local_head import LocalHead
from students.progress import read_metrics
from tests.support.caches import cache_folder, cached_rows, dataset, shards
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
from tests.support.documents import of_kind, with_stand_ins
from tests.support.network import Listener, listeners
from tests.support.quickstart import DOMAINS, read_lines, some_prompts

pytestmark = pytest.mark.timeout(900)
TEACHERS, RUN, KILLED = DOMAINS, "hidden_states", "killed"
STATE_LOSSES = ("hidden_state_cosine_words_4_2", "relation_distance_arithmetic_4_2")
STAGE_NAMES = ("prepare", "synthesize", "score", "train", "export", "evaluate")
NUM_TRAIN, NUM_HOLDOUT = 150, 20  # prompts of each domain
STEPS, CHECKPOINT_EVERY = 60, 10
KILLED_AFTER = random.Random(4).randrange(CHECKPOINT_EVERY + 1, STEPS // 2)
"""Steps taken, at least, when the run is killed."""
SECONDS_TO_VANISH = 60


@dataclass(frozen=True, kw_only=True)
class Run:
    """One complete run: its command without an address, its storage root and what it printed."""

    arguments: list[str]
    root: Path
    printed: str
    name: str = RUN

    @property
    def folder(self) -> Path:
        return self.root / "runs" / self.name

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "student/metrics.jsonl")


@dataclass(frozen=True, kw_only=True)
class Disturbed(Run):
    """A run of two commands, the first of which was killed.

    Attributes:
        metrics_at_kill: lines of the metrics after the kill.
        checkpoint_at_kill: step of the newest complete checkpoint then.
        heard: ports on which anything of the second command's head listened.
        litter: what the commands have left in the folder for temporary files.
    """

    metrics_at_kill: list[dict[str, Any]]
    checkpoint_at_kill: int
    heard: set[Listener]
    litter: list[str]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What makes it small: 18 shards a teacher, and steps slow enough to be interrupted."""
    folder = tmp_path_factory.mktemp("prompts")
    return {
        "prompts.sources.0.path": some_prompts("prompts.jsonl", NUM_TRAIN, folder),
        "prompts.sources.1.path": some_prompts("holdout.jsonl", NUM_HOLDOUT, folder),
        "synthesis.recipes.0.sampling.temperature": 0.7,  # so that the checker drops no answer
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
    (written,) = [each for each in of_kind("polystill run") if "hidden_state" in each]
    values = {"storage.root": root, **settings}
    return [*with_stand_ins(written)[1:], *(f"{key}={value}" for key, value in values.items())]


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
    return Run(arguments=arguments, root=root, printed=finished.stdout)


@pytest.fixture(scope="module")
def disturbed(
    undisturbed: Run,
    settings: dict[str, Any],
    temporary: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Disturbed:
    """The run again under another name, on heads of its own: killed while it trains, then ended."""
    root = undisturbed.root
    arguments = run_arguments(settings | {"name": KILLED}, root)
    student = root / "runs" / KILLED / "student"
    metrics = student / "metrics.jsonl"
    env = {"TMPDIR": str(temporary)}

    command = start_polystill(tmp_path_factory.mktemp("logs"), *arguments, env=env)
    command.wait_until(
        f"step {KILLED_AFTER}", lambda: len(read_metrics(metrics)) >= KILLED_AFTER, 700
    )
    end_and_leave_nothing(command, signal.SIGKILL)
    metrics_at_kill = read_lines(student / "metrics.jsonl")
    checkpoint_at_kill = complete_checkpoints(student)[-1]
    assert not (student / "training.json").exists(), "training ended before the kill"

    command = start_polystill(tmp_path_factory.mktemp("logs"), *arguments, env=env)
    heard: set[Listener] = set()
    deadline = time.monotonic() + 800
    while command.process.poll() is None:
        assert time.monotonic() < deadline, command.printed()
        heard.update(listeners(command.family()))
        time.sleep(1)
    assert command.process.returncode == 0, command.printed()
    return Disturbed(
        arguments=arguments,
        root=root,
        printed=command.stdout.read_text(),
        name=KILLED,
        metrics_at_kill=metrics_at_kill,
        checkpoint_at_kill=checkpoint_at_kill,
        heard=heard,
        litter=sorted(path.name for path in temporary.iterdir()),
    )


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    """A folder for temporary files, with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="h", dir="/tmp") as folder:
        yield Path(folder)


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
    assert found == [(str(number), stage) for number, stage in enumerate(STAGE_NAMES, start=1)]
    assert str(undisturbed.folder / "report.html") in undisturbed.printed


@pytest.mark.parametrize("teacher", TEACHERS)
def test_both_runs_have_every_row(undisturbed: Run, disturbed: Disturbed, teacher: str) -> None:
    sequences = dataset(undisturbed.root, RUN)
    assert list(dataset(disturbed.root, KILLED)) == list(sequences)
    # Most answers of these teachers are right and kept.
    assert len(sequences) > len(DOMAINS) * NUM_TRAIN
    assert cached_rows(shards(undisturbed.root, teacher)).keys() == sequences.keys()


def test_a_kill_while_training_resumes_from_the_last_checkpoint(disturbed: Disturbed) -> None:
    """The head that ends with its command asks the worker to end, which makes a checkpoint first if
    there is time for it.
    """
    step, last = disturbed.checkpoint_at_kill, disturbed.metrics_at_kill[-1]["step"]
    assert last // CHECKPOINT_EVERY * CHECKPOINT_EVERY <= step <= last < STEPS and step > 0
    assert f"student: step {step} of {STEPS}, workers" in disturbed.printed
    # The lines hold measured speeds, so those of a step that was taken again would differ.
    assert disturbed.metrics[:step] == disturbed.metrics_at_kill[:step]
    for number, stage in enumerate(STAGE_NAMES[:3], start=1):
        assert f"[{number}/6 {stage}] up to date" in disturbed.printed


def test_nothing_of_a_whole_run_listens_beyond_loopback(disturbed: Disturbed) -> None:
    """Training, export and the engines of the evaluation."""
    assert [each for each in disturbed.heard if not each.is_on_loopback] == []
    assert {"gcs_server", "raylet", "ray::*", "python"} <= {
        each.process for each in disturbed.heard
    }


def test_a_run_leaves_no_temporary_file(disturbed: Disturbed) -> None:
    assert disturbed.litter == []


def test_both_trainings_take_the_same_steps_to_the_same_loss(
    undisturbed: Run, disturbed: Disturbed
) -> None:
    """Bit for bit: the same caches, data, threads and order of sums."""
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
    assert losses[1] == losses[0]


def test_losses_on_hidden_states_are_logged_apart_and_leave_no_weights(undisturbed: Run) -> None:
    lines = undisturbed.metrics
    for name in STATE_LOSSES:
        values = [line[f"train/{name}"] for line in lines if "train/loss" in line]
        assert len(values) == STEPS and all(np.isfinite(values)) and min(values) > 0
        assert [line["step"] for line in lines if f"holdout/{name}" in line] == [STEPS]
    first = lines[0]
    weighted = [0.2 * first[f"train/{name}"] for name in STATE_LOSSES]
    assert first["train/loss"] == pytest.approx(first["train/forward_kl"] + sum(weighted), rel=1e-5)
    exported = AutoModelForCausalLM.from_pretrained(undisturbed.folder / "export/student")
    assert not [name for name in exported.state_dict() if "projection" in name]


@pytest.mark.parametrize("teacher", TEACHERS)
def test_stored_states_are_what_the_final_norm_gets(undisturbed: Run, teacher: str) -> None:
    """As transformers computes them."""
    model = AutoModelForCausalLM.from_pretrained(
        QUICKSTART / "teachers" / teacher, dtype=torch.float32
    )
    before_norm = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0][0]))
    stored = {
        row["sequence_id"]: np.frombuffer(row["states"], "<u2").reshape(-1, 128)
        for path in shards(undisturbed.root, f"{teacher}+features")
        for row in pq.read_table(path).to_pylist()
    }
    sequences = dataset(undisturbed.root, RUN)
    assert stored.keys() == sequences.keys()
    for identifier, sequence in list(sequences.items())[:4]:
        with torch.no_grad():
            model(torch.tensor(sequence.input_ids[None].astype(np.int64)))
        expected = before_norm.pop()[sequence.positions - 1].numpy()
        values = (stored[identifier].astype("<u4") << 16).view("<f4")
        # half a step of bfloat16 is 2**-9 of a value; and float32 sums in another order
        np.testing.assert_allclose(values, expected, rtol=2**-8, atol=1e-3)
    folder = cache_folder(undisturbed.root, f"{teacher}+features")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["provenance"]["engines"][0]["hidden_layers"] == [4]


def test_all_caches_pass_their_checks(disturbed: Disturbed) -> None:
    checked = polystill("cache", "verify", *disturbed.arguments[1:])
    assert checked.returncode == 0, checked.stdout
    names = [name for teacher in TEACHERS for name in (teacher, f"{teacher}+features")]
    assert all(f"{name}: " in checked.stdout for name in names)


def state_of(name: str, status: str) -> str:
    """The state of a job in what `status` prints."""
    (state,) = re.findall(rf"^{re.escape(name)} +([A-Z]+) ", status, re.MULTILINE)
    return state


def test_a_cluster_shows_its_jobs_and_their_logs(ray_head: LocalHead, undisturbed: Run) -> None:
    token = token_environment(ray_head.token)
    submitted = re.findall(r"\] job (\S+)", undisturbed.printed)
    assert len(submitted) == len(STAGE_NAMES)
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
    assert follow == f"follow it with: polystill logs {name} --address {ray_head.address} --follow"
    log = polystill(*shlex.split(follow)[4:], env=token).stdout
    assert state_of(name, polystill("status", *address, env=token).stdout) == "SUCCEEDED"
    assert "nothing to do: every stage is complete" in log
    assert str(undisturbed.folder / "report.html") in log
