"""Entries of folders as they are: no link is followed, neither to list nor to remove.

A removal opens the folders on its way one after another and refuses links, so that it cannot leave
the storage root even if a folder is replaced by a link meanwhile. Object stores have no links.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

from pipeline import storage
from pipeline.filesystems import explained

HELD = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR)
"""Errors of removing a folder that holds something, is gone, or is none."""


@dataclass(frozen=True)
class Entry:
    """One entry below a folder.

    Attributes:
        path: path relative to that folder.
        kind: `other` is anything but file, folder and link, such as a named pipe.
        num_bytes: size of a file, else 0.
        modified: time of the last change in seconds since the epoch; 0 of a folder in an object
            store.
    """

    path: str
    kind: Literal["file", "folder", "link", "other"]
    num_bytes: int = 0
    modified: float = 0.0


def entries_below(folder: str, is_entered: Callable[[str], bool]) -> list[Entry]:
    """Entries below a folder in the order of their paths, without the folders that are entered;
    none if the folder is missing.

    Args:
        folder: local folder or URI.
        is_entered: whether to look into the folder of that relative path.

    Raises:
        StorageError: a folder cannot be listed.
    """
    walk = _stored if "://" in folder else _local
    return sorted(walk(folder, is_entered), key=lambda entry: entry.path)


def is_link(path: str) -> bool:
    """Whether a path is a link, also one to nowhere; nothing in an object store is."""
    return "://" not in path and os.path.islink(path)


def remove_file(root: str, path: str) -> None:
    """Removes a file below a root; nothing but a file, and through no link. A missing file is no
    error.

    Raises:
        StorageError: a folder on the way is a link, or the file cannot be removed.
    """
    place = storage.join(root, path)
    if "://" in root:
        storage.remove(place)
        return
    with (
        explained("remove", place),
        contextlib.suppress(FileNotFoundError),
        _opened_parent(root, path) as (descriptor, name),
    ):
        if stat.S_ISREG(os.lstat(name, dir_fd=descriptor).st_mode):
            os.unlink(name, dir_fd=descriptor)


def remove_empty_folder(root: str, path: str) -> None:
    """Removes a folder below a root if nothing at all is in it, and through no link."""
    place = storage.join(root, path)
    if "://" in root:
        storage.remove_empty_folders(place)
        return
    with explained("remove", place):
        try:
            with _opened_parent(root, path) as (descriptor, name):
                os.rmdir(name, dir_fd=descriptor)
        except OSError as error:
            if error.errno not in HELD:
                raise


@contextmanager
def _opened_parent(root: str, path: str) -> Iterator[tuple[int, str]]:
    """Descriptor of the folder that holds `path`, and the name in it."""
    *folders, name = path.split("/")
    with ExitStack() as opened:
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        opened.callback(os.close, descriptor)
        for folder in folders:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
            descriptor = os.open(folder, flags, dir_fd=descriptor)
            opened.callback(os.close, descriptor)
        yield descriptor, name


def _local(root: str, is_entered: Callable[[str], bool], below: str = "") -> Iterator[Entry]:
    folder = os.path.join(root, below)
    with explained("list", folder):
        try:
            found = list(os.scandir(folder))
        except FileNotFoundError:
            return
    for item in found:
        path = f"{below}{item.name}"
        if item.is_dir(follow_symlinks=False) and is_entered(path):
            yield from _local(root, is_entered, f"{path}/")
            continue
        try:
            state = item.stat(follow_symlinks=False)
        except FileNotFoundError:  # removed in the meantime
            continue
        kind = _kind(state.st_mode)
        num_bytes = state.st_size if kind == "file" else 0
        yield Entry(path, kind, num_bytes, state.st_mtime)


def _kind(mode: int) -> Literal["file", "folder", "link", "other"]:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    return "link" if stat.S_ISLNK(mode) else "other"


def _stored(root: str, is_entered: Callable[[str], bool]) -> Iterator[Entry]:
    left_out: set[str] = set()
    for path, info in storage.files_below(root).items():
        folders = path.split("/")[:-1]
        ways = ["/".join(folders[:i]) for i in range(1, len(folders) + 1)]
        closed = next((way for way in ways if not is_entered(way)), None)
        if closed is None:
            yield Entry(path, "file", info.size, info.mtime_ns / 1e9)
        elif closed not in left_out:
            left_out.add(closed)
            yield Entry(closed, "folder")
