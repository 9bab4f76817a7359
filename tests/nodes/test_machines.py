"""Faults of a real network and of real mounts, on machines made of namespaces: `make nodes`."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.caches import shards
from tests.support.endpoints import loopback
from tests.support.machines import (
    ADDRESSES,
    JOB_SERVER,
    SWITCH,
    SWITCH_ADDRESS,
    Machines,
    inside,
    machines,
)
from tests.support.quickstart import read_lines
from tests.support.served_run import RUN, TEACHER, HeldServer, ServedRun, write_config

pytestmark = [pytest.mark.nodes, pytest.mark.timeout(900)]
TEACHER_NODE, STUDENT_NODE = {"teacher_node": 1.0}, {"student_node": 1.0}
STEPS = 8
TRAINING = (
    "training.workers=2",
    "training.resources={num_cpus: 1, custom: {student_node: 0.6}}",
    f"training.steps={STEPS}",
    "training.log_every_steps=1",
    "training.checkpoint_every_steps=4",
)
"""Two workers that take more than half a node each."""


@pytest.fixture(scope="module")
def lab() -> Iterator[Machines]:
    """The network, with the power of all machines off."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.fail("make nodes needs root and the command `ip` of iproute2")
    with machines(secrets.token_hex(32)) as lab:
        yield lab


@pytest.fixture(scope="module")
def server(lab: Machines) -> Iterator[HeldServer]:
    server = HeldServer()
    with inside(SWITCH), loopback(server, SWITCH_ADDRESS) as http:
        server.url = http.url
        yield server


@pytest.fixture
def cluster(lab: Machines) -> Iterator[Machines]:
    """Head and teacher machine are on; at the end all power is off."""
    lab.start("head", {})
    lab.start("t1", TEACHER_NODE)
    yield lab
    for name in ADDRESSES:
        lab.mend_cable(name)
        lab.cut_power(name)


@pytest.fixture(scope="module")
def prepared(
    lab: Machines, server: HeldServer, tmp_path_factory: pytest.TempPathFactory
) -> ServedRun:
    """A run that is prepared; its commands come from the laptop."""
    folder = tmp_path_factory.mktemp("shared")
    config = write_config(folder, server.url)
    run = ServedRun(config, folder / "prepared", JOB_SERVER, lab.token, lab.on("laptop"))
    run.prepare()
    return run


@pytest.fixture
def run(prepared: ServedRun, tmp_path: Path) -> ServedRun:
    return prepared.copied(tmp_path.name)


def test_a_teacher_whose_cable_is_cut_is_replaced_and_its_late_work_does_no_harm(
    cluster: Machines, server: HeldServer, run: ServedRun
) -> None:
    run.finish("submit", "synthesize")
    with server.holding(lambda path, body: bool(shards(run.root, TEACHER))):
        command = run.start("submit", "score")
        command.wait_until("a request that is held back", server.has_held.is_set, seconds=180)
        cluster.cut_cable("t1")
        server.is_open.set()
        cluster.start("t2", TEACHER_NODE)
        command.wait_until("the loss", lambda: "replica is lost" in command.printed(), seconds=180)
        cluster.mend_cable("t1")
        assert command.process.wait(timeout=180) == 0, command.printed()
    run.assert_every_sequence_has_one_row()
    assert f"node {ADDRESSES['t1']}: " in command.printed()


def test_two_students_meet_though_a_host_name_resolves_to_its_own_loopback(
    cluster: Machines, run: ServedRun
) -> None:
    """As the installers of Debian and Ubuntu write it into `/etc/hosts`."""
    for name in ("s1", "s2"):
        cluster.start(name, STUDENT_NODE, hosts={f"n-{name}": "127.0.1.1"})
    run.finish("submit", "synthesize")
    run.finish("submit", "score")
    run.finish("submit", "train", *TRAINING, seconds=400)
    metrics = read_lines(run.root / "runs" / RUN / "student/metrics.jsonl")
    steps = [line["step"] for line in metrics if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))


def test_a_teachers_machine_without_the_storage_is_named_and_writes_nothing(
    lab: Machines, run: ServedRun
) -> None:
    lab.start("head", {})
    lab.start("t1", TEACHER_NODE, unmounted=[run.root])
    try:
        command = run.start("submit", "synthesize")
        assert command.process.wait(timeout=180) == 1
    finally:
        lab.cut_power("t1")
        lab.cut_power("head")
    said = f"polystill: node n-t1 ({ADDRESSES['t1']}) does not see {run.root} as the driver"
    assert said in command.printed()
    assert not (run.root / "sequences").exists()


def test_a_students_machine_without_the_models_is_named_and_no_checkpoint_lacks_its_rank(
    cluster: Machines, run: ServedRun
) -> None:
    models = run.root.with_name(f"{run.root.name}-models")
    models.mkdir()
    of_models = f"storage.models_root={models}"
    cluster.start("s1", STUDENT_NODE)
    cluster.start("s2", STUDENT_NODE, unmounted=[models])
    run.finish("submit", "synthesize", of_models)
    run.finish("submit", "score", of_models)
    command = run.start("submit", "train", of_models, *TRAINING)
    assert command.process.wait(timeout=400) == 1
    assert f"n-s2 ({ADDRESSES['s2']}) does not see {models}" in command.printed()
    assert not list(models.rglob("COMPLETE"))


def test_the_same_command_goes_on_after_the_head_was_lost(
    cluster: Machines, server: HeldServer, run: ServedRun
) -> None:
    run.finish("submit", "synthesize")
    with server.holding(lambda path, body: bool(shards(run.root, TEACHER))):
        command = run.start("submit", "score")
        command.wait_until("a request that is held back", server.has_held.is_set, seconds=180)
        before = {path: path.read_bytes() for path in shards(run.root, TEACHER)}
        for name in ("head", "t1"):  # a machine that has lost its head gives up by itself later
            cluster.cut_power(name)
        said = "no answer from the job server"
        command.wait_until(said, lambda: said in command.printed(), seconds=60)
    cluster.start("head", {})
    cluster.start("t1", TEACHER_NODE)
    assert command.process.wait(timeout=180) == 1
    printed = command.printed()
    assert "its head was restarted; run the same command again" in printed
    assert "answers again" not in printed
    run.finish("submit", "score")
    run.assert_every_sequence_has_one_row()
    assert before and before == {path: path.read_bytes() for path in before}
