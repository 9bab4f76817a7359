"""Submission ids, uploads and log lines: what needs no cluster."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray._private.runtime_env.packaging import get_uri_for_directory
from ray.job_submission import JobStatus

from jobs.follow import LogLines, follow
from jobs.local_head import local_head
from jobs.submit import PACKAGES, build_upload, choose_submission, submission_id
from pipeline.errors import ClusterError, ConfigError


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
        # Other stages, digests, runs and foreign ids do not count.
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


def make_packages(root: Path) -> Path:
    for name in PACKAGES:
        (root / name / "__pycache__").mkdir(parents=True)
        (root / name / "__init__.py").write_text("")
        (root / name / "__pycache__" / "__init__.cpython-311.pyc").write_bytes(os.urandom(8))
    (root / "jobs" / "configs").mkdir()
    (root / "jobs" / "configs" / "quickstart.yaml").write_text("a: 1\n")
    (root / "jobs" / ".secret").write_text("x")
    (root / "jobs" / "empty").mkdir()
    (root / "tests").mkdir()
    (root / "tests" / "test_a.py").write_text("")
    return root


def test_an_upload_holds_the_packages_and_the_config_only(tmp_path):
    upload = build_upload(make_packages(tmp_path / "root"), "b: 2\n", tmp_path / "upload")
    found = {str(path.relative_to(upload)) for path in upload.rglob("*") if path.is_file()}
    assert found == {
        *(f"{name}/__init__.py" for name in PACKAGES),
        "jobs/configs/quickstart.yaml",
        "config.yaml",
    }
    assert not (upload / "jobs" / "empty").exists()
    assert (upload / "config.yaml").read_text() == "b: 2\n"


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
