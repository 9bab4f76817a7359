"""One command at a time: a lock on a file, which is gone with the process that holds it.

It stands where jobs cannot know of one another: two commands with a head of their own, two
clusters, a stage started by hand.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import storage
from pipeline.errors import ClusterError

# What file systems without such locks answer.
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def alone(path: str, work: str) -> Iterator[None]:
    """Holds the lock of some work; a file system that has none is trusted.

    Args:
        path: of the lock's file, which stays: it names the last holder.
        work: what is done, for the message.

    Raises:
        ClusterError: another process holds it, on this machine or, where the file system tells its
            nodes of locks, on another.
        StorageError: the file cannot be written.
    """
    with storage.explained("write", path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
            raise ClusterError(
                f"{work} goes on in another process already ({holder}; its lock is {path}): wait "
                "for its end, or give this run another name"
            ) from error
        except OSError as error:
            if error.errno not in UNKNOWN:
                raise
        with storage.explained("write", path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
