"""Tables of broken and hostile input: every input gets one message for people, or is rightly taken.

Each module of `tests/unit/hostile` holds the tables of one kind of input. A test runs each case of
its table through `check_answer`; a traceback, a hang (the test's time limit), a flood of memory, a
silent acceptance or the wrong message fails the test.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil

from pipeline.errors import DistillationError

MEMORY = 2 * 2**30
"""Bytes that one input may cost beyond those that the process has."""
LONGEST_MESSAGE = 4000
"""Characters that a person can be expected to read."""


@dataclass(frozen=True)
class Case:
    """One input and the right answer to it.

    Attributes:
        name: unique in its table.
        given: the input, in the form that the table's test takes.
        refusal: parts of the message that refuses it; empty if the input is rightly taken.
    """

    name: str
    given: Any
    refusal: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


def check_answer(case: Case, call: Callable[[], Any]) -> Any:
    """Makes a call and checks that it is answered as the case says; returns the call's value, or
    None if it was refused.
    """
    try:
        with bounded_memory():
            value = call()
    except DistillationError as error:
        message = str(error)
        assert case.refusal, f"refused: {message}"
        for part in case.refusal:
            assert part in message, f"{part!r} is not in {message!r}"
        check_readable(message)
        return None
    assert not case.refusal, f"taken in silence: {value!r}"
    return value


def check_readable(message: str) -> None:
    """Checks that a message can be read on a terminal and does nothing else to it."""
    assert len(message) <= LONGEST_MESSAGE, f"{len(message)} characters"
    assert all(c.isprintable() or c == "\n" for c in message), repr(message)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Lets this process take no more than `MEMORY` bytes of addresses in addition."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
