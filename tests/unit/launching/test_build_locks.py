"""Locks and copies of compiled ops, where other hosts may build in the same folder."""

import os
import shutil
import time
from pathlib import Path

import pytest

from students.launching import build_locks
from students.launching.build_locks import (
    FIRST_PID_NAMESPACE,
    OLD_SECONDS,
    copy_ops,
    file_system_of,
    is_private,
    ops_folder,
    remove_copy,
    remove_stale_build_locks,
)


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock that no process here holds, in an environment of its own."""
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setattr("sys.prefix", str(tmp_path / "environment"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "environment" / "torch_extensions" / "op" / "lock"
    path.parent.mkdir(parents=True)
    path.touch()
    (path.parent / "op.so").write_bytes(b"library")
    return path


def seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_locks, "file_system_of", lambda path: kind)


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "lustre", "fuse.sshfs", "9p", ""])
def test_workers_use_a_copy_where_other_hosts_may_build(
    lock: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    seen(kind, monkeypatch)
    folder = ops_folder("abc")
    assert folder == tmp_path / "polystill-ops-abc"
    copy_ops(folder)
    assert [path.name for path in (folder / "op").iterdir()] == ["op.so"]
    assert folder.stat().st_mode & 0o077 == 0
    (folder / "op" / "lock").touch()  # of a builder that was killed
    copy_ops(folder)
    assert not (folder / "op" / "lock").exists()
    remove_copy(folder)
    assert not folder.exists() and lock.exists()


def test_a_copy_is_made_without_compiled_ops(
    lock: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen("nfs", monkeypatch)
    shutil.rmtree(tmp_path / "environment")
    copy_ops(ops_folder("abc"))
    assert list(ops_folder("abc").iterdir()) == []


def test_the_environment_serves_on_a_disk_of_this_host(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen("overlay", monkeypatch)
    built = lock.parents[1]
    assert ops_folder("abc") == built
    copy_ops(built)
    remove_copy(built)
    assert (lock.parent / "op.so").exists()


def test_the_folder_that_the_user_names_serves(
    lock: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen("nfs", monkeypatch)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "named"))
    assert ops_folder("abc") == tmp_path / "named"


def test_a_disk_that_containers_share_is_not_private(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind, namespace, private in (
        ("ext4", FIRST_PID_NAMESPACE, True),
        ("ext4", "pid:[4026532290]", False),
        ("overlay", "pid:[4026532290]", True),
        ("nfs4", FIRST_PID_NAMESPACE, False),
    ):
        seen(kind, monkeypatch)
        monkeypatch.setattr("os.readlink", lambda path, name=namespace: name)
        assert is_private(lock.parent) == private


def test_a_lock_that_another_host_may_hold_is_left_until_it_is_old(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lock.parents[1]
    seen("nfs", monkeypatch)
    assert remove_stale_build_locks(folder) == []
    written = time.time() - OLD_SECONDS - 60
    os.utime(lock, (written, written))
    assert remove_stale_build_locks(folder) == [lock]
    assert [path.name for path in lock.parent.iterdir()] == ["op.so"]


def test_the_file_system_of_a_folder_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    assert file_system_of(Path("/proc/self")) == "proc"
    assert file_system_of(tmp_path) == file_system_of(tmp_path / "not" / "there")
    assert file_system_of(tmp_path)


def test_only_locks_without_a_living_builder_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen("overlay", monkeypatch)
    for name in ("dead", "alive"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    (tmp_path / "released").mkdir()
    (tmp_path / "released" / "lock").symlink_to("gone by the time it is looked at")
    with (tmp_path / "alive" / "lock").open():
        assert remove_stale_build_locks(tmp_path) == [tmp_path / "dead" / "lock"]
    assert (tmp_path / "alive" / "lock").exists()
