"""Checkers: functions that say whether an answer is right, given its reference.

The filter `checker` and the evaluation share them.
"""

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

# A sign belongs to a number unless it stands between two numbers (`3-5`); a leading point does
# unless it follows a word (`No.5`).
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])[-+\u2212])?"
    r"(?:(?P<over>(?<![\d/.,])\d+)/(?P<under>0*[1-9]\d*)(?![\d/])"
    r"|(?P<plain>\d[\d,]*(?:\.\d+)?|(?<![\w.])\.\d+))"
)


def exact(answer: str, reference: str) -> bool:
    """Whether both texts are the same, apart from white space around them."""
    return answer.strip() == reference.strip()


def number(answer: str, reference: str) -> bool:
    """Whether both texts have the same final number, see `final_number`."""
    expected = final_number(reference)
    return expected is not None and final_number(answer) == expected


def final_number(text: str) -> float | None:
    """Final number of a text: the first after the last `####` (GSM8K's mark), else the last number.

    Numbers have forms such as `-3`, `1,234.5`, `.5` and `1/2`. None if there is no number.
    """
    marked = text.rsplit("####", 1)
    numbers = list(_NUMBER.finditer(marked[-1]))
    return _value(numbers[0 if len(marked) == 2 else -1]) if numbers else None


def _value(match: re.Match[str]) -> float:
    plain = match["plain"]
    size = float(plain.replace(",", "")) if plain else _quotient(match["over"], match["under"])
    return size if match["sign"] in (None, "+") else -size


def _quotient(over: str, under: str) -> float:
    """Quotient of two numbers; infinite, 0 or not a number if they have too many digits."""
    try:
        return int(over) / int(under)
    except (OverflowError, ValueError):  # the quotient is too large, or `int` refuses the length
        return float(over) / float(under)


CHECKERS: dict[str, CheckAnswer] = {"exact": exact, "number": number}


def find_checker(name: str) -> CheckAnswer:
    """Checker of a name: a shipped one, or the user's function `package.module.function`.

    Raises:
        ConfigError: there is no such checker, or its module cannot be imported here.
    """
    if name in CHECKERS:
        return CHECKERS[name]
    module, _, function = name.rpartition(".")
    if not module:
        raise ConfigError(
            f"there is no checker {name!r}; {closest(name, CHECKERS)}; for a function of your own, "
            "give its dotted path"
        )
    try:
        checker = vars(importlib.import_module(module)).get(function)
    except ImportError as error:
        raise ConfigError(
            f"the checker {name} cannot be imported: {error}; install its package on every node"
        ) from error
    if not inspect.isfunction(checker):
        raise ConfigError(
            f"the checker {name} does not exist: {module} has no function {function!r}"
        )
    if len(inspect.signature(checker).parameters) != 2:
        raise ConfigError(f"the checker {name} must take two arguments, answer and reference")
    return checker


class SafeChecker:
    """Checker that judges every answer: an answer at which the function raises is wrong.

    The first error is logged at once. `num_errors` counts all errors, and `log_count` logs their
    number.

    Args:
        name: name of a checker, as `find_checker` takes it.
    """

    def __init__(self, name: str) -> None:
        self._name, self._check = name, find_checker(name)
        self.num_errors = self._num_judged = 0

    def __call__(self, answer: str, reference: str) -> bool:
        """Whether the answer is right."""
        return self.judge(answer, reference)[0]

    def judge(self, answer: str, reference: str) -> tuple[bool, str | None]:
        """Whether the answer is right, and the error if the checker raised one."""
        self._num_judged += 1
        try:
            return bool(self._check(answer, reference)), None
        except Exception as error:  # a function of the user may raise anything
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
        """Logs the number of answers that count as wrong because the checker raised, if any."""
        if self.num_errors:
            logger.warning(
                "checker %s raised at %d of %d answers, which count as wrong",
                self._name,
                self.num_errors,
                self._num_judged,
            )


def checker_identity(name: str) -> str:
    """Identity of a checker, which changes when it may judge differently.

    It is the name of a shipped checker, or a hash of the source of the user's module.

    Raises:
        ConfigError: the checker cannot be found, see `find_checker`.
    """
    if name in CHECKERS:
        return name
    source = inspect.getsourcefile(find_checker(name))
    assert source is not None, "every Python function has a source file"
    return digest_bytes(name.encode(), Path(source).read_bytes())
