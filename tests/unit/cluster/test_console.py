"""The console: lines of our packages as they are, and only warnings of all others."""

import logging

import pytest

from jobs.console import log_to_console


def test_information_and_warnings_go_to_their_streams_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log_to_console()
    log_to_console()
    logging.getLogger("jobs.stages.train").info("student: %d %% done", 50)
    logging.getLogger("pipeline.storage").warning("tried again")
    logging.getLogger("another").info("not shown")
    logging.getLogger("another").warning("shown")
    printed = capsys.readouterr()
    assert printed.out == "student: 50 % done\n"
    assert printed.err == "tried again\nshown\n"
