"""Further nodes of a local Ray head, on this machine; a test can lose each of them at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from jobs.cluster.local_head import LocalHead

START_SECONDS = 90
# A local head is on loopback, where Ray lets no further node join. So that one does, Ray is told
# that there may be others, and its search for an address that they could reach is left out. The
# node's own processes are told again that there are none.
VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
RAY = f"""
import os
from ray._private import services
services.get_node_ip_address = lambda address=None: "127.0.0.1"
os.environ["{VARIABLE}"] = "0"
from ray.scripts.scripts import main
main()
"""
OBJECT_STORE_BYTES = 100_000_000
FREE_PORTS = (
    "node-manager-port",
    "object-manager-port",
    "min-worker-port",
    "max-worker-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


@dataclass(frozen=True)
class ExtraNode:
    """A raylet with its agents and workers.

    Attributes:
        node_id: Ray's id of the node.
        process: the `ray start` that holds them.
    """

    node_id: str
    process: subprocess.Popen[bytes]

    def lose(self) -> None:
        """Ends every process of the node at once, as a power cut does; harmless if repeated."""
        with suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            family = [parent, *parent.children(recursive=True)]
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            self.process.wait()
            psutil.wait_procs(family, timeout=10)


@contextmanager
def extra_node(
    head: LocalHead, resources: Mapping[str, float], num_cpus: int = 1
) -> Iterator[ExtraNode]:
    """Adds a node to a head, and takes it away again unless the test has lost it before.

    Nodes must be started one after another: two that start at once may exceed Ray's own time limit
    for a start. The environment must hold the head's token, as it does below `local_head`.

    Args:
        resources: custom resources of the node.
        num_cpus: logical CPUs of the node.
    """
    command = [sys.executable, "-P", "-c", RAY, "start", "--block"]
    command += [f"--address={head.gcs_address}", *(f"--{name}=0" for name in FREE_PORTS)]
    command += [f"--num-cpus={num_cpus}", "--num-gpus=0", f"--resources={json.dumps(resources)}"]
    command += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
    # Nodes that shared the head's folder would unpack a job's upload over one another.
    folder = head.folder / f"n{len(list(head.folder.glob('n*')))}"
    folder.mkdir()
    command += [f"--temp-dir={folder}"]
    log_path = folder / "node.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=os.environ | {VARIABLE: "1"},
            start_new_session=True,
        )
    starting = ExtraNode("", process)
    try:
        _wait_until_started(process, log_path)
        yield ExtraNode(_node_id(process), process)
    finally:
        starting.lose()


def _wait_until_started(process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while "Ray runtime started" not in (said := log_path.read_text(errors="replace")):
        assert process.poll() is None and time.monotonic() < deadline, said
        time.sleep(0.1)


def _node_id(process: subprocess.Popen[bytes]) -> str:
    """Id of the node, from the command line of its raylet."""
    for child in psutil.Process(process.pid).children():
        with suppress(psutil.NoSuchProcess):
            words = " ".join(child.cmdline())
            if "/raylet " in words and (found := re.search(r"--node_id=(\w+)", words)):
                return found[1]
    raise AssertionError("the node has no raylet")
