"""Is there room for what a run still asks for? Looked at before anything is computed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jobs.bookkeeping.plan import STAGE_NAMES
from pipeline.config.base import Resources
from pipeline.config.run import Config
from pipeline.errors import ClusterError
from teachers.pool.placement import check_placement

LOCAL_CUSTOM_RESOURCE = 1000.0
"""What a head of its own has of every custom resource: it is the only node."""


def asked_resources(
    config: Config, stages: Collection[str] = STAGE_NAMES
) -> Iterator[tuple[str, Resources, int]]:
    """Whatever must fit at once in these stages: its name, the resources of each part, and how many
    parts.
    """
    if not {"synthesize", "score", "evaluate"}.isdisjoint(stages):
        for name, teacher in config.teachers.items():
            yield f"an engine of {name!r}", teacher.resources, 1
    if "train" in stages:
        yield "the student", config.training.resources, config.training.workers
    if not {"export", "evaluate"}.isdisjoint(stages):
        yield "the evaluation", config.evaluation.resources, 1
    yield "a stage's job", config.cluster.job_resources, 1


def local_custom_resources(config: Config) -> dict[str, float]:
    """The custom resources of a head of its own."""
    asked = [resources.custom for _, resources, _ in asked_resources(config)]
    return {name: LOCAL_CUSTOM_RESOURCE for custom in asked for name in custom}


def check_local_head(config: Config, stages: Collection[str]) -> None:
    """Checks that a head of its own would hold the stages.

    Raises:
        ClusterError: `cluster.local_num_cpus` or `cluster.local_num_gpus` do not suffice.
    """
    head: dict[str, float] = {"CPU": config.cluster.local_num_cpus}
    if config.cluster.local_num_gpus is not None:
        head["GPU"] = config.cluster.local_num_gpus
    node = {"Alive": True, "Resources": head | local_custom_resources(config)}
    for name, resources, count in asked_resources(config, stages):
        if "GPU" not in head:  # Ray counts them when it starts
            resources = resources.model_copy(update={"num_gpus": 0})
        check_placement(name, resources, [node], count)


def cautions(config: Config, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the nodes could not hold as they are now; some may join before it is asked for.

    Args:
        nodes: what `ray.nodes()` returns.
    """
    if config.cluster.autoscaling:
        return []
    found = []
    for name, resources, count in asked_resources(config):
        try:
            check_placement(name, resources, nodes, count)
        except ClusterError as error:
            found.append(str(error))
    return found
