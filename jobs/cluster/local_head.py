"""The local Ray head: a private cluster for one command that names none, gone with the command.

Token authentication is on, with a token made for this head alone. Everything listens on loopback,
each on a free port. All files of the head, and the temporary files of everything that it starts,
lie in one folder of mode 0700. So other clusters and other users of the machine neither see this
head nor touch it; docs/security.md says what is left to them.
"""

import json
import os
import random
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

from pipeline.errors import ClusterError

# Below the range from which systems choose ports, and above the one from which Ray chooses the
# ports of workers.
PORTS = range(20_000, 32_000)
# Ray makes its own folder one that everybody may read and write (mode 0777), uploaded code
# included. It therefore lies in a folder that nobody else may enter, beside the one for temporary
# files. Both names are short, for the sake of sockets.
RAY_FOLDER, TEMPORARY_FOLDER, LOG = "r", "t", "head.log"
# Ray appends about 66 bytes: its folder, the session and the socket's name. A Unix socket's
# path has at most 107 (103 on macOS).
MAX_FOLDER_BYTES = 36
LOOPBACK = "127.0.0.1"
# Settings of another cluster: with them the head would join that cluster or stand for it.
FOREIGN_SETTINGS = (
    "RAY_ADDRESS",
    "RAY_API_SERVER_ADDRESS",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_JOB_CONFIG_JSON_ENV_VAR",
    "RAY_REDIS_ADDRESS",
    "RAY_TMPDIR",
)
GUARDIAN = Path(__file__).with_name("head_guardian.py")


@dataclass(frozen=True)
class LocalHead:
    """A running local Ray head.

    Attributes:
        address: URL of its job server.
        gcs_address: host and port for `ray.init`.
        token: token that its clients need.
        folder: its own folder, with sockets, logs, spilled objects and temporary files; nobody
            else can enter it.
    """

    address: str
    gcs_address: str
    token: str = field(repr=False)
    folder: Path


@contextmanager
def local_head(
    num_cpus: int,
    num_gpus: int | None,
    custom_resources: dict[str, float],
    temp_dir: Path | None = None,
    start_timeout_seconds: float = 120.0,
) -> Iterator[LocalHead]:
    """Starts a Ray head; stops it with all its processes at the end or if this process is killed.

    Within the context, the environment of this process points Ray's clients to the head
    (`RAY_AUTH_MODE`, `RAY_AUTH_TOKEN`, no proxy for loopback). It is restored afterwards.

    Args:
        num_cpus: logical CPUs of the head.
        num_gpus: logical GPUs of the head; None lets Ray count them.
        custom_resources: further resources by name.
        temp_dir: parent of the head's own folder; None means the system's folder for temporary
            files.
        start_timeout_seconds: time within which the job server must answer.

    Raises:
        ClusterError: the folder's path is too long, others may rename folders in its parent, or the
            head did not start; the message has the last lines of its log.
    """
    folder = private_folder(temp_dir)
    token = secrets.token_hex(32)
    dashboard_port, client_port = _free_ports(2)
    address = f"http://{LOOPBACK}:{dashboard_port}"
    environment = {
        **_client_environment(token),
        **_loopback_environment(),
        "PATH": _path_with_this_python(),
        "TMPDIR": str(folder / TEMPORARY_FOLDER),
    }
    command = _ray_start(folder, dashboard_port, client_port, num_cpus, num_gpus, custom_resources)
    with (folder / LOG).open("wb") as log:
        guardian = subprocess.Popen(
            [sys.executable, "-P", str(GUARDIAN), str(folder), *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=_without_foreign_settings() | environment,
            start_new_session=True,
        )
    try:
        gcs_address = _wait_until_ready(guardian, folder, address, token, start_timeout_seconds)
        with _environment(_client_environment(token)):
            yield LocalHead(address, gcs_address, token, folder)
    finally:
        _stop(guardian, folder)


def private_folder(parent: Path | None) -> Path:
    """Makes the head's own folder, which nobody else can enter (mode 0700), with its two parts.

    Args:
        parent: folder to make it in; None for the system's folder for temporary files, or for /tmp
            if that one does not fit.

    Raises:
        ClusterError: no folder can be made there, its path is too long, or others may rename it.
    """
    folder = _new_folder(parent)
    if _complaint(folder) and parent is None:
        folder.rmdir()
        folder = _new_folder(Path("/tmp"))
    if complaint := _complaint(folder):
        folder.rmdir()
        raise ClusterError(complaint)
    for name in (RAY_FOLDER, TEMPORARY_FOLDER):
        (folder / name).mkdir()
    return folder


def _new_folder(parent: Path | None) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="ps-", dir=parent)).resolve()
    except OSError as error:
        raise ClusterError(
            f"the local Ray head has no place for its files: {error}; name a folder for temporary "
            "files that can be written (TMPDIR)"
        ) from error


def _complaint(folder: Path) -> str | None:
    """Reason why a new folder cannot be the head's own; None if there is none."""
    size = len(os.fsencode(folder))
    if size > MAX_FOLDER_BYTES:
        return (
            f"the folder {folder} is too long for Ray's Unix sockets ({size} bytes, at most "
            f"{MAX_FOLDER_BYTES}): choose a shorter temporary folder (TMPDIR)"
        )
    mode = folder.parent.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        return (
            f"everybody may rename what lies in {folder.parent} ({stat.filemode(mode)}), so others "
            "could put code in the place of this run's: choose another temporary folder (TMPDIR), "
            f"or give this one the sticky bit (chmod +t {folder.parent})"
        )
    return None


