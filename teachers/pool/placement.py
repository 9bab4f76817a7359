"""Room in a cluster: could its nodes hold an actor or a worker, and what does one wait for?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.config.base import Resources
from pipeline.errors import ClusterError
from pipeline.messages import resources_in_words

FIRST_REMINDER_SECONDS, LONGEST_SILENCE_SECONDS = 10.0, 600.0


def check_placement(
    name: str, resources: Resources, nodes: Sequence[Mapping[str, Any]], count: int = 1
) -> None:
    """Checks that the cluster, if it were free, could hold `count` actors or workers at once.

    Args:
        name: name of the actor or worker, for the message.
        resources: resources of one actor or worker.
        nodes: result of `ray.nodes()`.

    Raises:
        ClusterError: the nodes, as they are now, do not have the resources.
    """
    request = _request(resources)
    offers = [node["Resources"] for node in nodes if node["Alive"]]
    if sum(_fitting(request, offer, count) for offer in offers) < count:
        needed = _times(count, resources_in_words(request))
        raise ClusterError(
            f"the cluster cannot hold {name}: {needed} needed, nodes have "
            f"{_offers_in_words(offers)}; lower the resources, add a node with them, or set "
            "cluster.autoscaling if the cluster adds nodes on demand"
        )


def room_in_words(
    resources: Resources, nodes: Sequence[Mapping[str, Any]], free: Mapping[str, float]
) -> str:
    """Describes for a person what an actor or a task waits for, beside what the cluster has.

    Args:
        resources: resources of the actor or task.
        nodes: result of `ray.nodes()`.
        free: result of `ray.available_resources()`.
    """
    offers = [node["Resources"] for node in nodes if node["Alive"]]
    needed = resources_in_words(_request(resources))
    return (
        f"{needed} needed; nodes have {_offers_in_words(offers)}; free in all: "
        f"{resources_in_words(free)}"
    )


def reminders() -> Iterator[float]:
    """Seconds between two lines about the same wait: 10, 20, 40 and so on, at most 10 minutes."""
    seconds = FIRST_REMINDER_SECONDS
    while True:
        yield seconds
        seconds = min(2 * seconds, LONGEST_SILENCE_SECONDS)


def _request(resources: Resources) -> dict[str, float]:
    request = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.custom}
    return {key: amount for key, amount in request.items() if amount > 0}


def _offers_in_words(offers: Sequence[Mapping[str, float]]) -> str:
    """Resources of all nodes; equal nodes are counted."""
    counts = Counter(map(resources_in_words, offers))
    return ", ".join(_times(count, words) for words, count in counts.items()) or "nothing"


def _times(count: int, words: str) -> str:
    """Repeated amounts as in `3 x 2 CPU` or `3 x (2 CPU + 1 GPU)`."""
    if count == 1:
        return words
    return f"{count} x ({words})" if "+" in words else f"{count} x {words}"


def _fitting(request: Mapping[str, float], offer: Mapping[str, float], most: int) -> int:
    """Number of requests that fit into a node's resources, at most `most`."""
    # A share such as 0.1 of a resource must not be lost to the rounding of floats.
    shares = [math.floor(offer.get(key, 0) / n + 1e-6) for key, n in request.items()]
    return min([most, *shares])
