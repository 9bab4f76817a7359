"""Folder of DeepSpeed's compiled ops, and the locks that killed builds leave in it.

torch's extension builder holds its lock file open for as long as it lives, and every start of a
worker waits silently for a lock that is there. Whether a builder lives can be seen only where all
processes that may use the folder can be seen: on a disk of this host, and outside a container that
shares the disk. Anywhere else, such as in an environment on NFS, workers use a copy of their own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path

import psutil

LOCAL_DISKS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "apfs", "hfs"}
OF_ONE_CONTAINER = {"overlay", "tmpfs", "ramfs"}
"""File systems that containers do not share."""
FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""Name of the namespace in which all processes of a host are visible (PROC_PID_INIT_INO of the
kernel's include/linux/proc_ns.h).
"""
COPY = "polystill-ops-"
"""Beginning of the name of a copy, in the node's folder for temporary files."""
OLD_SECONDS = 3600.0
"""Age from which a lock counts as a dead builder's wherever it is: no op builds for so long."""


def ops_folder(group: str) -> Path:
    """Folder of the compiled ops for the workers of one start on this node.

    It is the one that `TORCH_EXTENSIONS_DIR` names, or the one that the set-up builds in the
    environment, or a copy of that.

    Args:
        group: random name of the start of these workers, which names the copy.
    """
    if named := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(named)
    local, built = tempfile.gettempdir(), built_ops()
    return built if is_private(built) or not _runs_code(local) else Path(local, COPY + group)


def built_ops() -> Path:
    """Folder of the compiled ops in the environment."""
    return Path(sys.prefix, "torch_extensions")


def copy_ops(folder: Path) -> None:
    """Makes the copy of the compiled ops, if the folder is one, without locks; one worker a node
    calls it.

    Raises:
        FileExistsError: another user has made that folder.
    """
    if not folder.name.startswith(COPY):
        return
    if _owner(folder) == os.getuid():  # of workers before these, which may have left a lock
        shutil.rmtree(folder)
    folder.mkdir(mode=0o700)
    if built_ops().is_dir():
        ignored = shutil.ignore_patterns("lock")
        shutil.copytree(built_ops(), folder, ignore=ignored, dirs_exist_ok=True)
        folder.chmod(0o700)


def remove_copy(folder: Path) -> None:
    """Removes the copy of the compiled ops, if the folder is one; libraries in use stay."""
    if folder.name.startswith(COPY):
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale_build_locks(folder: Path) -> list[Path]:
    """Removes locks of op builds whose builder is dead, since each later start would silently wait
    for them; returns their paths.

    Open files of other users' processes cannot be read: a lock of another user is left alone. Where
    other hosts or containers may build, a lock must be `OLD_SECONDS` old.
    """
    own = [path for path in folder.glob("**/lock") if _is_own_lock(path)]
    held = {name for pid in psutil.pids() for name in _open_files(pid)} if own else set()
    stale = [path for path in own if str(path.resolve()) not in held]
    if stale and not is_private(folder):
        stale = [path for path in stale if _age_seconds(path) > OLD_SECONDS]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def is_private(folder: Path) -> bool:
    """Whether all processes that can use a folder can be seen from here."""
    kind = file_system_of(folder)
    if kind in OF_ONE_CONTAINER:
        return True
    return kind in LOCAL_DISKS and os.readlink("/proc/self/ns/pid") == FIRST_PID_NAMESPACE


def file_system_of(path: Path) -> str:
    """Kind of the file system that holds a path, such as `ext4` or `nfs4`; empty if unknown."""
    resolved = path.resolve()
    mounts = {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    return next((mounts[p] for p in (resolved, *resolved.parents) if p in mounts), "")


def _runs_code(folder: str) -> bool:
    return not os.statvfs(folder).f_flag & os.ST_NOEXEC


def _age_seconds(path: Path) -> float:
    """Age of a lock by the clock of its file system, which may differ from this host's."""
    try:
        written = path.stat().st_mtime
        probe = path.with_name(f".now-{os.getpid()}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        return 0.0
    return min(now, time.time()) - written


def _is_own_lock(path: Path) -> bool:
    """Whether a file is one that torch's builder makes under this user: empty, and no link."""
    try:
        state = path.lstat()
    except FileNotFoundError:
        return False
    return state.st_uid == os.getuid() and stat.S_ISREG(state.st_mode) and not state.st_size


def _owner(path: Path) -> int | None:
    """Number of the user who owns a file; None if the file is gone."""
    try:
        return path.stat().st_uid
    except FileNotFoundError:
        return None


def _open_files(pid: int) -> list[str]:
    names = []
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed in the meantime
                names.append(os.readlink(link))
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        pass  # the process is another user's, or gone
    return names
