"""What listens: the ports of a family of processes, and whether each asks for a token."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import grpc
import psutil
import requests

# One method of each of Ray's services. A service that asks for no token answers it.
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Push",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.rpc.ReporterService/GetTraceback",
    "/ray.rpc.RayletDriver/Init",
)
# Processes that another name than their own tells apart, by a word of their command line.
SCRIPTS = {
    "ray.util.client.server": "ray.util.client.server",
    "dashboard/dashboard.py": "dashboard.py",
    "monitor.py": "monitor.py",
}
RAY_ITSELF = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


@dataclass(frozen=True)
class Listener:
    """A port on which a process listens.

    Attributes:
        process: name of the process, as docs/security.md gives it.
        address: address that the port is bound to.
        port: number of the port.
    """

    process: str
    address: str
    port: int

    @property
    def is_on_loopback(self) -> bool:
        """Whether no other machine can reach the port."""
        address = ipaddress.ip_address(self.address.removeprefix("::ffff:"))
        return address.is_loopback


def listeners(family: Iterable[psutil.Process]) -> Iterator[Listener]:
    """Listening TCP and UDP ports of processes; of UDP those that are bound to no peer."""
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            connections = process.net_connections("inet")
            name = _name(process)
            for each in connections:
                if each.laddr and (each.status == "LISTEN" or _is_open_udp(each)):
                    yield Listener(name, each.laddr.ip, each.laddr.port)


def _is_open_udp(connection) -> bool:
    return connection.type == socket.SOCK_DGRAM and not connection.raddr


def _name(process: psutil.Process) -> str:
    words = " ".join(process.cmdline())
    for word, name in SCRIPTS.items():
        if word in words:
            return name
    name = process.name()
    if name.startswith("ray::") and name not in RAY_ITSELF:
        return "ray::*"
    return re.sub(r"^python[\d.]*$", "python", name)


def asks_for_a_token(port: int) -> bool:
    """Whether a port of Ray's refuses what comes without a token: by HTTP or by gRPC."""
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"http://127.0.0.1:{port}/api/jobs/", timeout=3).status_code == 401
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in METHODS:
            try:
                channel.unary_unary(method)(b"", timeout=3)
            except grpc.RpcError as error:
                assert isinstance(error, grpc.Call)
                if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                    return True
                if error.code() != grpc.StatusCode.UNIMPLEMENTED:
                    return False  # this is no gRPC
    return False


def own_addresses() -> list[str]:
    """Addresses of this machine that other machines can reach."""
    found = [each.address for every in psutil.net_if_addrs().values() for each in every]
    addresses = []
    for text in found:
        with contextlib.suppress(ValueError):  # of a network card
            address = ipaddress.ip_address(text)
            if not address.is_loopback and not address.is_link_local:
                addresses.append(text)
    return addresses
