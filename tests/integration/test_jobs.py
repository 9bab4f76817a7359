"""Jobs on a real server: logs, attempts, tokens, and heads that end with their holder."""

import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.cluster.connection import connect
from jobs.cluster.follow import failure_message, follow
from jobs.cluster.local_head import LocalHead
from jobs.cluster.submit import (
    job_logs,
    job_table,
    list_jobs,
    stop_job,
    stop_with_stages,
    submit_stage,
)
from jobs.cluster.upload import PACKAGES, build_upload
from pipeline.errors import ClusterError

pytestmark = pytest.mark.timeout(180)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def client(ray_head: LocalHead) -> JobSubmissionClient:
    return connect(ray_head.address)


def submit(client: JobSubmissionClient, stage: str, code: str, **options) -> str:
    options = {
        "run": "tests", "digest": "0a1b", "folder": "/f", "working_dir": None, "env_vars": {}
    } | options  # fmt: skip
    return submit_stage(client, stage=stage, entrypoint=f"python -c {shlex.quote(code)}", **options)


def wait_for_line(client: JobSubmissionClient, job: str, text: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while text not in job_logs(client, job):
        assert time.monotonic() < deadline, f"{text!r} never appeared"
        time.sleep(0.2)


def test_a_job_runs_in_its_upload_and_its_log_is_followed(client, tmp_path):
    for name in PACKAGES:
        (tmp_path / "code" / name).mkdir(parents=True)
        (tmp_path / "code" / name / "__init__.py").write_text(f"NAME = {name!r}\n")
    upload = build_upload(tmp_path / "code", "student: tiny\n", tmp_path / "upload")
    code = (
        "import os, time, students; print(students.NAME, os.environ['COLOUR']); time.sleep(3);"
        "print(open('config.yaml').read(), end='')"
    )
    job = submit(client, "upload", code, working_dir=upload, env_vars={"COLOUR": "blue"})
    arrivals: list[tuple[float, str]] = []
    status = follow(client, job, lambda line: arrivals.append((time.monotonic(), line)))
    assert status == JobStatus.SUCCEEDED
    lines = [line for _, line in arrivals]
    assert lines == job_logs(client, job).splitlines()
    assert lines[-2:] == ["students blue", "student: tiny"]
    # The first line came while the job was still asleep, not with the end.
    assert arrivals[-1][0] - arrivals[-2][0] > 1


def test_a_failed_job_shows_its_last_lines_and_how_to_see_all(client, ray_head):
    code = "for i in range(50): print('line', i)\nraise SystemExit('no such teacher: qwen')"
    job = submit(client, "broken", code)
    assert follow(client, job, lambda line: None) == JobStatus.FAILED
    message = failure_message(client, job, "less job.log", lines=15)
    assert job == "tests-broken-0a1b-a1"
    assert f"{job} ended as FAILED with exit code 1" in message
    assert "no such teacher: qwen" in message
    assert "line 49\n" in message and "line 30\n" not in message
    assert message.endswith("the whole log: less job.log") and "memory" not in message
    # A failed attempt gives way to the next one.
    assert submit(client, "broken", "pass") == "tests-broken-0a1b-a2"


def test_a_reason_for_users_is_shown_without_the_lines_before_it(client):
    reason = "polystill: no such teacher: qwen\\nthe teachers are: llama"
    job = submit(client, "refused", f"print('loading'); raise SystemExit('{reason}')")
    follow(client, job, lambda line: None)
    message = failure_message(client, job, "less job.log")
    assert "  polystill: no such teacher: qwen\n  the teachers are: llama\n" in message
    assert "loading" not in message


def test_a_job_that_lost_processes_for_memory_says_so(client):
    lines = "print('Ray killed 3 worker(s) based on the killing policy'); "
    job = submit(client, "starved", f"{lines}[print(i) for i in range(50)]; raise SystemExit(1)")
    follow(client, job, lambda line: None)
    message = failure_message(client, job, "less job.log", lines=15)
    assert "the node ran out of memory: free some" in message and "policy" not in message


def test_a_running_job_is_attached_to_and_stopped_then_followed_by_a_new_attempt(client):
    sleeper = "import time; print('asleep'); time.sleep(600)"
    job = submit(client, "sleep", sleeper, custom_resources={"polystill_test": 0.5})
    wait_for_line(client, job, "asleep\n")
    assert submit(client, "sleep", sleeper) == job
    with pytest.raises(ClusterError, match=f"{job} runs sleep of the run tests with another"):
        submit(client, "sleep", "pass", digest="other")
    assert stop_job(client, job, timeout=30) == JobStatus.STOPPED
    assert stop_job(client, job, timeout=30) == JobStatus.STOPPED
    assert submit(client, "sleep", "pass", digest="other") == "tests-sleep-other-a1"
    again = submit(client, "sleep", "print('short')", folder="/another")
    assert again == "tests-sleep-0a1b-a2"
    assert follow(client, again, lambda line: None) == JobStatus.SUCCEEDED
    assert submit(client, "sleep", "pass", folder="/another") == "tests-sleep-0a1b-a3"


def test_a_detached_run_is_stopped_with_its_stage(client):
    sleeper = "import time; print('asleep', flush=True); time.sleep(600)"
    run, train, other = (
        submit(client, stage, sleeper, folder=folder, digest=folder[1:])
        for stage, folder in (("run", "/g"), ("train", "/g"), ("train", "/h"))
    )
    for name in (run, train):
        wait_for_line(client, name, "asleep\n")
    assert list(stop_with_stages(client, run, timeout=30)) == [
        (run, JobStatus.STOPPED),
        (train, JobStatus.STOPPED),
    ]
    assert not client.get_job_status(other).is_terminal()
    assert stop_job(client, other, timeout=30) == JobStatus.STOPPED


def test_jobs_are_listed_by_run(client):
    job = submit(client, "list", "pass", run="tests-list")
    assert [found.submission_id for found in list_jobs(client, run="tests-list")] == [job]
    assert job in [found.submission_id for found in list_jobs(client)]
    [row] = job_table(client, run="tests-list").splitlines()
    assert row.startswith(f"{job}  ") and row.endswith(" s")
    assert job_table(client, run="tests-none") == "no jobs of the run tests-none"
    with pytest.raises(ClusterError, match="no-such-job"):
        job_logs(client, "no-such-job")
    with pytest.raises(ClusterError, match="no-such-job"):
        follow(client, "no-such-job", lambda line: None)


def test_a_job_submits_a_job_to_its_own_cluster(client, ray_head):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from jobs.cluster.follow import follow\n"
        "from jobs.cluster.connection import connect, job_server_address_inside_job\n"
        "from jobs.cluster.submit import submit_stage\n"
        "address = job_server_address_inside_job()\n"
        "inner = connect(address)\n"
        "job = submit_stage(inner, run='tests', stage='inner', digest='0', folder='/f',\n"
        "                   working_dir=None, entrypoint='echo from the inner job', env_vars={})\n"
        "print(address, follow(inner, job, print))\n"
    )
    job = submit(client, "outer", code)
    lines: list[str] = []
    assert follow(client, job, lines.append) == JobStatus.SUCCEEDED, "\n".join(lines)
    assert "from the inner job" in lines
    assert lines[-1] == f"{ray_head.address} SUCCEEDED"


