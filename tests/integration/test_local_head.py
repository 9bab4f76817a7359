"""A local Ray head is private: nobody else on the machine or the network reaches what it has."""

import os
import re
import shlex
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray.job_submission import JobSubmissionClient

from jobs.cluster.connection import connect
from jobs.cluster.local_head import LocalHead
from jobs.cluster.stage_jobs import PACKAGES_ROOT
from jobs.cluster.submit import job_logs, stop_job, submit_stage
from jobs.cluster.upload import build_upload
from tests.support.network import Listener, asks_for_a_token, listeners, own_addresses
from tests.support.other_user import needs_root, open_to_nobody

pytestmark = pytest.mark.timeout(180)
TRAINING = """
import tempfile, time
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from students.launching.network import OwnInterfaces

def work():
    import torch
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    print("workers met:", int(total), torch.distributed.get_world_size(), flush=True)
    time.sleep(600)

TorchTrainer(
    work,
    torch_config=OwnInterfaces(backend="gloo"),
    scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(storage_path=tempfile.gettempdir()),
).fit()
"""
"""Two workers that form the process group of a training and stay in it."""
SECRET_TEXT = "text-of-a-private-prompt"


@pytest.fixture(scope="module")
def client(ray_head: LocalHead) -> JobSubmissionClient:
    return connect(ray_head.address)


@pytest.fixture(scope="module")
def family(
    ray_head: LocalHead, client: JobSubmissionClient, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[psutil.Process]]:
    """All processes of the head while a training of two workers goes on."""
    folder = tmp_path_factory.mktemp("upload") / "upload"
    job = submit_stage(
        client,
        run="tests",
        stage="private",
        digest="0",
        folder="/f",
        entrypoint=f"python -c {shlex.quote(TRAINING)}",
        working_dir=build_upload(PACKAGES_ROOT, f"text: {SECRET_TEXT}\n", folder),
        env_vars={},
    )
    deadline = time.monotonic() + 120
    while job_logs(client, job).count("workers met: 2 2") < 2:
        assert time.monotonic() < deadline, job_logs(client, job)
        assert not client.get_job_status(job).is_terminal(), job_logs(client, job)
        time.sleep(0.5)
    (guardian,) = [each for each in psutil.Process().children() if is_guardian(each, ray_head)]
    time.sleep(5)  # until workers that Ray has started ahead, and does not need, are gone
    yield [guardian, *guardian.children(recursive=True)]
    stop_job(client, job)


def is_guardian(process: psutil.Process, head: LocalHead) -> bool:
    return str(head.folder) in process.cmdline()


@pytest.fixture(scope="module")
def ports(family: list[psutil.Process]) -> list[Listener]:
    return list(listeners(family))


def test_the_folder_is_closed_after_ray_has_opened_its_own(
    ray_head: LocalHead, family: list[psutil.Process]
) -> None:
    assert ray_head.folder.stat().st_mode & 0o777 == 0o700
    assert ray_head.folder.stat().st_uid == os.getuid()
    # Ray's own folder is open to all, which is why it lies in one that is not.
    (session,) = (ray_head.folder / "r").glob("session_20*")
    assert session.stat().st_mode & 0o777 == 0o777


@needs_root
def test_nobody_else_can_do_anything_to_files_and_sockets(
    ray_head: LocalHead, family: list[psutil.Process], tmp_path: Path
) -> None:
    paths = [ray_head.folder, *ray_head.folder.rglob("*")]
    uploads = [path for path in paths if path.name == "config.yaml"]
    assert any(SECRET_TEXT in path.read_text() for path in uploads)
    assert any(path.is_socket() for path in paths)
    assert open_to_nobody(paths) == []
    # The same attempts succeed where they may.
    for path in (tmp_path, *tmp_path.parents):
        if path != Path("/") and path.stat().st_uid == os.getuid() and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o011)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    (shared / "file").write_text("x")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(shared / "socket"))
        server.listen()
        (shared / "socket").chmod(0o777)
        found = open_to_nobody([shared, shared / "file", shared / "socket"])
    assert [line.split()[0] for line in found] == ["list", "enter", "write", "read", "connect"]


@needs_root
def test_nobody_else_reads_environments_memory_or_shared_memory(
    family: list[psutil.Process], ray_head: LocalHead
) -> None:
    paths = [
        Path(f"/proc/{process.pid}/{name}")
        for process in family
        for name in ("environ", "mem", "fd", "maps")
    ]
    shared = [Path(path) for each in family for path in mapped(each) if "/dev/shm/" in path]
    assert any(ray_head.token in process.environ().values() for process in family)
    assert open_to_nobody(paths + shared) == []


def mapped(process: psutil.Process) -> list[str]:
    try:
        return [each.path for each in process.memory_maps()]
    except psutil.NoSuchProcess:
        return []


def test_no_socket_lies_outside_the_folder(
    family: list[psutil.Process], ray_head: LocalHead
) -> None:
    names = set()
    for process in family:
        try:
            names |= {each.laddr for each in process.net_connections("unix") if each.laddr}
        except psutil.NoSuchProcess:
            continue
    assert names and all(name.startswith(f"{ray_head.folder}/") for name in names), names


def test_the_token_stands_in_no_command_line_and_no_file(
    family: list[psutil.Process], ray_head: LocalHead
) -> None:
    token = ray_head.token
    words = {each.pid: word for each in family if each.is_running() for word in each.cmdline()}
    assert [pid for pid, word in words.items() if token in word] == []
    files = [path for path in ray_head.folder.rglob("*") if path.is_file()]
    assert any(b"polystill" in path.read_bytes() for path in files)
    assert [path for path in files if token.encode() in path.read_bytes()] == []


def test_nothing_listens_beyond_loopback(ports: list[Listener]) -> None:
    assert [port for port in ports if not port.is_on_loopback] == []
    assert {"gcs_server", "raylet", "ray::*", "python"} <= {port.process for port in ports}
    for address in own_addresses():
        for port in ports:
            with (
                socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as other,
                pytest.raises(ConnectionRefusedError),
            ):
                other.settimeout(5)
                other.connect((address, port.port))


def test_the_ports_are_those_of_the_documents(ports: list[Listener]) -> None:
    page = (PACKAGES_ROOT / "docs/security.md").read_text()
    rows = re.findall(r"^\| `([\w.:*]+)` \| [^|]+ \| (yes|no) \|$", page, re.MULTILINE)
    documented = {(name, asks == "yes") for name, asks in rows}
    found = {(port.process, asks_for_a_token(port.port)) for port in ports}
    assert found <= documented
    # Two of Ray's exporters want a fixed port each and do without if another cluster has it.
    without = {("dashboard.py", False), ("monitor.py", False)}
    engines = {("VLLM::EngineCore", False)}
    assert documented - found <= without | engines
