"""Following a job through the loss of nodes, of the connection and of the head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from jobs.cluster import follow as follow_module
from jobs.cluster import stage_jobs
from jobs.cluster.follow import OwnLines, failure_message, follow
from pipeline.config.load import load_config
from pipeline.errors import ClusterError
from tests.support.command_line import QUICKSTART
from tests.support.logs import logged

NODE_DEAD = """\x1b[33m(raylet)\x1b[0m The node with node id: d581 and address: 10.77.0.11 and \
node name: 10.77.0.11 has been marked dead because the detector has missed too many heartbeats \
from it. This can happen when a \t(1) raylet crashes unexpectedly (OOM, etc.)
\t(2) raylet has lagging heartbeats due to slow network or busy workload."""
TERMINATED = """(raylet, ip=10.77.0.11) Raylet is terminated. Termination is unexpected. Possible \
reasons include: (1) SIGKILL by the user or system OOM killer. Last 20 lines of the Raylet logs:
    [2026-12-01 00:00:01,000 I 1 1] (raylet) main.cc:1: Raylet received SIGTERM
    [state-dump] NodeManager:

    [state-dump] Node ID: d581"""
OWN = [
    "served: a replica starts",
    "  a table that is indented",
    "Traceback (most recent call last):",
    '  File "x.py", line 1, in <module>',
    "ValueError: of a raylet (raylet) in its middle",
    "[1/6 prepare] (raylet) is no header here",
]


@pytest.mark.parametrize("dump", [NODE_DEAD, TERMINATED, f"{NODE_DEAD}\n{TERMINATED}\n{NODE_DEAD}"])
@pytest.mark.parametrize("place", [0, 2, 4, 5, 6])  # an indented line behind a dump belongs to it
def test_what_ray_says_of_nodes_is_no_line_of_the_job(dump: str, place: int) -> None:
    log = [*OWN[:place], *dump.splitlines(), *OWN[place:]]
    assert list(filter(OwnLines(), log)) == OWN


def failed(log: str, message: str | None = None) -> str:
    client: Any = SimpleNamespace(
        get_job_info=lambda _: SimpleNamespace(
            status="STOPPED", driver_exit_code=None, message=message
        ),
        get_job_logs=lambda _: log,
    )
    return failure_message(client, "id", "less id.log")


def test_the_last_lines_of_a_stopped_job_are_its_own() -> None:
    shown = failed("\n".join([*OWN[:2], TERMINATED, NODE_DEAD, TERMINATED]))
    assert shown.splitlines()[1:-1] == [f"  {line}" for line in OWN[:2]]
    assert "by a user" in failed(TERMINATED, message="stopped by a user")
    assert "Ray gives no reason" in failed(TERMINATED)


def test_memory_is_still_found_in_what_ray_says() -> None:
    killed = "(raylet) 1 Workers killed due to memory pressure (OOM), based on the killing policy"
    assert "ran out of memory: free some" in failed(f"served: a replica starts\n{killed}")


def test_a_followed_stage_shows_no_dumps(monkeypatch: pytest.MonkeyPatch) -> None:
    def followed(client: object, job: str, write: Callable[[str], None], **_: object) -> JobStatus:
        for line in [OWN[0], *TERMINATED.splitlines(), OWN[2], *NODE_DEAD.splitlines()]:
            write(line)
        return JobStatus.SUCCEEDED

    monkeypatch.setattr(stage_jobs, "submit", lambda *_: "job")
    monkeypatch.setattr(stage_jobs, "follow", followed)
    client: Any = None
    config = load_config(QUICKSTART / "config.yaml")
    with logged() as lines:
        stage_jobs.submit_and_follow(client, "http://head", config, "score", ["stage"], "[3/6] ")
    assert lines == ["[3/6] job job", f"[3/6] {OWN[0]}", f"[3/6] {OWN[2]}"]


class Server:
    """A job server that answers one look after another as it is told."""

    def __init__(self, answers: list[JobStatus | Exception]) -> None:
        self._answers: Iterator[JobStatus | Exception] = iter(answers)

    def get_job_status(self, _job: str) -> JobStatus:
        answer = next(self._answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def tail_job_logs(self, _job: str) -> Any:
        raise RuntimeError("closed")
        yield

    def get_job_logs(self, _job: str) -> str:
        return "done\n"


LOST = ConnectionError("refused")
UNKNOWN = RuntimeError("Request failed with status code 404: Job id does not exist")


def lines_of(*answers: JobStatus | Exception, **options: float) -> list[str]:
    client: Any = Server([*answers])
    written: list[str] = []
    follow(client, "id", written.append, poll_seconds=0.01, **options)
    return written


def test_a_connection_that_is_lost_and_found_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_module, "OUT_OF_REACH_SECONDS", 0.02)
    running, done = JobStatus.RUNNING, JobStatus.SUCCEEDED
    lost, found, *log = lines_of(running, *[LOST] * 9, running, done)
    assert lost.startswith("no answer from the job server for 0 s (ConnectionError)")
    assert "within 300 s" in lost and found == "the job server answers again" and log == ["done"]
    monkeypatch.undo()
    assert lines_of(running, LOST, LOST, running, done) == ["done"], "a hiccup is no news"


def test_a_head_that_was_restarted_is_told_with_the_remedy() -> None:
    with pytest.raises(ClusterError) as told:
        lines_of(JobStatus.RUNNING, LOST, UNKNOWN)
    assert str(told.value) == (
        "the cluster knows no job id any more: its head was restarted; run the same command "
        "again, which does only what is missing"
    )
    with pytest.raises(ClusterError, match=r"knows no job id: list the jobs.*polystill status"):
        lines_of(UNKNOWN)


def test_a_job_that_waits_to_start_is_told_from_one_that_runs() -> None:
    pending, running = [JobStatus.PENDING] * 9, [JobStatus.RUNNING] * 9
    written = lines_of(*pending, *running, JobStatus.SUCCEEDED, silence_seconds=0.02)
    assert written[0].startswith("not started after 0 s: the cluster has no room")
    assert written[-2:] == ["still running after 0 s", "done"]
