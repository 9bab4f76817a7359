"""Checkers: is an answer right, given its reference? Filters and evaluation share them."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.fingerprint import digest_bytes
from pipeline.text import closest

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
    size = float(plain.replace(",", "")) if plain else int(found["over"]) / int(found["under"])
    return size if found["sign"] in (None, "+") else -size


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
