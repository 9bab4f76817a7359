"""Checkers: functions that say whether an answer is right, given its reference.

The filter `checker` and the evaluation share them.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checkers.marked_parts import compared_part
from pipeline.checkers.readings import Reading, read_part, same_reading
from pipeline.checkers.symbolic import PACKAGE, math
from pipeline.errors import ConfigError
from pipeline.final_text import final_text
from pipeline.fingerprint import digest_bytes
from pipeline.messages import closest, shorter, shown

logger = logging.getLogger(__name__)

CheckAnswer = Callable[[str, str], bool | None]


def exact(answer: str, reference: str) -> bool | None:
    """Whether the final texts are the same, apart from white space around them.

    None if the reference has none.
    """
    expected = final_text(reference)
    return final_text(answer) == expected if expected else None


def number(answer: str, reference: str) -> bool | None:
    """Whether the compared parts of both texts are the same, see `final_value`.

    None if the reference has none.
    """
    expected = final_value(reference)
    if expected is None:
        return None
    found = final_value(answer)
    return found is not None and same_reading(found, expected)


def final_value(text: str) -> Reading | None:
    """Reading of the part of a text that is compared; None if there is none.

    The part stands behind the first `####`, else in the last balanced `\\boxed{…}`, else behind the
    last `the answer is`, else it is the last number with all that belongs to it. A text that is a
    value or a list as a whole is compared as a whole.
    """
    final = final_text(text)
    part = compared_part(final)
    return read_part(part) or None if part is not None else None


CHECKERS: dict[str, CheckAnswer] = {"exact": exact, "number": number}
"""Shipped checkers that need nothing else."""
OPTIONAL_CHECKERS: dict[str, CheckAnswer] = {"math": math}
"""Shipped checkers that need a package of the extra with their name."""
VERSIONS = {"exact": 2, "number": 2, "math": 1}
"""Versions of the shipped checkers, raised when one judges differently."""


def references_unread(name: str, references: Iterable[str]) -> list[str]:
    """References that a shipped checker cannot read, whatever the answer is.

    A function of the user is not asked, since it may be slow; it says so answer by answer.
    """
    check = (CHECKERS | OPTIONAL_CHECKERS).get(name)
    if check is None:
        return []
    return [reference for reference in references if check("", reference) is None]


def find_checker(name: str) -> CheckAnswer:
    """Checker of a name: a shipped one, or the user's function `package.module.function`.

    Raises:
        ConfigError: there is no such checker, or its module cannot be imported here.
    """
    if name in OPTIONAL_CHECKERS and find_spec("math_verify") is None:
        raise ConfigError(
            f"the checker {name} needs the package {PACKAGE}, which is not installed here: install "
            f"polystill[{name}] on every node, or set another prompts.checker"
        )
    shipped = CHECKERS | OPTIONAL_CHECKERS
    if name in shipped:
        return shipped[name]
    module, _, function = name.rpartition(".")
    if not all(map(str.isidentifier, name.split("."))):
        raise ConfigError(
            f"{shown(name)} is no checker: give {', '.join(shipped)}, or the dotted path of a "
            "function of your own, such as package.module.function"
        )
    if not module:
        raise ConfigError(
            f"there is no checker {name!r}; {closest(name, shipped)}; for a function of your own, "
            "give its dotted path"
        )
    try:
        checker = vars(importlib.import_module(module)).get(function)
    except ImportError as error:
        raise ConfigError(
            f"the checker {name} cannot be imported: {shorter(error)}; install its package on "
            "every node"
        ) from error
    except (Exception, SystemExit) as error:  # the user's module may raise anything
        raise ConfigError(
            f"the checker {name} cannot be imported, since its module raises "
            f"{type(error).__name__}: {shorter(error)}; correct {module}"
        ) from error
    if not inspect.isfunction(checker):
        raise ConfigError(
            f"the checker {name} does not exist: {module} has no function {function!r}"
        )
    _refuse_what_checks_nothing(name, checker)
    return checker


def _refuse_what_checks_nothing(name: str, function: Callable[..., Any]) -> None:
    """Refuses a function that is plainly no checker: it would be called with a model's text.

    Raises:
        ConfigError: it belongs to Python's library, takes other arguments, or returns no verdict.
    """
    home = function.__module__.partition(".")[0]
    if home in sys.stdlib_module_names or name.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigError(
            f"{name} is a function of Python's own library and no checker: it would be called "
            "with a model's answer; write a function (answer, reference) -> bool"
        )
    try:
        inspect.signature(function).bind("answer", "reference")
    except TypeError as error:
        raise ConfigError(
            f"the checker {name} must take two arguments, answer and reference: {error}"
        ) from error
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise ConfigError(
            f"the checker {name} is asynchronous or a generator, so that its result is no verdict: "
            "make it a plain function that returns True, False or None"
        )


class SafeChecker:
    """Checker that judges every answer: an answer at which the function raises is wrong.

    The function sees the final text of an answer, and an answer without one is wrong. The first
    error is logged at once. `num_errors` and `num_unread` count errors and answers whose reference
    the function cannot read; `log_count` logs both.

    Args:
        name: name of a checker, as `find_checker` takes it.
    """

    def __init__(self, name: str) -> None:
        self._name, self._check = name, find_checker(name)
        self.num_errors = self.num_unread = self._num_judged = 0

    def __call__(self, answer: str, reference: str) -> bool | None:
        """Whether the answer is right; None if the checker cannot read the reference."""
        return self.judge(answer, reference)[0]

    def judge(self, answer: str, reference: str) -> tuple[bool | None, str | None]:
        """Verdict as a call gives it, and the error if the checker raised one."""
        self._num_judged += 1
        final = final_text(answer)
        try:
            verdict = self._check(final, reference)
            if verdict is None:
                self.num_unread += 1
                return None, None
            if not isinstance(verdict, bool | int | float | np.bool_):
                raise TypeError(f"it returned {shown(verdict)}, not True, False or None")
            return bool(verdict) and bool(final), None
        except Exception as error:  # a function of the user may raise anything
            problem = f"{type(error).__name__}: {shorter(error)}"
        self.num_errors += 1
        if self.num_errors == 1:
            logger.warning(
                "checker %s raised %s; an answer at which it raises counts as wrong",
                self._name,
                problem,
            )
        return False, problem

    def log_count(self) -> None:
        """Logs how many answers are wrong because the checker raised, and how many unchecked."""
        if self.num_errors:
            logger.warning(
                "checker %s raised at %d of %d answers, which count as wrong",
                self._name,
                self.num_errors,
                self._num_judged,
            )
        if self.num_unread:
            logger.warning(
                "checker %s cannot read the reference of %d of %d answers, which are unchecked",
                self._name,
                self.num_unread,
                self._num_judged,
            )


def checker_identity(name: str) -> str:
    """Identity of a checker, which changes when it may judge differently.

    It is name and version of a shipped checker (the name alone for the first version), with that of
    the package that it needs, or a hash of the source of the user's module.

    Raises:
        ConfigError: the checker cannot be found, see `find_checker`.
    """
    if name in OPTIONAL_CHECKERS:
        find_checker(name)
        return f"{name}-{VERSIONS[name]}-{metadata.version(PACKAGE)}"
    if name in VERSIONS:
        return name if VERSIONS[name] == 1 else f"{name}-{VERSIONS[name]}"
    source = inspect.getsourcefile(find_checker(name))
    assert source is not None, "every Python function has a source file"
    return digest_bytes(name.encode(), Path(source).read_bytes())
