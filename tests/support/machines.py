"""Machines of a Ray cluster as Linux namespaces on this one; making them needs root and iproute2.

Each machine has network, processes, host name, `/etc/hosts`, mounts and a folder for temporary
files of its own. They meet on a bridge, which lies in a namespace too, so that nothing of the real
network changes:

    10.77.0.1 the bridge, where a test's own server listens
    10.77.0.10 head   10.77.0.11, .12 t1, t2   10.77.0.13, .14 s1, s2   10.77.0.20 laptop

The power of a machine can be cut, and so can its cable.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

from tests.support.command_line import ROOT, environment, token_environment

ADDRESSES = {
    "head": "10.77.0.10",
    "t1": "10.77.0.11",
    "t2": "10.77.0.12",
    "s1": "10.77.0.13",
    "s2": "10.77.0.14",
    "laptop": "10.77.0.20",
}
SWITCH, SWITCH_ADDRESS = "switch", "10.77.0.1"
JOB_SERVER = f"http://{ADDRESSES['head']}:8265"
CLONE_NEWNET = 0x40000000
START_SECONDS = 120


@dataclass
class Machines:
    """All machines, and what runs on them.

    Attributes:
        folder: logs, hosts files and Ray's folders of all machines.
        token: token of the cluster.
        running: the namespaces' first process of each machine whose power is on.
    """

    folder: Path
    token: str
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    num_starts: int = 0

    def start(
        self,
        name: str,
        resources: Mapping[str, float],
        hosts: Mapping[str, str] | None = None,
        unmounted: Sequence[Path] = (),
    ) -> None:
        """Switches a machine on and waits until its Ray has started.

        Args:
            resources: custom resources of its Ray node.
            hosts: addresses in its `/etc/hosts` by host name, beside those of all machines.
            unmounted: shared folders that this machine does not see; it has an empty one there.
        """
        self.num_starts += 1
        place = self.folder / f"{name}{self.num_starts}"
        (place / "tmp").mkdir(parents=True)
        names = {f"n-{machine}": address for machine, address in ADDRESSES.items()} | (hosts or {})
        lines = ["127.0.0.1 localhost", *(f"{names[host]} {host}" for host in names)]
        (place / "hosts").write_text("\n".join(lines) + "\n")
        within = [f"hostname n-{name}", f"mount --bind {place / 'hosts'} /etc/hosts"]
        within += [f"mount -t tmpfs none {shlex.quote(str(folder))}" for folder in unmounted]
        within += [f"exec {shlex.join(_ray_start(name, resources, place))}"]
        namespaces = ["--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc"]
        log_path = place / "ray.log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [*self.on(name), "unshare", *namespaces, "sh", "-ec", "; ".join(within)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment(self.environment | {"TMPDIR": str(place / "tmp")}),
                start_new_session=True,
            )
        self.running[name] = process
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in (said := log_path.read_text(errors="replace")):
            assert process.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.1)
        if name == "head":
            self._wait_for_job_server()

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every process of the cluster: token, interpreter, and no proxy."""
        no_proxy = ",".join([*ADDRESSES.values(), SWITCH_ADDRESS, "127.0.0.1", "localhost"])
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "PATH": path}
        return token_environment(self.token) | quiet | {"no_proxy": no_proxy, "NO_PROXY": no_proxy}

    def on(self, name: str) -> tuple[str, ...]:
        """Command that runs another on a machine's network."""
        return ("ip", "netns", "exec", _namespace(name))

    def cut_power(self, name: str) -> None:
        """Ends all processes of a machine at once; harmless if its power is off."""
        process = self.running.pop(name, None)
        if process is None:
            return
        # The first process of a process namespace takes all others with it.
        for each in [*psutil.Process(process.pid).children(), psutil.Process(process.pid)]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()

    def cut_cable(self, name: str) -> None:
        """Cuts a machine off: packets to and from it are lost without a word."""
        _ip("-n", _namespace(SWITCH), "link", "set", f"v-{name}", "down")

    def mend_cable(self, name: str) -> None:
        """Connects a machine again."""
        _ip("-n", _namespace(SWITCH), "link", "set", f"v-{name}", "up")

    def _wait_for_job_server(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        with inside("laptop"), requests.Session() as session:
            session.trust_env = False
            while True:
                with suppress(requests.RequestException):
                    headers = {"Authorization": f"Bearer {self.token}"}
                    if session.get(f"{JOB_SERVER}/api/version", headers=headers, timeout=5).ok:
                        return
                assert time.monotonic() < deadline, "the job server does not answer"
                time.sleep(0.2)


@contextmanager
def machines(token: str) -> Iterator[Machines]:
    """Builds the network; at the end switches all machines off and removes it.

    Raises:
        RuntimeError: the caller is not root, or a command of iproute2 failed.
    """
    if os.geteuid() != 0:
        raise RuntimeError("namespaces of the network need root")
    folder = Path(tempfile.mkdtemp(prefix="psn-", dir="/tmp"))  # short, for Ray's Unix sockets
    lab = Machines(folder, token)
    try:
        _remove()  # of a command that was killed
        _build()
        yield lab
    finally:
        for name in list(lab.running):
            lab.cut_power(name)
        _remove()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Puts this thread, with the sockets and threads that it makes, on a machine's network."""
    place = Path("/run/netns", _namespace(name))
    with open("/proc/thread-self/ns/net") as before, place.open() as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(before.fileno())


def _enter(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


def _namespace(name: str) -> str:
    return f"polystill-{name}"


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def _build() -> None:
    """Makes the bridge and a cable to each machine; no machine has a default route."""
    switch = _namespace(SWITCH)
    _ip("netns", "add", switch)
    _ip("-n", switch, "link", "set", "lo", "up")
    _ip("-n", switch, "link", "add", "br0", "type", "bridge")
    _ip("-n", switch, "link", "set", "br0", "up")
    _ip("-n", switch, "addr", "add", f"{SWITCH_ADDRESS}/24", "dev", "br0")
    for name, address in ADDRESSES.items():
        own, cable = _namespace(name), f"v-{name}"
        _ip("netns", "add", own)
        _ip("-n", own, "link", "set", "lo", "up")
        pair = ["type", "veth", "peer", "name", cable, "netns", switch]
        _ip("link", "add", "eth0", "netns", own, *pair)
        _ip("-n", switch, "link", "set", cable, "master", "br0")
        _ip("-n", switch, "link", "set", cable, "up")
        _ip("-n", own, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", own, "link", "set", "eth0", "up")


def _remove() -> None:
    """Removes the network, with the processes of all machines on it."""
    for name in map(_namespace, (*ADDRESSES, SWITCH)):
        if Path("/run/netns", name).exists():
            found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
            for pid in map(int, found.stdout.split()):
                with suppress(psutil.NoSuchProcess):
                    psutil.Process(pid).kill()
            _ip("netns", "del", name)


def _ray_start(name: str, resources: Mapping[str, float], place: Path) -> list[str]:
    head = ["--head", "--port=6379", "--dashboard-port=8265"]
    head += [f"--dashboard-host={ADDRESSES['head']}"]
    return [
        *(sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--block"),
        *(head if name == "head" else [f"--address={ADDRESSES['head']}:6379"]),
        f"--node-ip-address={ADDRESSES[name]}",
        *("--num-cpus=2", "--num-gpus=0", "--object-store-memory=100000000"),
        *(f"--resources={json.dumps(resources)}", f"--temp-dir={place}", "--disable-usage-stats"),
    ]
