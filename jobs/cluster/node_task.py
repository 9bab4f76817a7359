"""One function on a node that has the resources for it, in a worker that ends with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from pipeline.config.base import Resources
from pipeline.errors import DistillationError
from pipeline.run.shared_storage import Mark, check_marks
from teachers.pool.placement import check_placement, reminders, room_in_words

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def run_on_node(
    name: str,
    resources: Resources,
    autoscaling: bool,
    marks: Sequence[Mark],
    function: Callable[..., Result],
    *arguments: object,
) -> Result:
    """Runs a function on a node, waits for its room and its end, and returns its result.

    The worker ends with the function: an idle worker would keep the device memory that the next
    engine needs.

    Args:
        name: name of the work in messages.
        resources: resources of the function.
        autoscaling: whether work that no present node can hold waits for a new node.
        marks: files that the node must see before the function begins.

    Raises:
        ClusterError: no node of the cluster has these resources.
        StorageError: the node does not see a mark.
        DistillationError: the function has raised it.
    """
    if not autoscaling:
        check_placement(name, resources, ray.nodes())
    # Ray ends the workers of GPU tasks by itself only where num_gpus stands in ray.remote().
    task = ray.remote(max_calls=1)(_begun_and_done).options(
        num_cpus=resources.num_cpus,
        num_gpus=resources.num_gpus,
        resources=resources.custom,
        num_returns="streaming",
    )
    results: Any = task.remote(marks, function, *arguments)
    waited = 0.0
    for seconds in reminders():
        if ray.wait([results], timeout=seconds, fetch_local=False)[0]:
            break
        waited += seconds
        room = room_in_words(resources, ray.nodes(), ray.available_resources())
        logger.info("%s has waited %.0f s for a node: %s", name, waited, room)
    try:
        result: Any = None
        for reference in results:  # the last one is the function's
            result = ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, DistillationError):
            raise error.cause from error
        raise
    return result


def _begun_and_done(
    marks: Sequence[Mark], function: Callable[..., Any], *arguments: object
) -> Iterator[Any]:
    """Yields once as soon as a node has the task, and then the function's result."""
    yield None
    check_marks(marks, ray.util.get_node_ip_address())
    yield function(*arguments)
