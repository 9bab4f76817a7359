"""Stages on a cluster of several nodes, and the loss of one: raylets on this machine stand for
nodes, and a server in this process for the teacher.
"""

from __future__ import annotations

import json
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests
import yaml

from jobs.cluster.connection import connect
from jobs.cluster.local_head import LocalHead, local_head
from jobs.cluster.submit import list_jobs
from tests.integration.models import save_tiny_llama
from tests.support.caches import cached_rows, dataset, shards
from tests.support.command_line import (
    RunningCommand,
    polystill,
    start_polystill,
    token_environment,
)
from tests.support.endpoints import SERVED, FakeVllm, Json, Response, loopback
from tests.support.nodes import ExtraNode, extra_node
from tests.support.tokenizers_for_tests import SPECIAL, save_tokenizer

pytestmark = pytest.mark.timeout(300)
TEACHER, RUN = "served", "nodes"
NUM_PROMPTS, PROMPTS_PER_SHARD, ROWS = 120, 16, 20
LETTERS = "abcdefghijklmnop"
TEACHER_NODE, STUDENT_NODE = {"teacher_node": 1.0}, {"student_node": 1.0}
CONFIG = {
    "name": RUN,
    "seed": 1,
    "storage": {"root": "./output"},
    "prompts": {"sources": [{"path": "./prompts.jsonl"}], "holdout_fraction": 0.1},
    "teachers": {
        TEACHER: {
            "endpoint": {
                "model": SERVED,
                "api": "vllm",
                "tokenizer": "./student",
                "dtype": "float32",
                "max_model_len": 64,
            },
            "model_identity": "a hash",
            "resources": {"num_cpus": 0.5, "custom": {"teacher_node": 0.5}},
        }
    },
    "synthesis": {
        "recipes": [
            {
                "type": "answer",
                "by": "every_teacher",
                "sampling": {"temperature": 0.7, "max_tokens": 8},
            }
        ],
        "prompts_per_shard": PROMPTS_PER_SHARD,
    },
    "scoring": {"num_logprobs": 16, "selection": {"type": "top_k", "max_entries": 5}},
    "combine": {
        "method": "mixture",
        "weights": {"type": "confidence", "per": "token", "temperature": 1.0},
    },
    "student": {"model": "./student", "initialization": "random"},
    "training": {
        "losses": [{"type": "forward_kl", "weight": 1.0}],
        "steps": 1,
        "sequences_per_step": 1,
        "tokens_per_micro_batch": 64,
        "learning_rate": 0.001,
        "warmup_steps": 0,
        "evaluate_every_steps": 1,
        "checkpoint_every_steps": 1,
    },
    "evaluation": {"sampling": {"temperature": 0.0, "max_tokens": 8}},
    "cluster": {"autoscaling": True},  # what is lost comes back
}


@dataclass
class Server:
    """The teacher's server, which can keep requests of one kind waiting.

    Attributes:
        held_back: which requests wait, by path and body.
        is_open: set while nothing waits.
        has_held: set once a request has waited.
    """

    url: str = ""
    held_back: Callable[[str, Json], bool] = lambda path, body: False
    is_open: threading.Event = field(default_factory=threading.Event)
    has_held: threading.Event = field(default_factory=threading.Event)
    fake: FakeVllm = field(default_factory=FakeVllm)

    def __call__(self, path: str, body: Json) -> Response:
        if not self.is_open.is_set() and self.held_back(path, body):
            self.has_held.set()
            self.is_open.wait()
        return self.fake(path, body)

    @contextmanager
    def holding(self, held_back: Callable[[str, Json], bool]) -> Iterator[None]:
        """Keeps requests waiting until `is_open` is set, or until the context ends."""
        self.held_back = held_back
        self.has_held.clear()
        self.is_open.clear()
        try:
            yield
        finally:
            self.is_open.set()


