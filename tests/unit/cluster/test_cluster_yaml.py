"""cluster.yaml passes Ray's own checks and offers exactly what the multi-node config asks for."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def cluster() -> dict[str, Any]:
    """The file as written."""
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def custom_resources(node: Any) -> Iterator[str]:
    """Names under `custom` of every `resources` mapping, at any depth."""
    if isinstance(node, dict):
        resources = node.get("resources")
        if isinstance(resources, dict):
            yield from resources.get("custom", {})
        for child in node.values():
            yield from custom_resources(child)
    elif isinstance(node, list):
        for child in node:
            yield from custom_resources(child)


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    assert prepared["available_node_types"].keys() == cluster["available_node_types"].keys()


def test_ray_would_refuse_a_misspelt_key(cluster: dict[str, Any]) -> None:
    cluster["available_node_type"] = cluster.pop("available_node_types")
    with pytest.raises(Exception, match="available_node_type"):
        validate_config(prepare_config(cluster))


def test_custom_resources_are_those_of_the_multi_node_config(cluster: dict[str, Any]) -> None:
    config = yaml.safe_load((ROOT / "examples/open_weights/multi_node.yaml").read_text())
    asked = set(custom_resources(config))
    groups = cluster["available_node_types"].values()
    offered = {name for group in groups for name in group["resources"]} - {"CPU", "GPU"}
    assert asked == offered


def test_every_node_starts_with_the_token(cluster: dict[str, Any]) -> None:
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [command for command in cluster[key] if "ray start" in command]
        assert starts
        assert all("RAY_AUTH_MODE=token" in command for command in starts)


def test_no_node_starts_without_the_shared_folder(cluster: dict[str, Any]) -> None:
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in cluster[key] if "ray start" in command]
        script = start.replace("/shared", "/no-such-mount").partition("ulimit")[0] + " echo started"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stdout.startswith("/no-such-mount is not mounted on ")
        there = start.replace("/shared", "/").partition("ulimit")[0] + " echo started"
        assert subprocess.run(["bash", "-c", there], capture_output=True).stdout == b"started\n"


def test_all_nodes_install_the_cuda_lock(cluster: dict[str, Any]) -> None:
    assert any("make setup DEVICE=cuda" in command for command in cluster["setup_commands"])
