"""Console: the one place that writes to a terminal or, inside a job, to the job's log.

All modules speak through `logging`. Information goes to standard output and warnings go to standard
error, each line at once, so that a job's log can be followed.
"""

from __future__ import annotations

import logging
import sys

PACKAGES = ("pipeline", "teachers", "students", "jobs")


class ConsoleHandler(logging.Handler):
    """Prints messages as they are, to the streams that the process has at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints one message and flushes it; a closed terminal must not stop the work."""
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        try:
            print(self.format(record), file=stream, flush=True)
        except (OSError, ValueError):
            self.handleError(record)


def log_to_console() -> None:
    """Shows everything that our packages log, and warnings of all other packages."""
    root = logging.getLogger()
    if not any(isinstance(handler, ConsoleHandler) for handler in root.handlers):
        root.addHandler(ConsoleHandler())
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)


def write(text: str) -> None:
    """Prints the product of a command, such as a table or the text of a dry run."""
    print(text, flush=True)
