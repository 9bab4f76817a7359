"""Run lock: lets one command at a time work in a run's folder.

The lock is on a file and ends with the process that holds it. It is needed wherever jobs cannot
know of one another: for two commands with local Ray heads, two clusters, or a stage that is started
by hand.
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

# Errors of file systems that have no such locks.
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def alone(path: str, work: str) -> Iterator[None]:
    """Holds the lock of some work within the context.

    On a file system without locks nothing is checked.

    Args:
        path: path of the lock's file, which is never removed and names the last holder.
        work: name of the work, for the message.

    Raises:
        ClusterError: another process holds the lock, on this machine or, if the file system shares
            locks between its nodes, on another one.
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
                f"{work} is already going on in another process ({holder}; its lock is {path}): "
                "wait for its end, or give this run another name"
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
