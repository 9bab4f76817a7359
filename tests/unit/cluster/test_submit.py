"""Submission ids, uploads, locks and log lines, without a cluster."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray._private.runtime_env.packaging import get_uri_for_directory
from ray.job_submission import JobStatus

from jobs import distill
from jobs.__main__ import main
from jobs.bookkeeping.plan import StagePlan
from jobs.cluster import stage_jobs
from jobs.cluster.follow import LogLines, failure_message, follow
from jobs.cluster.local_head import local_head
from jobs.cluster.run_lock import alone
from jobs.cluster.submit import (
    DIGEST,
    FOLDER,
    RUN,
    STAGE,
    choose_submission,
    stop_with_stages,
    submission_id,
    submit_stage,
)
from jobs.cluster.upload import PACKAGES, build_upload
from jobs.stages import entry
from pipeline.config.load import load_config
from pipeline.config.rounds import layout_of
from pipeline.errors import ClusterError, ConfigError
from tests.support.logs import logged

ROOT = Path(__file__).resolve().parents[3]


def test_ids_name_run_stage_digest_and_attempt():
    assert submission_id("my-run", "score", "0a1b2c", 3) == "my-run-score-0a1b2c-a3"
    for run in ("my/run", "my run", "-run", "", "x" * 250):
        with pytest.raises(ConfigError, match="cannot be a job's id"):
            submission_id(run, "score", "0a1b2c", 1)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, ("r-score-d-a1", False)),
        ({"r-score-d-a1": JobStatus.RUNNING}, ("r-score-d-a1", True)),
        ({"r-score-d-a1": JobStatus.PENDING}, ("r-score-d-a1", True)),
        ({"r-score-d-a1": JobStatus.SUCCEEDED}, ("r-score-d-a2", False)),
        (
            {"r-score-d-a1": JobStatus.FAILED, "r-score-d-a2": JobStatus.STOPPED},
            ("r-score-d-a3", False),
        ),
        (
            {"r-score-d-a9": JobStatus.FAILED, "r-score-d-a10": JobStatus.FAILED},
            ("r-score-d-a11", False),
        ),
        # Jobs of other stages, digests and runs do not count, nor do foreign ids.
        (
            {
                "r-score-e-a1": JobStatus.RUNNING,
                "r-train-d-a1": JobStatus.RUNNING,
                "x-r-score-d-a1": JobStatus.RUNNING,
                "r-score-d-abc": JobStatus.RUNNING,
            },
            ("r-score-d-a1", False),
        ),
    ],
)
def test_a_going_job_is_attached_to_and_an_ended_one_followed(known, expected):
    assert choose_submission(known.items(), "r", "score", "d") == expected


class JobServer:
    """A job server that accepts every job."""

    def __init__(self, *jobs: SimpleNamespace):
        self.jobs = list(jobs)

    def list_jobs(self) -> list[SimpleNamespace]:
        return self.jobs

    def submit_job(self, submission_id: str, metadata: dict[str, str], **_: Any) -> str:
        self.jobs.append(job(submission_id, metadata))
        return submission_id

    def stop_job(self, submission_id: str) -> None:
        stopped = self._job(submission_id)
        if not stopped.status.is_terminal():
            stopped.status = JobStatus.STOPPED

    def get_job_status(self, submission_id: str) -> JobStatus:
        return self._job(submission_id).status

    def _job(self, submission_id: str) -> SimpleNamespace:
        return next(job for job in self.jobs if job.submission_id == submission_id)


def job(name: str, metadata: dict[str, str] | None, status=JobStatus.RUNNING) -> SimpleNamespace:
    return SimpleNamespace(submission_id=name, status=status, start_time=0, metadata=metadata)


def submit(server: JobServer, stage="train", digest="new", folder="/out/runs/r") -> str:
    return submit_stage(
        server,  # pyright: ignore[reportArgumentType]
        run="r",
        stage=stage,
        digest=digest,
        folder=folder,
        entrypoint="python",
        working_dir=None,
        env_vars={},
    )


@pytest.mark.parametrize("status", [JobStatus.RUNNING, JobStatus.PENDING])
def test_a_stage_that_goes_with_another_config_is_not_started_beside_it(status: JobStatus):
    server = JobServer()
    first = submit(server, digest="old")
    server.jobs[0].status = status
    with pytest.raises(ClusterError, match=rf"{first} runs train of the run r .*stop {first} "):
        submit(server)
    assert submit(server, digest="old") == first and len(server.jobs) == 1
    server.jobs[0].status = JobStatus.FAILED
    assert submit(server) == "r-train-new-a1"


def test_other_stages_folders_and_foreign_jobs_stand_in_nobodys_way():
    server = JobServer(job("foreign", None))
    submit(server, digest="old", stage="round2-train")
    submit(server, digest="old", folder="/elsewhere/runs/r")
    assert submit(server) == "r-train-new-a1"
    assert server.jobs[-1].metadata == {
        RUN: "r", STAGE: "train", DIGEST: "new", FOLDER: "/out/runs/r"
    }  # fmt: skip


def stop(server: JobServer, name: str) -> dict[str, JobStatus]:
    return dict(stop_with_stages(server, name))  # pyright: ignore[reportArgumentType]


def test_with_a_detached_run_its_stage_is_stopped_and_nothing_else():
    server = JobServer(job("foreign", None))
    done = submit(server, stage="score")
    server.jobs[-1].status = JobStatus.SUCCEEDED
    run, stage = submit(server, stage="run"), submit(server, stage="round2-train")
    others = [
        submit(server, stage="train", folder="/out/runs/another"),
        submit(server, stage="regenerate-0a1b"),
    ]
    # The run comes first; otherwise it would begin its next stage.
    assert list(stop(server, run).items()) == [
        (run, JobStatus.STOPPED), (stage, JobStatus.STOPPED)
    ]  # fmt: skip
    going = [job.submission_id for job in server.jobs if job.status == JobStatus.RUNNING]
    assert going == ["foreign", *others] and done not in going


def test_an_earlier_attempt_has_no_stage_any_more_and_a_stage_stops_alone():
    server = JobServer()
    first = submit(server, stage="run")
    server.jobs[-1].status = JobStatus.FAILED
    second, stage = submit(server, stage="run"), submit(server)
    assert stop(server, first) == {first: JobStatus.FAILED}
    assert stop(server, stage) == {stage: JobStatus.STOPPED}
    assert stop(server, second) == {second: JobStatus.STOPPED}


@pytest.mark.parametrize("address", [None, "http://head"])
def test_an_interrupt_says_what_goes_on_in_a_cluster(
    address: str | None, monkeypatch: pytest.MonkeyPatch
):
    config = load_config(ROOT / "examples/quickstart/config.yaml")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stage_jobs, "submit", lambda *_: "r-train-a-a1")
    monkeypatch.setattr(stage_jobs, "follow", interrupted)
    with logged() as said, pytest.raises(KeyboardInterrupt):
        stage_jobs.submit_and_follow_stage(None, address, config, "train")  # pyright: ignore
    stopping = "stop it with: polystill stop r-train-a-a1 --address http://head"
    goes_on = [f"the job r-train-a-a1 goes on; {stopping}"] if address else []
    assert said == ["job r-train-a-a1", *goes_on]


def test_the_log_of_a_local_job_is_kept_for_its_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = load_config(ROOT / "examples/quickstart/config.yaml", [f"storage.root={tmp_path}"])
    client = SimpleNamespace(get_job_logs=lambda _: "a private prompt\n")
    monkeypatch.setattr(stage_jobs, "submit", lambda *_: "r-train-a-a1")
    monkeypatch.setattr(stage_jobs, "follow", lambda *_, **__: JobStatus.SUCCEEDED)
    stage_jobs.submit_and_follow_stage(client, None, config, "train")  # pyright: ignore
    log = Path(layout_of(config).job_log("r-train-a-a1"))
    assert log.read_text() == "a private prompt\n" and log.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("status", "code"), [(JobStatus.SUCCEEDED, 0), (JobStatus.FAILED, 1)])
def test_logs_are_followed_to_the_end(
    status: JobStatus,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    client = UnsteadyClient(num_looks=1)
    client.get_job_status = lambda _: status
    monkeypatch.setattr("jobs.cluster.connection.connect", lambda url: client)
    assert main(["logs", "r-run-a-a1", "--address", "http://head", "--follow"]) == code
    printed = capsys.readouterr()
    assert printed.out == client.LOG
    assert printed.err == ("polystill: the job r-run-a-a1 ended as FAILED\n" if code else "")


def test_a_lock_is_held_by_one_process_and_gone_with_it(tmp_path: Path):
    path = str(tmp_path / "new folder" / "run.lock")
    holding = (
        f"from jobs.cluster.run_lock import alone\nwith alone({path!r}, 'work'): print(1); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-u", "-c", holding],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
    with pytest.raises(
        ClusterError, match=rf"the run r is already going on .*process {holder.pid} on "
    ) as told:
        alone(path, "the run r").__enter__()
    assert path in str(told.value)
    holder.kill()
    holder.communicate()
    with alone(path, "the run r"):
        assert f"process {os.getpid()} " in Path(path).read_text()
    with alone(path, "the run r"):
        pass


def test_two_commands_with_local_heads_do_not_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = load_config(
        ROOT / "examples/quickstart/config.yaml", [f"storage.root={tmp_path}", "name=r"]
    )
    monkeypatch.setattr(distill, "cluster", lambda *_: pytest.fail("a head is started"))
    lock = layout_of(config).lock
    with (
        alone(lock("run"), "x"),
        pytest.raises(ClusterError, match="the run r is already going on"),
    ):
        distill.run(config, None)
    # On a cluster the list of jobs is enough, so no lock is taken.
    with alone(lock("run"), "x"), pytest.raises(pytest.fail.Exception, match="a head"):
        shared = config.storage.model_copy(update={"shared_roots": ["/"]})
        distill.run(config.model_copy(update={"storage": shared}), "http://h")


@pytest.mark.parametrize("stage", entry.ALONE)
def test_a_stage_that_writes_in_place_runs_once_whoever_starts_it(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = load_config(
        ROOT / "examples/quickstart/config.yaml", [f"storage.root={tmp_path}", "name=r"]
    )
    plan = [StagePlan(name, int(name == stage), "to do") for name in entry.STAGE_FUNCTIONS]
    monkeypatch.setattr(entry, "make_plan", lambda config: plan)
    monkeypatch.setattr(entry, "join_cluster", lambda: None)
    monkeypatch.setitem(entry.STAGE_FUNCTIONS, stage, lambda *_: pytest.fail("it runs"))
    with (
        alone(layout_of(config).lock(stage), "x"),
        pytest.raises(ClusterError, match=f"{stage} of the run r is already going on"),
    ):
        entry.run_stage(stage, config)


def make_packages(root: Path) -> Path:
    for name in PACKAGES:
        (root / name / "__pycache__").mkdir(parents=True)
        (root / name / "__init__.py").write_text("")
        (root / name / "__pycache__" / "__init__.cpython-311.pyc").write_bytes(os.urandom(8))
    (root / "jobs" / "stages").mkdir()
    (root / "jobs" / "stages" / "__init__.py").write_text("")
    return root


def test_equal_inputs_give_the_same_upload_name(tmp_path):
    def uri(folder: Path) -> str:
        return get_uri_for_directory(str(folder), include_gitignore=True)

    first = build_upload(make_packages(tmp_path / "one"), "b: 2\n", tmp_path / "upload-one")
    os.utime(first / "config.yaml", (0, 0))
    second = build_upload(make_packages(tmp_path / "two"), "b: 2\n", tmp_path / "upload-two")
    third = build_upload(tmp_path / "two", "b: 3\n", tmp_path / "upload-three")
    assert uri(first) == uri(second) != uri(third)


def test_an_upload_without_a_package_or_into_a_used_folder_is_refused(tmp_path):
    root = make_packages(tmp_path / "root")
    with pytest.raises(ConfigError, match="not empty"):
        build_upload(root, "", root)
    (root / "teachers" / "__init__.py").unlink()
    with pytest.raises(ConfigError, match="no package teachers"):
        build_upload(root, "", tmp_path / "upload")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_log_that_is_sent_again_is_not_doubled(size):
    log = "one\ntwo\n\nthree ends here\nfour has no end"
    pieces = [log[i : i + size] for i in range(0, len(log), size)]
    for cut in range(len(pieces) + 1):
        written: list[str] = []
        lines = LogLines(written.append)
        for piece in pieces[:cut]:
            lines.feed(piece)
        lines.rewind()
        lines.feed(log)
        lines.close()
        assert written == log.split("\n")


class UnsteadyClient:
    """A bad line: each stream breaks after some text, every third question stays unanswered."""

    LOG = "".join(f"line {i}\n" for i in range(6))

    def __init__(self, num_looks: int):
        self.looks = 0
        self.num_looks = num_looks
        self.streams = 0

    async def tail_job_logs(self, _job):
        self.streams += 1
        yield self.LOG[: 11 * self.streams]
        raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_status(self, _job):
        self.looks += 1
        if self.looks % 3 == 2:
            raise ConnectionError("connection reset")
        return JobStatus.SUCCEEDED if self.looks >= self.num_looks else JobStatus.RUNNING

    def get_job_logs(self, _job):
        return self.LOG


def test_following_survives_dropped_streams_and_unanswered_questions():
    client = UnsteadyClient(num_looks=10)
    written: list[str] = []
    assert follow(client, "job", written.append, poll_seconds=0.01) == JobStatus.SUCCEEDED
    assert written == client.LOG.splitlines()
    assert client.streams > 1


def test_a_silent_job_is_said_to_run_still():
    client = UnsteadyClient(num_looks=30)
    written: list[str] = []
    follow(client, "job", written.append, poll_seconds=0.01, silence_seconds=0.05)
    assert [line for line in written if line in client.LOG.splitlines()] == client.LOG.splitlines()
    said = [line for line in written if line not in client.LOG.splitlines()]
    assert said and all(re.fullmatch(r"still running after \d+ s", line) for line in said)


def failure(*log: str) -> list[str]:
    client = SimpleNamespace(
        get_job_info=lambda _: SimpleNamespace(status="FAILED", driver_exit_code=1, message=None),
        get_job_logs=lambda _: "\n".join(log),
    )
    first, *shown, last = failure_message(client, "id", "less id.log").splitlines()  # pyright: ignore
    assert first.startswith("the job id ended as FAILED") and last == "the whole log: less id.log"
    return [line.removeprefix("  ") for line in shown]


def test_a_reason_of_many_lines_is_shown_from_its_headline_on():
    numbered = [f"  id {i} is 'a', the student's is 'b'" for i in range(100)]
    reason = ["polystill: teachers and student must share one vocabulary", *numbered[:24]]
    assert failure("loading", *reason) == reason
    longest = failure("loading", reason[0], *numbered)
    assert longest == [reason[0], *numbered[:29], "… 41 lines …", *numbered[-30:]]
    # A traceback says at its end what is wrong.
    assert failure("loading", *numbered) == numbered[-15:]


@pytest.mark.parametrize(
    "said",
    [
        "/bin/sh: 1: python: not found",
        "bash: line 1: python: command not found",
        "ModuleNotFoundError: No module named 'yaml'",
        "ModuleNotFoundError: No module named 'pydantic'",
    ],
)
def test_a_head_that_was_started_with_another_python_is_explained(said: str):
    assert "put polystill's .venv/bin at the start of PATH" in failure(said)[-1]
    assert failure("ModuleNotFoundError: No module named 'house_rules'") == [
        "ModuleNotFoundError: No module named 'house_rules'"
    ]


def test_following_gives_up_on_a_server_that_stays_away():
    def no_answer(_job):
        raise ConnectionError("refused")

    client = SimpleNamespace(
        get_job_status=no_answer, tail_job_logs=UnsteadyClient(1).tail_job_logs
    )
    with pytest.raises(ClusterError, match="has not answered for 0 seconds"):
        follow(client, "job", lambda line: None, poll_seconds=0.01, patience_seconds=0.05)


def test_a_head_refuses_a_folder_too_long_for_sockets(tmp_path):
    deep = tmp_path / ("x" * 60)
    deep.mkdir()
    with (
        pytest.raises(ClusterError, match="too long for Ray's Unix sockets"),
        local_head(1, 0, {}, temp_dir=deep),
    ):
        pass
    assert list(deep.iterdir()) == []
