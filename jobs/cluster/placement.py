"""Placement: whether the cluster has room for a run's stages, before anything is computed."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from jobs.bookkeeping.plan import STAGE_NAMES
from pipeline.config.base import Resources
from pipeline.config.run import Config
from pipeline.errors import ClusterError
from teachers.pool.placement import check_placement

LOCAL_CUSTOM_RESOURCE = 1000.0
"""Amount of every custom resource that a local Ray head has, since it is the only node."""


def stage_resources(
    config: Config, stages: Collection[str] = STAGE_NAMES
) -> Iterator[tuple[str, Resources, int]]:
    """Resources that must be there at once in the given stages.

    Yields:
        Name of what needs them, resources of one part, and the number of parts.
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
    """Custom resources of a local Ray head: all that the config names."""
    named = [resources.custom for _, resources, _ in stage_resources(config)]
    return {name: LOCAL_CUSTOM_RESOURCE for custom in named for name in custom}


def check_local_head(config: Config, stages: Collection[str]) -> None:
    """Checks that a local Ray head would hold the stages.

    Raises:
        ClusterError: `cluster.local_num_cpus` or `cluster.local_num_gpus` is too small.
    """
    head: dict[str, float] = {"CPU": config.cluster.local_num_cpus}
    if config.cluster.local_num_gpus is not None:
        head["GPU"] = config.cluster.local_num_gpus
    node = {"Alive": True, "Resources": head | local_custom_resources(config)}
    for name, resources, count in stage_resources(config, stages):
        if "GPU" not in head:  # Ray counts them when it starts
            resources = resources.model_copy(update={"num_gpus": 0})
        check_placement(name, resources, [node], count)


def cautions(config: Config, nodes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Parts of a run that the present nodes cannot hold, one line each.

    Other nodes may join before the parts are started.

    Args:
        nodes: the result of `ray.nodes()`.
    """
    if config.cluster.autoscaling:
        return []
    lines = []
    for name, resources, count in stage_resources(config):
        try:
            check_placement(name, resources, nodes, count)
        except ClusterError as error:
            lines.append(str(error))
    return lines
