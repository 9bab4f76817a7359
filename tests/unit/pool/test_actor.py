"""One teacher's actor without Ray: what its node must see, and how its death is told."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from pipeline.config.base import ModelFiles
from pipeline.config.student import StudentConfig
from pipeline.config.teachers import EndpointConfig
from pipeline.errors import StorageError
from pipeline.run import shared_storage
from pipeline.run.shared_storage import Mark, mark_of
from teachers.pool.actor import TeacherActor
from teachers.pool.deaths import LONGEST_REASON, reason_in_words
from teachers.protocol import EndpointSpec, EngineSpec
from teachers.tokenizing import load_tokenizer


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_storage, "WAIT_SECONDS", 0.0)


def endpoint(student: Path) -> EndpointSpec:
    address = EndpointConfig(url="http://127.0.0.1:9/v1", model="m", api="openai", scores=False)
    files = StudentConfig(model=str(student), initialization="random")
    return EndpointSpec(address, student=files, min_model_len=8)


@pytest.mark.parametrize("kind", ["engine", "endpoint"])
def test_a_node_that_does_not_see_the_storage_is_named_before_the_teacher_starts(
    tmp_path: Path, kind: str
) -> None:
    spec = EngineSpec(str(tmp_path), 8) if kind == "engine" else endpoint(tmp_path)
    seen, of_another_disk = mark_of(f"{tmp_path}/root"), Mark(f"{tmp_path}/models", "f" * 32)
    with pytest.raises(StorageError) as told:
        asyncio.run(TeacherActor(spec, (seen, of_another_disk)).ready())
    assert str(told.value).startswith(f"node {socket.gethostname()} (")
    assert f"does not see {tmp_path}/models as the driver" in str(told.value)


@pytest.mark.parametrize("kind", ["engine", "endpoint"])
def test_a_folder_that_is_missing_on_the_node_is_never_looked_up_as_a_hub_id(
    tmp_path: Path, kind: str
) -> None:
    missing = tmp_path / "model"
    spec = EngineSpec(str(missing), 8) if kind == "engine" else endpoint(missing)
    with pytest.raises(StorageError, match=rf"{missing} is missing on node \S+ \([0-9.]+\): mount"):
        asyncio.run(TeacherActor(spec, (mark_of(str(tmp_path)),)).ready())


def test_a_tokenizer_of_a_missing_folder_names_the_node(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=rf"{tmp_path}/student is missing on node \S+: mount"):
        load_tokenizer(ModelFiles(f"{tmp_path}/student"))


NODE_DIED = (
    "The actor died because its node has died. Node Id: feaf72e0\n"
    "\tthe actor's node was terminated unexpectedly: missing too many heartbeats"
)
MEMORY = "Task was killed due to the node running low on memory.\n" + "PID\tMEM(GB)\tCOMMAND\n" * 99


def death(reason: str, address: str = "10.77.0.11", never_started: bool = False) -> RayError:
    return ActorDiedError(
        ActorDiedErrorContext(
            error_message=reason,
            actor_id=b"\xb9" * 16,
            class_name="TeacherActor",
            pid=41,
            name="",
            ray_namespace="e04a457b-7ce9",
            node_ip_address=address,
            never_started=never_started,
        )
    )


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            death(NODE_DIED),
            "node 10.77.0.11: The actor died because its node has died. Node Id: feaf72e0 the "
            "actor's node was terminated unexpectedly: missing too many heartbeats",
        ),
        (
            death("owner left", never_started=True),
            "node 10.77.0.11: owner left The actor never ran - it was cancelled before it started "
            "running.",
        ),
        (death("the worker exited", address=""), "the worker exited"),
        (ActorDiedError(), "The actor died unexpectedly before finishing this task."),
        (
            ActorUnavailableError("RPC error: Socket closed\nrpc_code: 14", b"\x16" * 16),
            f"The actor {'16' * 16} is unavailable: RPC error: Socket closed rpc_code: 14. The "
            "task may or may not have been executed on the actor.",
        ),
    ],
    ids=["its node", "never ran", "no address", "no cause", "out of reach"],
)
def test_a_death_is_told_in_one_line_with_its_node(error: RayError, told: str) -> None:
    assert reason_in_words(str(error)) == told


def test_a_long_reason_is_cut_behind_its_first_words() -> None:
    told = reason_in_words(str(death(MEMORY)))
    assert told.startswith("node 10.77.0.11: Task was killed due to the node running low on memory")
    assert told.endswith(" …") and len(told) <= LONGEST_REASON + len("node 10.77.0.11:  …")
