"""Surroundings of a worker that trains: the nodes, their notices, and the driver that listens."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """The cluster as a worker knows it.

    Attributes:
        nodes: names of the workers' nodes, by rank.
        leaving: gives the line that says which node goes away and when, or None; all ranks call it
            together.
        say: hands a line to the driver, for its log.
    """

    nodes: Sequence[str]
    leaving: Callable[[], str | None]
    say: Callable[[str], None]


def one_node(world_size: int) -> Surroundings:
    """Surroundings of workers that all run on this node, which stays, and without a driver."""
    return Surroundings([socket.gethostname()] * world_size, lambda: None, logger.info)
