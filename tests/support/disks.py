"""Disks that are full."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class SmallDisk:
    """A folder without room for much.

    A tmpfs of its own where this user may mount one. Elsewhere the kernel's limit on the size of a
    file stands in: it, too, fails a write after the file was opened, with another error number.
    """

    FILE_LIMIT_BYTES = 2048

    def __init__(self, folder: Path, mounted: bool) -> None:
        self.folder, self.mounted = folder, mounted
        self._limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.message_parts = ["cannot write", "the disk is full" if mounted else "File too large"]

    def fill(self, leave_bytes: int = 0) -> None:
        """Takes the room that is left; some can be spared on a disk of its own."""
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.FILE_LIMIT_BYTES, self._limits[1]))
            return
        with (self.folder / "filler").open("wb", buffering=0) as filler:
            try:
                while filler.write(b"\0" * 4096):
                    pass
            except OSError:
                os.fsync(filler.fileno())
            filler.truncate(filler.tell() - leave_bytes)

    def free(self) -> None:
        """Gives the room back."""
        if self.mounted:
            (self.folder / "filler").unlink(missing_ok=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, self._limits)


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[SmallDisk]:
    """A small disk, gone with the context."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and not subprocess.run(mount).returncode
    disk = SmallDisk(folder, mounted)
    try:
        yield disk
    finally:
        disk.free()
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
