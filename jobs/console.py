"""Console: the one place that writes to a terminal or, inside a job, to the job's log.

All modules speak through `logging`. Information goes to standard output and warnings go to standard
error, each line at once, so that a job's log can be followed. Whatever is printed is text: control
characters, which may come from a server, a file or a job's log, are shown and not obeyed.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import TextIO

from pipeline.credentials import without_passwords
from pipeline.errors import ConfigError
from pipeline.messages import harmless

PACKAGES = ("pipeline", "teachers", "students", "jobs")


class ConsoleHandler(logging.Handler):
    """Prints messages, to the streams that the process has at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one message and flushes it; a closed terminal must not stop the work."""
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        try:
            print(harmless(without_passwords(self.format(record))), file=stream, flush=True)
        except BrokenPipeError:
            discard(stream)
        except (OSError, ValueError):
            self.handleError(record)


def log_to_console() -> None:
    """Shows everything that our packages log, and warnings of all other packages."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python opens standard error
    root = logging.getLogger()
    if not any(isinstance(handler, ConsoleHandler) for handler in root.handlers):
        root.addHandler(ConsoleHandler())
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)


def discard(stream: TextIO) -> None:
    """Lets everything that is written to a stream vanish, since nobody reads it any more.

    Python would otherwise complain at its end of what it could not flush.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def write(text: str) -> None:
    """Prints the product of a command, such as a table or the text of a dry run."""
    print(harmless(text), flush=True)


def confirm(text: str, question: str) -> bool:
    """Shows a text and asks whether to do what it says; anything but yes is no.

    Raises:
        ConfigError: there is no terminal to ask on.
    """
    write(text)
    if not sys.stdin.isatty():
        raise ConfigError(
            "nothing was done, for there is no terminal to ask on: give --yes to do what is "
            "listed, or --dry-run to list it only"
        )
    try:
        answer = input(f"{harmless(question)} [y/N] ")
    except EOFError:
        answer = ""
    return answer.strip().lower() in ("y", "yes")
