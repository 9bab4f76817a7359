"""Notice that a node is about to go away: Ray drains it, as the autoscaler and `ray drain-node` do
before a preemption, or SIGTERM asks this worker to end.

SIGTERM ends a worker as usual unless the worker takes steps: then it makes a checkpoint first.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Any

import ray
import ray.train
import ray.util

from pipeline.run.shared_storage import node_name

_takes_steps, _asked_to_end = threading.Event(), threading.Event()


def heed_sigterm() -> None:
    """Makes SIGTERM a notice while this process takes steps; its main thread calls it."""
    before: Any = signal.getsignal(signal.SIGTERM)

    def notice(number: int, frame: FrameType | None) -> None:
        if _takes_steps.is_set() and not _asked_to_end.is_set():
            _asked_to_end.set()
        elif callable(before):
            before(number, frame)
        else:
            raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, notice)


@contextmanager
def notices_heeded() -> Iterator[Callable[[], str | None]]:
    """Gives a function that says which node goes away and when, or None; all workers call it at
    the same steps, since Ray Train answers it to all of them at once.
    """
    _takes_steps.set()
    try:
        yield _notice
    finally:
        _takes_steps.clear()


def _notice() -> str | None:
    info = ray.train.get_preemption_info()
    if info is not None:
        nodes = {node["NodeID"]: node for node in ray.nodes()}
        names = [nodes[i] for i in info.preempted_node_ids if i in nodes]
        return going_away(
            [f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})" for node in names],
            info.deadline_ms,
        )
    if _asked_to_end.is_set():
        return f"node {node_name(ray.util.get_node_ip_address())} asks its worker to end (SIGTERM)"
    return None


def going_away(nodes: list[str], deadline_ms: int | None) -> str:
    """The line that names nodes which go away.

    Args:
        deadline_ms: time at which the nodes are taken, in milliseconds since 1970, if it is known.
    """
    when = "soon"
    if deadline_ms is not None:
        when = f"at {datetime.fromtimestamp(deadline_ms / 1000):%H:%M:%S}"
    several = len(nodes) > 1
    names = ", ".join(nodes) or "of a worker"
    return f"node{'s' if several else ''} {names} {'go' if several else 'goes'} away {when}"
