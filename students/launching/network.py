"""Network of the workers: gloo and NCCL use the interface that has the address by which Ray knows
the node, and the meeting place of the workers listens on rank 0's address alone.

gloo by itself takes the address to which the host name resolves, which on many hosts is 127.0.1.1
or nothing. A user's own choice of an interface in the environment of a node wins.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray.train
import ray.util
import torch.distributed as dist
from ray.exceptions import RayTaskError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from pipeline.errors import TrainingError
from pipeline.run.shared_storage import node_name
from students.launching.preemption import heed_sigterm

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
BACKLOG = 2048
"""Connections to the meeting place that may wait: every worker makes a few at once."""
_meeting_places: list[TCPStore] = []
"""Meeting places that this process serves; they close with it."""


def interface_of(address: str, interfaces: Mapping[str, Iterable[str]]) -> str | None:
    """Name of the interface that has a network address; None if none has it.

    Args:
        interfaces: addresses of every interface, by its name.
    """
    for name, addresses in interfaces.items():
        # a link-local address of IPv6 has its zone behind a %
        if address in {own.partition("%")[0] for own in addresses}:
            return name
    return None


def interfaces_here() -> dict[str, list[str]]:
    """Addresses of every interface of this node, by its name."""
    return {
        name: [entry.address for entry in entries]
        for name, entries in psutil.net_if_addrs().items()
    }


def interface_settings(interface: str | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that make gloo and NCCL use an interface, as far as the environment has none."""
    if interface is None:
        return {}
    # NCCL takes a name for the beginning of names unless an equals sign stands before it
    wanted = {GLOO: interface, NCCL: f"={interface}"}
    return {name: value for name, value in wanted.items() if not environment.get(name)}


@dataclass
class OwnInterfaces(TorchConfig):
    """Process group of torch over the interfaces of the nodes' own addresses."""

    @property
    def backend_cls(self) -> type[OwnInterfacesBackend]:
        return OwnInterfacesBackend


class OwnInterfacesBackend(_TorchBackend):
    """Makes the process group of a worker group."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Lets the workers meet.

        Raises:
            TrainingError: all workers live, and yet they cannot reach one another.
        """
        places = worker_group.execute(_use_own_interface)
        address, port = worker_group.execute_single(0, _open_meeting_place)
        try:
            worker_group.execute(
                _meet, address, port, backend_config.backend, backend_config.timeout_s
            )
        except RayTaskError as error:
            worker_group.execute(os.getpid)  # a dead worker raises here, and all are started again
            cause = str(error.cause).strip().splitlines()
            raise TrainingError(
                f"the workers cannot reach one another ({'; '.join(places)}): "
                f"{cause[0] if cause else type(error.cause).__name__}\nlet the nodes reach each "
                f"other by these addresses, or name the right interface in {GLOO} and {NCCL} in "
                "the environment of each node or in cluster.env_vars"
            ) from error


def _use_own_interface() -> str:
    """Sets this worker's interface; returns node and interface for messages."""
    heed_sigterm()
    address = ray.util.get_node_ip_address()
    interface = interface_of(address, interfaces_here())
    os.environ |= interface_settings(interface, os.environ)
    rank = ray.train.get_context().get_world_rank()
    return f"rank {rank} on {node_name(address)}, {os.environ.get(GLOO, 'no interface')}"


def _open_meeting_place() -> tuple[str, int]:
    """Opens the store by which the workers find each other, on this node's address alone."""
    address = ray.util.get_node_ip_address()
    is_local = interface_of(address, interfaces_here()) is not None
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.bind((address if is_local else "", 0))  # an address may be translated on the way
    listener.listen(BACKLOG)
    port = listener.getsockname()[1]
    _meeting_places.append(
        TCPStore(
            address,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    )
    return address, port


def _meet(address: str, port: int, backend: str, timeout_seconds: int) -> None:
    """Joins this worker to the process group."""
    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
    }
    dist.init_process_group(
        backend,
        store=TCPStore(address, port, is_master=False),
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        timeout=timedelta(seconds=timeout_seconds),
    )
