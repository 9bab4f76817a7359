"""Stages on a cluster of several nodes, and the loss of one: raylets on this machine stand for
nodes, and a server in this process for the teacher.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from jobs.cluster.connection import connect
from jobs.cluster.local_head import LocalHead, local_head
from jobs.cluster.submit import list_jobs
from tests.support.caches import shards
from tests.support.endpoints import Json, loopback
from tests.support.nodes import ExtraNode, extra_node
from tests.support.served_run import TEACHER, HeldServer, ServedRun, write_config

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Cluster:
    """Head without resources for work, a node for teachers and a node for students."""

    head: LocalHead
    teacher_node: ExtraNode
    student_node: ExtraNode


@pytest.fixture(scope="module")
def server() -> Iterator[HeldServer]:
    server = HeldServer()
    with loopback(server) as http:
        server.url = http.url
        yield server


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with (
        local_head(num_cpus=1, num_gpus=0, custom_resources={}) as head,
        extra_node(head, {"teacher_node": 1.0}) as teacher_node,
        extra_node(head, {"student_node": 1.0}) as student_node,
    ):
        yield Cluster(head, teacher_node, student_node)


@pytest.fixture(scope="module")
def synthesized(
    tmp_path_factory: pytest.TempPathFactory, server: HeldServer, cluster: Cluster
) -> ServedRun:
    """A run that is prepared and synthesized; to be copied."""
    folder = tmp_path_factory.mktemp("nodes")
    config = write_config(folder, server.url)
    run = ServedRun(config, folder / "first", cluster.head.address, cluster.head.token)
    run.prepare()
    run.finish("submit", "synthesize")
    return run


@pytest.fixture
def run(synthesized: ServedRun, tmp_path: Path) -> ServedRun:
    """The synthesized run in a storage root of its own."""
    return synthesized.copied(tmp_path.name)


def test_stages_go_to_their_nodes(cluster: Cluster, run: ServedRun) -> None:
    run.finish("submit", "score")
    run.assert_every_sequence_has_one_row()
    actors = requests.get(
        f"{cluster.head.address}/api/v0/actors",
        headers={"Authorization": f"Bearer {cluster.head.token}"},
        timeout=30,
    ).json()["data"]["result"]["result"]
    teachers = [each["node_id"] for each in actors if each["class_name"] == "TeacherActor"]
    assert len(teachers) == 2, "one wrote, one scored"
    assert set(teachers) == {cluster.teacher_node.node_id}
    drivers = {job.driver_node_id for job in list_jobs(connect(cluster.head.address))}
    assert drivers.isdisjoint({cluster.teacher_node.node_id, cluster.student_node.node_id})


@pytest.mark.parametrize("moment", ["while it works", "while the engine loads"])
def test_a_lost_teacher_node_is_replaced(
    cluster: Cluster, server: HeldServer, run: ServedRun, moment: str
) -> None:
    def is_held_back(path: str, body: Json) -> bool:
        return bool(shards(run.root, TEACHER)) if moment == "while it works" else not body

    place = {"lost_node": 1.0}
    with extra_node(cluster.head, place) as node, server.holding(is_held_back):
        needs = f"teachers.{TEACHER}.resources.custom={{lost_node: 0.5}}"
        command = run.start("submit", "score", needs)
        command.wait_until("a request that is held back", server.has_held.is_set, seconds=180)
        before = {path: path.read_bytes() for path in shards(run.root, TEACHER)}
        node.lose()
        server.is_open.set()
        with extra_node(cluster.head, place):
            assert command.process.wait(timeout=180) == 0, command.printed()
    run.assert_every_sequence_has_one_row()
    assert bool(before) == (moment == "while it works")
    # One that was written and not yet reported is written again, of the same bytes.
    assert before == {path: path.read_bytes() for path in before}
    said = command.printed()
    assert re.search(r"served: a replica is lost, another is launched: node [0-9.]+: .+\n", said)
    assert "namespace:" not in said and "(raylet)" not in said
