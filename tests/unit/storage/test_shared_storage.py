"""Nodes prove that they see the storage root of the driver; folders stand for nodes."""

import socket
import threading
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.run import shared_storage
from pipeline.run.shared_storage import Mark, check_folder_here, check_marks, mark_of


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_storage, "WAIT_SECONDS", 0.0)


def test_a_node_with_the_shared_root_sees_the_mark(tmp_path: Path) -> None:
    mark = mark_of(f"{tmp_path}/output/")

    assert Path(mark.path).is_file()
    check_marks([mark, mark_of(f"{tmp_path}/models")], "10.77.0.11")


def test_a_root_keeps_its_mark(tmp_path: Path) -> None:
    first = mark_of(str(tmp_path))

    assert mark_of(str(tmp_path)) == first
    assert len(list((tmp_path / "marks").iterdir())) == 1


def test_a_mark_that_somebody_else_reads_stays_valid_beside_another(tmp_path: Path) -> None:
    mark = mark_of(str(tmp_path))
    storage.write_bytes(Mark(str(tmp_path), "0" * 32).path, b"")  # by a driver at the same moment

    check_marks([mark], "10.77.0.11")
    check_marks([mark_of(str(tmp_path))], "10.77.0.11")


@pytest.mark.parametrize("node_has", ["nothing", "an empty folder", "a root of its own"])
def test_a_node_without_the_mount_is_named(tmp_path: Path, node_has: str) -> None:
    root = tmp_path / "output"
    mark = mark_of(str(root))
    root.rename(tmp_path / "where the driver has it")
    if node_has != "nothing":
        root.mkdir()
    if node_has == "a root of its own":
        mark_of(str(root))

    with pytest.raises(StorageError) as caught:
        check_marks([mark], "10.77.0.11")

    message = str(caught.value)
    assert f"node {socket.gethostname()} (10.77.0.11) does not see {root}" in message
    assert message.endswith("mount it there")


def test_a_mark_may_show_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_storage, "WAIT_SECONDS", 20.0)
    monkeypatch.setattr(shared_storage, "PAUSE_SECONDS", 0.01)
    mark = Mark(str(tmp_path), "f" * 32)
    timer = threading.Timer(0.1, lambda: storage.write_bytes(mark.path, b""))
    timer.start()

    check_marks([mark], "10.77.0.11")

    timer.join()


def test_a_root_that_cannot_be_read_names_the_node(tmp_path: Path) -> None:
    mark = Mark(f"no-such-scheme://{tmp_path}", "f" * 32)

    with pytest.raises(StorageError, match=r"node .* \(10\.77\.0\.11\): cannot reach no-such"):
        check_marks([mark], "10.77.0.11")


def test_only_a_missing_folder_is_refused(tmp_path: Path) -> None:
    check_folder_here("Qwen/Qwen3-1.7B", "10.77.0.11")
    check_folder_here(str(tmp_path), "10.77.0.11")

    with pytest.raises(StorageError, match=r"student is missing on node .* \(10\.77\.0\.11\)"):
        check_folder_here(f"{tmp_path}/student", "10.77.0.11")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file is missing"):
        check_folder_here(f"{tmp_path}/file", "10.77.0.11")
