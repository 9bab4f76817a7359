"""Two nodes train one student: one is preempted after a notice, one is lost without any."""

import pickle
import re
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from jobs.cluster.local_head import LocalHead, local_head
from students.checkpoints.resume import marked_checkpoints
from tests.support.command_line import ROOT
from tests.support.nodes import extra_node
from tests.support.trainings import make_spec, steps_of

pytestmark = pytest.mark.timeout(600)
STEPS, CHECKPOINTS = 500, 50
SHARE = {"student_node": 1.0}


def test_two_student_nodes_train_as_one_and_survive_a_notice_and_a_loss(material, tmp_path):
    """Each node holds one worker. No failure may be counted: none repeats without a checkpoint."""
    spec = make_spec(
        material,
        "nodes",
        workers=2,
        zero_stage=1,
        steps=STEPS,
        evaluate_every_steps=STEPS,
        checkpoint_every_steps=CHECKPOINTS,
        log_every_steps=10,
        max_failures=1,
        resources={"num_cpus": 1, "custom": {"student_node": 0.6}},
    )
    log = tmp_path / "log"
    with ExitStack() as stack:
        head = stack.enter_context(local_head(1, 0, {}))
        _, second = (stack.enter_context(extra_node(head, SHARE)) for _ in range(2))
        driver = stack.enter_context(driving(spec, head, tmp_path, log))
        wait_for_step(spec, 30, driver, log)
        drain(head, second.node_id)
        step = int(wait_for(r"goes away at \d\d:\d\d:\d\d: checkpoint at step (\d+)", driver, log))
        third = stack.enter_context(extra_node(head, SHARE))
        assert int(wait_for(r"resumed from step (\d+)", driver, log)) == step
        wait_for_step(spec, step + CHECKPOINTS + 20, driver, log)
        third.lose()
        stack.enter_context(extra_node(head, SHARE))
        wait_for(r"failed: rank \d: lost: (.*)", driver, log)
        assert driver.wait(300) == 0, log.read_text()
    said = log.read_text()
    assert "restart 1 of 1 since checkpoint step-" in said
    resumed = [int(step) for step in re.findall(r"resumed from step (\d+)", said)]
    assert len(resumed) == 2 and resumed[0] == step < resumed[1]
    steps = steps_of(spec)
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    checkpoints = marked_checkpoints(spec.folder)
    assert checkpoints
    for checkpoint in checkpoints:
        assert {path.name for path in checkpoint.glob("rng-*")} == {"rng-0.pt", "rng-1.pt"}


def driving(spec, head: LocalHead, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """A driver that trains on a head's cluster, and is killed at the end of the context."""
    pickled = folder / "spec.pickle"
    pickled.write_bytes(pickle.dumps(spec))
    command = [sys.executable, "-m", "tests.support.training_driver", str(pickled)]
    command.append(head.gcs_address)
    with log.open("wb") as stream:
        return Driver(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT)


class Driver(subprocess.Popen):
    def __exit__(self, *_):
        self.kill()
        self.wait()


def drain(head: LocalHead, node_id: str) -> None:
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "drain-node"]
    command += ["--address", head.gcs_address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command += ["--deadline-remaining-seconds", "120"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def wait_for_step(spec, step: int, driver: Driver, log: Path) -> None:
    until(lambda: [done for done in steps_of(spec) if done >= step], driver, log)


def wait_for(pattern: str, driver: Driver, log: Path) -> str:
    """First group of the first match in the driver's log, once it is there."""
    (found,) = until(lambda: re.findall(pattern, log.read_text())[:1], driver, log)
    return found


def until(look, driver: Driver, log: Path, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert driver.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
    return found
