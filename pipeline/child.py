"""Child process that does what could hold up its parent or flood it, and can be ended at any time.

The program reads lines of JSON from standard input, each a question, and writes one line of JSON to
standard output for each. It is run by its path, so that it imports nothing of ours.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

SECONDS_TO_START = 120.0
SHOWN_CHARACTERS = 1000
"""Characters of a question that a message shows."""


class ChildProcess:
    """A program that answers questions, started when it is first asked, and again after its end.

    It ends with its parent. Threads may share it; a forked process starts a child of its own.
    """

    def __init__(self, name: str, program: Path, greeting: Any) -> None:
        """Names a program; nothing is started.

        Args:
            name: what does the work, for messages.
            program: path of a Python file.
            greeting: question that the program answers once it has started.
        """
        self._name, self._program, self._greeting = name, program, greeting
        self._process: subprocess.Popen[bytes] | None = None
        self._parent = os.getpid()
        self._lock = threading.Lock()
        atexit.register(self.end)

    def ask(self, question: Any, seconds: float) -> Any:
        """Answer to a question; both are JSON values.

        Raises:
            TimeoutError: the answer took longer than `seconds`; the child is ended.
            RuntimeError: the child died, such as of too much memory.
        """
        with self._lock:
            if self._parent != os.getpid():  # a fork: the child answers the process that started it
                self._process, self._parent = None, os.getpid()
            if self._process is None:
                self._start()
            return self._ask(question, seconds)

    def end(self) -> None:
        """Ends the child process, if this process has started one."""
        if self._process is not None and self._parent == os.getpid():
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(self._program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._ask(self._greeting, SECONDS_TO_START)

    def _ask(self, question: Any, seconds: float) -> Any:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            ready, _, _ = select.select([process.stdout], [], [], seconds)
            reply = process.stdout.readline() if ready else None
        except BrokenPipeError:
            reply = b""
        if reply:
            return json.loads(reply)
        self.end()
        shown = str(question)[:SHOWN_CHARACTERS]
        if reply is None:
            raise TimeoutError(f"{self._name} took more than {seconds:g} seconds for {shown}")
        raise RuntimeError(f"{self._name} ended while it worked on {shown}")
