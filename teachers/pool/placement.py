"""Check of the cluster's nodes: could they hold an actor or a worker?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.base import Resources
from pipeline.errors import ClusterError


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
    request = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.custom}
    request = {key: amount for key, amount in request.items() if amount > 0}
    offers = [node["Resources"] for node in nodes if node["Alive"]]
    if sum(_fitting(request, offer, count) for offer in offers) < count:
        # No actor asks for these, nor for `node:<address>`, so the message leaves them out.
        hidden = ("memory", "object_store_memory")
        shown = [
            {key: n for key, n in offer.items() if key not in hidden and ":" not in key}
            for offer in offers
        ]
        raise ClusterError(
            f"the cluster cannot hold {name}: {count} of {request} are needed, the nodes have "
            f"{shown}; lower the resources, add a node with them, or set cluster.autoscaling if "
            "the cluster adds nodes on demand"
        )


def _fitting(request: Mapping[str, float], offer: Mapping[str, float], most: int) -> int:
    """Number of requests that fit into a node's resources, at most `most`."""
    # A share such as 0.1 of a resource must not be lost to the rounding of floats.
    shares = [math.floor(offer.get(key, 0) / n + 1e-6) for key, n in request.items()]
    return min([most, *shares])
