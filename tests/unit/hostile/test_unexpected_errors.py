"""Errors that nobody expected: one line for people, and a log for the owner alone."""

import argparse
import io
import logging
import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import jobs.__main__ as command_line
from jobs.console import ConsoleHandler
from jobs.faults import INSIDE_JOB
from pipeline.errors import ConfigError
from tests.support.hostile import Case, check_readable

pytestmark = pytest.mark.timeout(30)


class QuotedError(Exception):
    """As Ray raises for an error in a task: its text is the traceback of another process."""

    def __str__(self) -> str:
        return (
            "\x1b[36mray::task()\x1b[39m (pid=7)\n"
            '  File "/x/actor.py", line 3, in task\n    raise ValueError("deep")\nValueError: deep'
        )


class MuteError(Exception):
    """Whose text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no")


def deep(depth: int = 0) -> int:
    return deep(depth + 1) + 1


def raises(error: Exception) -> Callable[[], None]:
    def call() -> None:
        raise error

    return call


def chained() -> None:
    try:
        raise KeyError("inner")
    except KeyError as error:
        raise RuntimeError("outer") from error


FAULTS = [
    Case("value", raises(ValueError("bad value")), ("unexpected ValueError: bad value",)),
    Case("key", raises(KeyError("missing")), ("unexpected KeyError: 'missing'",)),
    Case("attribute", lambda: object().nothing, ("unexpected AttributeError", "'nothing'")),  # type: ignore[attr-defined]
    Case("type", lambda: 1 + "1", ("unexpected TypeError: unsupported",)),  # type: ignore[operator]
    Case("division", lambda: 1 / 0, ("unexpected ZeroDivisionError: division by zero",)),
    Case("assertion", raises(AssertionError()), ("unexpected AssertionError: no text",)),
    Case("recursion", deep, ("unexpected RecursionError: something is nested too deeply",)),
    Case("memory", raises(MemoryError()), ("unexpected MemoryError: this machine has not enough",)),
    Case("disk", raises(OSError(5, "Input/output error")), ("unexpected OSError: [Errno 5]",)),
    Case("text", lambda: "\ud800".encode(), ("unexpected UnicodeEncodeError", r"\ud800")),
    Case("chain", chained, ("unexpected RuntimeError: outer",)),
    Case("task", raises(QuotedError()), ("unexpected QuotedError: ValueError: deep",)),
    Case("mute", raises(MuteError()), ("unexpected MuteError: no text (RuntimeError)",)),
    Case("long", raises(ValueError("x" * 10**6)), ("unexpected ValueError: xxx", "xxx...")),
    Case("lines", raises(ValueError("first\nsecond")), ("unexpected ValueError: first;",)),
    Case("escapes", raises(ValueError("\x1b[2J")), (r"ValueError: \x1b[2J;",)),
    Case("secret", raises(ValueError("http://u:S3CRET@h")), ("ValueError: http://***@h;",)),
    Case("group", raises(ExceptionGroup("two", [ValueError("a")])), ("ExceptionGroup: two",)),
]


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[[Callable[[], object]], tuple[int, str]]:
    """Runs a command that does what a function does; returns its exit code and what it printed."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "S3CRET")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # those of commands before

    def run(action: Callable[[], object]) -> tuple[int, str]:
        options = argparse.Namespace(action=lambda _: action())
        monkeypatch.setattr(command_line, "parse", lambda _: options)
        monkeypatch.setattr(command_line, "log_to_console", lambda: None)
        handler = ConsoleHandler()
        logging.getLogger("jobs").addHandler(handler)
        try:
            code = command_line.main(["run", "c.yaml", "a={password: S3CRET}", "http://u:S3CRET@h"])
        finally:
            logging.getLogger("jobs").removeHandler(handler)
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("case", FAULTS, ids=str)
def test_a_fault_is_one_line_and_a_log(
    case: Case, run: Callable[[Callable[[], object]], tuple[int, str]]
) -> None:
    code, printed = run(case.given)
    assert code == 1
    assert "Traceback" not in printed and "S3CRET" not in printed
    (line,) = printed.splitlines()
    assert line.startswith("polystill: unexpected ")
    for part in (*case.refusal, "this is a fault of polystill"):
        assert part in line
    check_readable(line)
    found = re.search(r"the traceback is in (\S+);", line)
    assert found is not None
    path = Path(found[1])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    log = path.read_text()
    assert "Traceback" in log and "S3CRET" not in log
    assert "polystill run c.yaml a={password: ***} http://***@h" in log
    assert f"python:   {sys.version.split()[0]}" in log and "ray " in log
    assert len(log) < 1_100_000


def test_the_log_holds_the_whole_chain(
    run: Callable[[Callable[[], object]], tuple[int, str]], tmp_path: Path
) -> None:
    run(chained)
    (log,) = tmp_path.glob("polystill-fault-*.log")
    assert "KeyError: 'inner'" in log.read_text() and "in chained" in log.read_text()


def test_in_a_job_the_traceback_stands_in_its_log(
    run: Callable[[Callable[[], object]], tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The client shows the lines from the last one that the command line begins."""
    monkeypatch.setenv(INSIDE_JOB, "{}")
    code, printed = run(chained)
    assert code == 1 and "KeyError: 'inner'" in printed
    *_, last = printed.splitlines()
    assert last.startswith("polystill: unexpected RuntimeError: outer")
    assert "above this line in the job's log" in last
    assert list(tmp_path.iterdir()) == []


def test_without_a_place_for_the_log_the_traceback_is_printed(
    run: Callable[[Callable[[], object]], tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    code, printed = run(chained)
    assert code == 1 and "in chained" in printed
    assert "its log cannot be written (No such file or directory)" in printed


OTHERS = [
    Case("known error", raises(ConfigError("a\x1b[2J is wrong")), (1, r"a\x1b[2J is wrong")),
    Case("interrupt", raises(KeyboardInterrupt()), (130, "polystill: interrupted")),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_known_ends_stay_as_they_are(
    case: Case, run: Callable[[Callable[[], object]], tuple[int, str]], tmp_path: Path
) -> None:
    code, part = case.refusal
    ended, printed = run(case.given)
    assert ended == code and part in printed
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_ends_the_command_in_silence(
    run: Callable[[Callable[[], object]], tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(os.fdopen(writer, "wb")) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        code, printed = run(lambda: "a table")
        assert (code, printed) == (141, "")
        stream.write("what is left goes nowhere")


def test_a_reader_that_leaves_does_not_stop_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with io.TextIOWrapper(os.fdopen(writer, "wb")) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        for _ in range(3):
            ConsoleHandler().emit(logging.LogRecord("jobs", logging.INFO, "", 0, "x", (), None))
