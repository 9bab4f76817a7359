"""Keeps one local Ray head from outliving the process that asked for it.

`local_head` starts this script with a pipe as its standard input and holds the other end. The pipe
closes however the holder ends, even by SIGKILL. The guardian then stops the head and everything
that the head has started. Job drivers and workers are in sessions of their own, so stopping a
process group is not enough. The guardian therefore adopts the orphans among its descendants
(`PR_SET_CHILD_SUBREAPER`) and stops all its descendants, by id only.

It runs as a plain script, apart from the four packages, and imports none of their modules.
"""

import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from types import FrameType

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
GRACE_SECONDS = 8.0  # Ray needs about 3 s to stop its own processes in order
KILL_SECONDS = 10.0

_stop_requested = False


def _request_stop(_signal: int, _frame: FrameType | None) -> None:
    global _stop_requested
    _stop_requested = True


def _prctl(option: int, value: int) -> None:
    """Sets a process attribute, on Linux only. Elsewhere descendants are found by parent ids."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _reap(head_pid: int) -> bool:
    """Collects ended children, including adopted ones; returns whether the head is among them."""
    head_ended = False
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            return head_ended
        head_ended |= pid == head_pid


def _wait_for_end(head_pid: int) -> bool:
    """Returns True once the holder is gone or asks for a stop, False if the head just ended."""
    while not _stop_requested:
        readable, _, _ = select.select([0], [], [], 0.2)
        if readable and not os.read(0, 4096):
            return True
        if _reap(head_pid):
            return False
    return True


def _stop_everything(head_pid: int, head_running: bool) -> None:
    """Asks the head to stop, then kills all descendants of this process that are left."""
    me = psutil.Process()
    family = set(me.children(recursive=True))
    if head_running:
        os.kill(head_pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline and not _reap(head_pid):
            family |= set(me.children(recursive=True))
            time.sleep(0.1)
    deadline = time.monotonic() + KILL_SECONDS
    while time.monotonic() < deadline:
        _reap(head_pid)
        family |= set(me.children(recursive=True))
        family = {process for process in family if process.is_running()}
        if not family:
            return
        for process in family:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.05)


def main(folder: str, command: list[str]) -> int:
    """Runs `command` until the holder of standard input is gone; then removes `folder`.

    If the command ends by itself, the folder stays: the holder reads the log in it.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _request_stop)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    head = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    holder_is_gone = _wait_for_end(head.pid)
    _stop_everything(head.pid, head_running=holder_is_gone)
    if not holder_is_gone:
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