@dataclass(frozen=True)
class Run:
    """A run and its storage root; all runs of the module have one config.

    Attributes:
        config: the config's file.
        root: storage root.
    """

    config: Path
    root: Path

    def start(self, cluster: Cluster, stage: str, *overrides: str) -> RunningCommand:
        """Submits a stage from another process, which follows it."""
        return start_polystill(
            self.root.with_name(f"{self.root.name}-{stage}"),
            *("submit", stage, self.config, f"storage.root={self.root}", *overrides),
            *("--address", cluster.head.address),
            env=token_environment(cluster.head.token),
        )

    def assert_every_sequence_has_one_row(self) -> None:
        wanted = dataset(self.root, RUN)
        assert len(wanted) == NUM_PROMPTS
        assert cached_rows(shards(self.root, TEACHER)).keys() == wanted.keys()


@dataclass(frozen=True)
class Cluster:
    """Head without resources for work, a node for teachers and a node for students."""

    head: LocalHead
    teacher_node: ExtraNode
    student_node: ExtraNode


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    server.is_open.set()
    with loopback(server) as http:
        server.url = http.url
        yield server


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with (
        local_head(num_cpus=1, num_gpus=0, custom_resources={}) as head,
        extra_node(head, TEACHER_NODE) as teacher_node,
        extra_node(head, STUDENT_NODE) as student_node,
    ):
        yield Cluster(head, teacher_node, student_node)


@pytest.fixture(scope="module")
def synthesized(tmp_path_factory: pytest.TempPathFactory, server: Server, cluster: Cluster) -> Run:
    """A run that is prepared and synthesized; to be copied."""
    folder = tmp_path_factory.mktemp("nodes")
    save_tiny_llama(folder / "student", seed=0)
    save_tokenizer(folder / "student", tokens=[*SPECIAL, *LETTERS])
    words = random.Random(0)
    prompts = [
        {"text": "".join(words.choices(LETTERS, k=12)), "domain": "letters"}
        for _ in range(NUM_PROMPTS)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    config = json.loads(json.dumps(CONFIG))
    config["storage"]["shared_roots"] = [str(folder)]
    config["teachers"][TEACHER]["endpoint"]["url"] = server.url
    run = Run(folder / "config.yaml", folder / "synthesized")
    run.config.write_text(yaml.safe_dump(config))
    done = polystill("stage", "prepare", run.config, f"storage.root={run.root}")
    assert done.returncode == 0, done.stderr
    assert finished(run.start(cluster, "synthesize")) == 0
    return run


@pytest.fixture
def run(synthesized: Run, tmp_path: Path) -> Run:
    """The synthesized run in a storage root of its own."""
    copy = synthesized.root.with_name(tmp_path.name)
    shutil.copytree(synthesized.root, copy)
    return Run(synthesized.config, copy)


def finished(command: RunningCommand, seconds: float = 120) -> int:
    """Waits for the end of a command; returns its exit code."""
    code = command.process.wait(timeout=seconds)
    print(command.printed())
    return code


def test_stages_go_to_their_nodes(cluster: Cluster, run: Run) -> None:
    assert finished(run.start(cluster, "score")) == 0
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
    cluster: Cluster, server: Server, run: Run, moment: str
) -> None:
    def is_held_back(path: str, body: Json) -> bool:
        return bool(shards(run.root, TEACHER)) if moment == "while it works" else not body

    place = {"lost_node": 1.0}
    with extra_node(cluster.head, place) as node, server.holding(is_held_back):
        needs = f"teachers.{TEACHER}.resources.custom={{lost_node: 0.5}}"
        command = run.start(cluster, "score", needs)
        command.wait_until("a request that is held back", server.has_held.is_set, seconds=60)
        before = {path: path.stat().st_mtime_ns for path in shards(run.root, TEACHER)}
        node.lose()
        server.is_open.set()
        with extra_node(cluster.head, place):
            assert finished(command) == 0
    run.assert_every_sequence_has_one_row()
    assert bool(before) == (moment == "while it works")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    said = command.printed()
    assert re.search(r"served: a replica is lost, another is launched: .*\S\n", said)
    assert "namespace:" not in said and "(raylet)" not in said
