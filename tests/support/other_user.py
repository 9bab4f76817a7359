"""Another user of this machine, who tries everything that a file, a folder or a socket allows."""

from __future__ import annotations

import os
import pickle
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")
NOBODY = 65534
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


def as_nobody(call: Callable[[], T]) -> T:
    """Result of a call in a process of the user `nobody`, who is in no group of ours."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            result = call()
        except BaseException as error:
            result = error
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        result = pickle.load(pipe)
    os.waitpid(child, 0)
    if isinstance(result, BaseException):
        raise result
    return result


def open_to_nobody(paths: list[Path]) -> list[str]:
    """Everything that `nobody` can do to the given files, folders and sockets, one line each."""
    kinds = [(path, path.lstat().st_mode) for path in paths if os.path.lexists(path)]
    return as_nobody(lambda: [f"{done} {path}" for path, mode in kinds for done in _do(path, mode)])


def _do(path: Path, mode: int) -> list[str]:
    ways: dict[str, Callable[[], object]] = {"chmod": lambda: path.chmod(0o777)}
    if stat.S_ISDIR(mode):
        ways["list"] = lambda: os.listdir(path)
        ways["enter"] = lambda: os.chdir(path)
        ways["write"] = lambda: (path / "made_by_nobody").touch()
    elif stat.S_ISSOCK(mode):
        ways["connect"] = lambda: socket.socket(socket.AF_UNIX).connect(str(path))
    elif stat.S_ISREG(mode):
        ways["read"] = lambda: path.read_bytes()
        ways["write"] = lambda: path.open("ab").close()
    return [way for way, act in ways.items() if _succeeds(act)]


def _succeeds(act: Callable[[], object]) -> bool:
    try:
        act()
    except OSError:
        return False
    return True