def _free_ports(count: int) -> list[int]:
    """Finds ports that nothing listens on, on any interface."""
    free = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        free.append(port)
        if len(free) == count:
            return free
    raise ClusterError(f"no port between {PORTS.start} and {PORTS.stop} is free")


def _ray_start(
    folder: Path,
    dashboard_port: int,
    client_port: int,
    num_cpus: int,
    num_gpus: int | None,
    custom_resources: dict[str, float],
) -> list[str]:
    """Command that starts the head; port 0 lets each part of Ray choose a free one itself."""
    any_port = [
        f"--{name}=0"
        for name in (
            "port",
            "node-manager-port",
            "object-manager-port",
            "min-worker-port",
            "max-worker-port",
            "dashboard-agent-listen-port",
            "dashboard-agent-grpc-port",
            "runtime-env-agent-port",
            "metrics-export-port",
        )
    ]
    return [
        *(sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *any_port,
        "--include-dashboard=true",
        f"--dashboard-host={LOOPBACK}",
        f"--dashboard-port={dashboard_port}",
        f"--ray-client-server-port={client_port}",
        f"--temp-dir={folder / RAY_FOLDER}",
        f"--num-cpus={num_cpus}",
        *([] if num_gpus is None else [f"--num-gpus={num_gpus}"]),
        f"--resources={json.dumps(custom_resources)}",
        "--disable-usage-stats",
        "--log-style=record",
        "--log-color=false",
    ]


def _client_environment(token: str) -> dict[str, str]:
    """Variables that Ray's clients need.

    Ray replaces a loopback address by one that other nodes can reach, unless it is told that there
    are no other nodes: the variable is meant for the two systems that it names, and does the same
    on Linux. Some libraries read `NO_PROXY` and others `no_proxy`, so both are set.
    """
    exceptions = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    loopback = ",".join(filter(None, [exceptions, LOOPBACK, "localhost"]))
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "NO_PROXY": loopback,
        "no_proxy": loopback,
    }


def _loopback_environment() -> dict[str, str]:
    """Variables that keep vLLM, and torch's two ways to exchange tensors, on loopback.

    A user may have set them for a cluster; such values do not hold here.
    """
    interface = _loopback_interface()
    return {
        "VLLM_HOST_IP": LOOPBACK,
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": f"={interface}",  # otherwise the beginning of a name
    }


def _loopback_interface() -> str:
    """Name of the interface that has the loopback address: `lo` on Linux."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == LOOPBACK for entry in addresses):
            return name
    raise ClusterError(
        f"no network interface has the address {LOOPBACK}, on which a local Ray head listens: "
        "bring the loopback interface up (ip link set lo up), or name a cluster with --address"
    )


def _path_with_this_python() -> str:
    """PATH that begins with this interpreter, so that a job's `python` is the same one.

    The virtual environment need not be activated for it.
    """
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _without_foreign_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in FOREIGN_SETTINGS}


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Sets variables of this process and drops those of other clusters; restores all at the end."""
    names = [*values, *FOREIGN_SETTINGS]
    before = {name: os.environ[name] for name in names if name in os.environ}
    for name in FOREIGN_SETTINGS:
        os.environ.pop(name, None)
    os.environ.update(values)
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


def _wait_until_ready(
    guardian: subprocess.Popen[bytes],
    folder: Path,
    address: str,
    token: str,
    timeout_seconds: float,
) -> str:
    """Waits until the node is complete and its job server answers; returns the GCS address."""
    # Ray writes this file last, and a job reads the cluster's address from it.
    address_file = folder / RAY_FOLDER / "ray_current_cluster"
    deadline = time.monotonic() + timeout_seconds
    with requests.Session() as session:
        session.trust_env = False  # no proxy, no netrc: this is loopback
        while time.monotonic() < deadline:
            if guardian.poll() is not None:
                raise ClusterError(f"the local Ray head did not start:\n{_last_lines(folder)}")
            if address_file.exists():
                try:
                    answer = session.get(
                        f"{address}/api/version",
                        headers={"Authorization": f"Bearer {token}"},
                        timeout=5,
                    )
                except requests.RequestException:
                    answer = None
                if answer is not None and answer.ok:
                    return address_file.read_text().strip()
            time.sleep(0.1)
    raise ClusterError(
        f"the local Ray head was not ready after {timeout_seconds:.0f} seconds:\n"
        f"{_last_lines(folder)}"
    )


def _last_lines(folder: Path, count: int = 15) -> str:
    lines = (folder / LOG).read_text(errors="replace").splitlines()
    return "\n".join(f"  {line}" for line in lines[-count:])


def _stop(guardian: subprocess.Popen[bytes], folder: Path) -> None:
    """Lets the guardian stop the head, by closing the guardian's standard input."""
    assert guardian.stdin is not None
    guardian.stdin.close()
    try:
        guardian.wait(timeout=30)
    except subprocess.TimeoutExpired:
        guardian.kill()
        guardian.wait()
    shutil.rmtree(folder, ignore_errors=True)
