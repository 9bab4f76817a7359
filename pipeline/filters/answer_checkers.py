"""Checkers: is an answer right, given its reference? Filters and evaluation share them."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.fingerprint import digest_bytes
from pipeline.messages import closest

logger = logging.getLogger(__name__)

CheckAnswer = Callable[[str, str], bool]

# A sign stands before a number and not between two; a leading point not behind a word (`No.5`).
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-+\u2212])?"
    r"(?:(?P<over>(?<![\d/.,])\d+)/(?P<under>0*[1-9]\d*)(?![\d/])"
    r"|(?P<plain>\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+))"
)


def exact(answer: str, reference: str) -> bool:
    """Whether both texts are the same but for white space around them."""
    return answer.strip() == reference.strip()


def number(answer: str, reference: str) -> bool:
    """Whether the final numbers agree, see `final_number`."""
    expected = final_number(reference)
    return expected is not None and final_number(answer) == expected


def final_number(text: str) -> float | None:
    """The number after the last `####` (GSM8K's mark), else the last of the text, else None.

    Numbers are such as `-3`, `1,234.5`, `.5` and `1/2`.
    """
    marked = text.rsplit("####", 1)
    found = list(_NUMBER.finditer(marked[-1]))
    return _value(found[0 if len(marked) == 2 else -1]) if found else None


def _value(found: re.Match[str]) -> float:
    plain = found["plain"]
    size = float(plain.replace(",", "")) if plain else _quotient(found["over"], found["under"])
    return size if found["sign"] in (None, "+") else -size


def _quotient(over: str, under: str) -> float:
    """Infinite, 0 or not a number, where the digits are too many for a float."""
    try:
        return int(over) / int(under)
    except (OverflowError, ValueError):  # the quotient is too large, or `int` takes no such length
        return float(over) / float(under)


CHECKERS: dict[str, CheckAnswer] = {"exact": exact, "number": number}


def find_checker(name: str) -> CheckAnswer:
    """A checker by its name, or a function `package.module.function(answer, reference)` of yours.

    Raises:
        ConfigError: there is no such checker, or its module cannot be imported here.
    """
    if name in CHECKERS:
        return CHECKERS[name]
    module, _, function = name.rpartition(".")
    if not module:
        raise ConfigError(
            f"there is no checker {name!r}; {closest(name, CHECKERS)}, or give a function of your "
            "own by its dotted path"
        )
    try:
        found = vars(importlib.import_module(module)).get(function)
    except ImportError as error:
        raise ConfigError(
            f"checker {name}: {error}. Its package must be installed on every node"
        ) from error
    if not inspect.isfunction(found):
        raise ConfigError(f"checker {name}: {module} has no function {function!r}")
    if len(inspect.signature(found).parameters) != 2:
        raise ConfigError(f"checker {name} must take two arguments: answer and reference")
    return found


class SafeChecker:
    """A checker by its name, which has a verdict on every answer: one at which it raises is wrong.

    The first error is logged at once; `num_errors` counts them, and `log_count` says how many there
    were.
    """

    def __init__(self, name: str) -> None:
        """As `find_checker`."""
        self._name, self._check = name, find_checker(name)
        self.num_errors = self._num_judged = 0

    def __call__(self, answer: str, reference: str) -> bool:
        """Whether the answer is right."""
        return self.judge(answer, reference)[0]

    def judge(self, answer: str, reference: str) -> tuple[bool, str | None]:
        """Whether the answer is right, and what the checker raised instead of saying so."""
        self._num_judged += 1
        try:
            return bool(self._check(answer, reference)), None
        except Exception as error:  # a function of the user's raises what it likes
            problem = f"{type(error).__name__}: {error}"
        self.num_errors += 1
        if self.num_errors == 1:
            logger.warning(
                "checker %s raised %s; an answer at which it raises counts as wrong",
                self._name,
                problem,
            )
        return False, problem

    def log_count(self) -> None:
        """Says how many answers were wrong because the checker raised, if any were."""
        if self.num_errors:
            logger.warning(
                "checker %s raised at %d of %d answers, which count as wrong",
                self._name,
                self.num_errors,
                self._num_judged,
            )


def checker_identity(name: str) -> str:
    """Changes when a checker may judge otherwise: its name, or a hash of your module's source.

    Raises:
        ConfigError: as `find_checker`.
    """
    if name in CHECKERS:
        return name
    source = inspect.getsourcefile(find_checker(name))
    assert source is not None, "a Python function stands in a file"
    return digest_bytes(name.encode(), Path(source).read_bytes())
