"""Run lock: lets one command at a time work in a run's folder.

The lock is on a file and ends with the process that holds it. It is needed wherever jobs cannot
know of one another: for two commands with local Ray heads, two clusters, or a stage that is started
by hand.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import ClusterError
from pipeline.filesystems import explained
from pipeline.messages import foreign

# Errors of file systems that have no such locks.
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
HOLDER = re.compile(rb"process \d+ on [^\n]*\n?")
"""Content of a lock's file."""
_NOT_OURS = "{path} is {found} and no lock of polystill: move it away, for the lock takes its name"


@contextmanager
def alone(path: str, work: str) -> Iterator[None]:
    """Holds the lock of some work within the context.

    On a file system without locks nothing is checked.

    Args:
        path: path of the lock's file, which is never removed and names the last holder.
        work: name of the work, for the message.

    Raises:
        ClusterError: another process holds the lock, on this machine or, if the file system shares
            locks between its nodes, on another one; or something else has the file's name.
        StorageError: the file cannot be written.
    """
    if os.path.islink(path):
        raise ClusterError(_NOT_OURS.format(path=path, found="a link"))
    with explained("write", path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        _check_own(descriptor, path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = foreign(os.pread(descriptor, 200, 0).decode(errors="replace"))
            raise ClusterError(
                f"{work} is already going on in another process ({holder}; its lock is {path}): "
                "wait for its end, or give this run another name"
            ) from error
        except OSError as error:
            if error.errno not in UNKNOWN:
                raise
        with explained("write", path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _check_own(descriptor: int, path: str) -> None:
    """Refuses a file that is not a lock: taking the lock overwrites the content."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise ClusterError(_NOT_OURS.format(path=path, found="no regular file"))
    content = os.pread(descriptor, 1000, 0).strip(b"\0")  # zeros are left by a loss of power
    if content and not HOLDER.fullmatch(content):
        raise ClusterError(_NOT_OURS.format(path=path, found="a file with another content"))
