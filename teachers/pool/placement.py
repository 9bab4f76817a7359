"""Placement: whether the cluster's nodes could hold an actor or a worker."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.config.base import Resources
from pipeline.errors import ClusterError


def check_placement(
    name: str, resources: Resources, nodes: Sequence[Mapping[str, Any]], count: int = 1
) -> None:
    """Checks that the cluster could hold so many actors or workers at once, if it were free.

    Args:
        nodes: what `ray.nodes()` returns.

    Raises:
        ClusterError: the nodes, as they are now, do not have the resources.
    """
    request = {"CPU": resources.num_cpus, "GPU": resources.num_gpus, **resources.custom}
    request = {key: amount for key, amount in request.items() if amount > 0}
    offers = [node["Resources"] for node in nodes if node["Alive"]]
    if sum(_fitting(request, offer, count) for offer in offers) < count:
        hidden = ("memory", "object_store_memory")  # of no use here, like the `node:<address>` ones
        shown = [
            {key: n for key, n in offer.items() if key not in hidden and ":" not in key}
            for offer in offers
        ]
        raise ClusterError(
            f"the cluster cannot hold {name} ({count} of {request}); its nodes have {shown}. Lower "
            "the resources, add such a node, or set cluster.autoscaling if it adds nodes on demand"
        )


def _fitting(request: Mapping[str, float], offer: Mapping[str, float], most: int) -> int:
    """How many requests fit into a node's resources, at most `most`."""
    # A share such as 0.1 of a resource must not be lost to the rounding of floats.
    shares = [math.floor(offer.get(key, 0) / n + 1e-6) for key, n in request.items()]
    return min([most, *shares])
