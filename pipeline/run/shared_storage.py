"""Marks in a storage root, by which every node proves that it sees the root that the run's driver
sees.

    <root>/marks/<random name>   written once and kept

A path that exists on a node need not be the shared folder: a node that lacks the mount has a folder
of its own there, or lets one be made. The driver of a stage hands marks to the processes that it
starts, and each of them looks for these files before it reads or writes anything else.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.layout import Layout

WAIT_SECONDS = 75.0
"""Time in which a file of another node must show: a node may remember for as long as NFS keeps the
attributes of a folder (`acdirmax`, 60 seconds by default) that a file does not exist.
"""
PAUSE_SECONDS = 0.5
CONTENT = b"The nodes of a cluster look for this file to find out whether they see this folder.\n"


@dataclass(frozen=True)
class Mark:
    """A file that exists only in one storage root: its root, a folder or a URI, and its name."""

    root: str
    name: str

    @property
    def path(self) -> str:
        return storage.join(_folder(self.root), self.name)


def mark_of(root: str) -> Mark:
    """The mark of a storage root, which is written if the root has none.

    Two processes may write one each at the same time: both stay valid.

    Raises:
        StorageError: the root cannot be read or written.
    """
    names = [info.base_name for info in storage.list_files(_folder(root))]
    if names:
        return Mark(root, names[0])
    mark = Mark(root, uuid.uuid4().hex)
    storage.write_bytes(mark.path, CONTENT)
    return mark


def marks_of(layout: Layout) -> tuple[Mark, ...]:
    """The marks of a run's storage roots.

    Raises:
        StorageError: a root cannot be read or written.
    """
    return tuple(map(mark_of, sorted({layout.root, layout.models_root or layout.root})))


def check_marks(marks: Iterable[Mark], address: str) -> None:
    """Checks that this node sees the same storage as the process that read the marks.

    Args:
        address: network address of this node, for the message.

    Raises:
        StorageError: a mark does not show within `WAIT_SECONDS`, or the root cannot be read.
    """
    for mark in marks:
        try:
            seen = shows(mark.path)
        except StorageError as error:
            raise StorageError(f"node {node_name(address)}: {error}") from error
        if not seen:
            remedy = (
                "let the environment of that node name the same store and bucket"
                if "://" in mark.root
                else "mount it there"
            )
            raise StorageError(
                f"node {node_name(address)} does not see {mark.root} as the driver of this stage "
                f"does ({mark.path} is missing): {remedy}"
            )


def check_folder_here(folder: str, address: str | None = None) -> None:
    """Checks that an absolute path is a folder on this node; hub ids and URIs pass.

    Args:
        address: network address of this node, for the message; None where nobody knows it.

    Raises:
        StorageError: there is no such folder.
    """
    if folder.startswith("/") and not Path(folder).is_dir():
        raise StorageError(
            f"the folder {folder} is missing on node {node_name(address)}: mount it there, or copy "
            "it to the same path"
        )


def node_name(address: str | None) -> str:
    """This node as messages name it: host name and address."""
    return socket.gethostname() if address is None else f"{socket.gethostname()} ({address})"


def shows(path: str) -> bool:
    """Whether a file exists, or begins to within `WAIT_SECONDS`."""
    end = time.monotonic() + WAIT_SECONDS
    while not storage.exists(path):
        if time.monotonic() > end:
            return False
        time.sleep(PAUSE_SECONDS)
    return True


def _folder(root: str) -> str:
    return storage.join(root, "marks")
