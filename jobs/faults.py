"""Unexpected errors: one line for people, and a log with the traceback for those who mend them."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Sequence

from jobs.bookkeeping.versions import installed_versions
from pipeline.credentials import without_passwords, without_secrets
from pipeline.messages import printable, short

INSIDE_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Variable that Ray sets for the entry point of a job, whose output is the job's log."""
LONGEST = 300
"""Characters of the error's own text in the line for people."""


def fault_message(error: Exception, arguments: Sequence[str]) -> str:
    """Line for people about an error that polystill does not know; keeps the traceback in a log.

    In a Ray job the traceback goes to the job's own log, above the line.

    Args:
        error: the error, as it was caught.
        arguments: words of the command line.
    """
    if INSIDE_JOB in os.environ:
        print(_traceback(error), file=sys.stderr, flush=True)
        place = "the traceback stands above this line in the job's log"
    else:
        place = _kept(error, arguments)
    return (
        f"unexpected {type(error).__name__}: {_text_of(error)}; this is a fault of polystill, or "
        f"of a library that it uses: {place}"
    )


def _kept(error: Exception, arguments: Sequence[str]) -> str:
    """Writes the log into the folder for temporary files; says where it is."""
    try:
        # nobody else may read the file that mkstemp makes
        descriptor, path = tempfile.mkstemp(prefix="polystill-fault-", suffix=".log")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"{_circumstances(arguments)}\n{_traceback(error)}")
    except OSError as unwritten:
        print(_traceback(error), file=sys.stderr, flush=True)
        return f"its log cannot be written ({unwritten.strerror}), so the traceback stands above"
    return f"the traceback is in {path}; please report it with that file"


def _circumstances(arguments: Sequence[str]) -> str:
    versions = [f"{name} {number}" for name, number in installed_versions().items()]
    return "\n".join(
        [
            f"command:  polystill {' '.join(map(without_secrets, arguments))}",
            f"folder:   {os.getcwd()}",
            f"python:   {platform.python_version()} on {platform.platform()}",
            f"packages: {', '.join(versions)}",
        ]
    )


def _traceback(error: Exception) -> str:
    """The traceback; that of an endless recursion is shortened, as Python does it."""
    try:
        return without_passwords("".join(traceback.format_exception(error)))
    except (MemoryError, RecursionError):
        return f"{type(error).__name__} at {traceback.extract_tb(error.__traceback__)[-1]}\n"


def _text_of(error: Exception) -> str:
    """The error's own text in one line; of an error in a Ray task, which quotes a traceback, the
    last one.
    """
    if isinstance(error, RecursionError):
        return "something is nested too deeply"
    if isinstance(error, MemoryError):
        return "this machine has not enough memory for it"
    try:
        text = str(error)
        lines = [line.strip() for line in f"{text[:9999]}\n{text[-9999:]}".splitlines()]
    except Exception as broken:  # an error's text is anybody's code
        lines = [f"no text ({type(broken).__name__})"]
    lines = [line for line in lines if line] or ["no text"]
    is_quoted = any(line.startswith('File "') for line in lines)
    return short(printable(without_passwords(lines[-1 if is_quoted else 0])), LONGEST)