def test_missing_and_wrong_tokens_are_told_apart(ray_head, monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(ClusterError, match=r"does not accept this token.*RAY_AUTH_TOKEN_PATH"):
        connect(ray_head.address)
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(
        ClusterError, match=r"asks for a token and none was sent.*RAY_AUTH_MODE=token"
    ):
        connect(ray_head.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(ClusterError, match="there is no token"):
        connect(ray_head.address)
    (tmp_path / "token").write_text(ray_head.token + "\n")
    assert list_jobs(connect(ray_head.address)) is not None


def test_the_given_address_wins_over_the_environment(ray_head, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert connect(ray_head.address).get_address() == ray_head.address


def test_an_unreachable_address_is_known_soon():
    with socket.socket() as silent:  # accepts connections and never answers
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        refused = "http://127.0.0.1:9"
        for address in (refused, f"http://127.0.0.1:{silent.getsockname()[1]}"):
            started = time.monotonic()
            with pytest.raises(
                ClusterError, match=f"no Ray job server can be reached at {address}"
            ):
                connect(address)
            assert time.monotonic() - started < 10
    with pytest.raises(ClusterError, match="not the URL of a job server"):
        connect("ray://127.0.0.1:10001")


def test_a_head_ends_with_its_killed_holder_and_others_stay(client, ray_head, monkeypatch):
    code = (
        "import time\nfrom jobs.cluster.local_head import local_head\n"
        "with local_head(num_cpus=1, num_gpus=0, custom_resources={}) as head:\n"
        "    print(head.address, head.token, head.folder, flush=True)\n    time.sleep(600)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        address, token, folder = holder.stdout.readline().split()
        with monkeypatch.context() as patch:
            patch.setenv("RAY_AUTH_TOKEN", token)
            other = connect(address)
        # The job leaves an orphan in a session of its own, which no process group of Ray's holds.
        orphan = (
            "import subprocess, time;"
            "subprocess.run(['sh', '-c', 'sleep 600 &'], start_new_session=True);"
            "print('up'); time.sleep(600)"
        )
        wait_for_line(other, submit(other, "orphan", orphan), "up\n")
        family = psutil.Process(holder.pid).children(recursive=True)
        assert any(process.cmdline() == ["sleep", "600"] for process in family)
        assert any(process.name() == "raylet" for process in family)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    assert not Path(folder).exists()
    assert connect(ray_head.address).get_address() == ray_head.address
    assert follow(client, submit(client, "after", "pass"), lambda line: None) == JobStatus.SUCCEEDED
