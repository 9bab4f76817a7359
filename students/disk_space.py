"""A full disk in one message, whoever meets it: torch and safetensors have errors of their own."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pipeline import storage
from pipeline.errors import StorageError

FULL = (errno.ENOSPC, errno.EDQUOT)
# Of torch's and safetensors' writers, whatever the cause.
WRITING = re.compile(r"inline_container|PytorchStreamWriter|iostream error|\(os error \d+\)")
LEAST_BYTES = 2**20  # a disk with less is full for a checkpoint


@contextmanager
def full_disk_told(folder: str) -> Iterator[None]:
    """Tells a disk that fills up while a student is written, which no second try changes.

    Args:
        folder: where all of it is written.

    Raises:
        StorageError: the disk is full, or torch or safetensors could not write. Other errors pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        with storage.explained("write", error.filename or folder):
            raise
    except (RuntimeError, SafetensorError) as error:
        if not WRITING.search(str(error)):
            raise
        if _free_bytes(folder) < LEAST_BYTES:
            with storage.explained("write", folder):
                raise OSError(errno.ENOSPC, str(error)) from error
        raise StorageError(
            f"cannot write {folder}: {error}. The disk has room: is a quota reached? Everything "
            "finished so far is kept; run the same command again."
        ) from error


def _free_bytes(folder: str) -> int:
    there = next(path for path in (Path(folder), *Path(folder).parents) if path.exists())
    return shutil.disk_usage(there).free
