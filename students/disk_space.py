"""One message for a full disk, whichever library meets it: torch and safetensors raise errors of
their own.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pipeline.errors import StorageError
from pipeline.filesystems import explained

FULL = (errno.ENOSPC, errno.EDQUOT)
WRITING = re.compile(r"inline_container|PytorchStreamWriter|iostream error|\(os error \d+\)")
"""Text in errors of torch's and safetensors' writers, whatever the cause."""
LEAST_BYTES = 2**20
"""A disk with less free space counts as full: no checkpoint fits."""


@contextmanager
def full_disk_explained(folder: str) -> Iterator[None]:
    """Explains a disk that fills up while a student is written; a second try would not help.

    Args:
        folder: folder that holds everything that is written.

    Raises:
        StorageError: the disk is full, or torch or safetensors could not write. Other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        with explained("write", error.filename or folder):
            raise
    except (RuntimeError, SafetensorError) as error:
        if not WRITING.search(str(error)):
            raise
        if _free_bytes(folder) < LEAST_BYTES:
            with explained("write", folder):
                raise OSError(errno.ENOSPC, str(error)) from error
        raise StorageError(
            f"cannot write {folder}: {error}; the disk has free space, so a quota may be reached; "
            "everything finished so far is kept: raise the quota or remove files, then run the "
            "same command again"
        ) from error


def _free_bytes(folder: str) -> int:
    existing = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    return shutil.disk_usage(existing).free
