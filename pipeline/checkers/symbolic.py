"""Checker `math`: exact values as `number` reads them, and formulas compared by math-verify.

math-verify needs seconds for some formulas and never ends for others, and its own timeouts work in
a main thread only. A child process runs it, which is ended and started anew if it takes too long.
"""

from __future__ import annotations

import re
from pathlib import Path

from pipeline.checkers.exact_values import Value
from pipeline.checkers.marked_parts import compared_part
from pipeline.checkers.readings import Listed, Reading, read_part, same_reading
from pipeline.child import ChildProcess
from pipeline.final_text import final_text

PACKAGE = "math-verify"
LONGEST_FORMULA = 400
"""Characters of the longest part that math-verify is asked about."""
SECONDS_TO_COMPARE = 10.0
_BASE = re.compile(r"(?<=\d)_\{(\w+)\}")
_WORDS_IN_A_ROW = re.compile(r"(?:(?<![\\A-Za-z])[A-Za-z]{2,}[,.;]? +){3}[A-Za-z]{2,}")


def math(answer: str, reference: str) -> bool | None:
    """Whether the compared parts of both texts are equal in mathematics.

    Where both are values, `number` decides. A text without a mark and a number, such as `x + y`, is
    compared as a whole. None if the reference is prose or cannot be parsed.

    Raises:
        TimeoutError: the comparison took too long.
        RuntimeError: the child process died, such as of too much memory.
    """
    expected, found = _formula(reference), _formula(answer)
    if expected is None:
        return None
    if found is None:
        return False
    readings = read_part(expected), read_part(found)
    if same_reading(*readings):
        return True
    if _decided(*readings) or max(len(expected), len(found)) > LONGEST_FORMULA:
        return False
    return _WORKER.ask([expected, found], SECONDS_TO_COMPARE)


def _decided(one: Reading, other: Reading) -> bool:
    """Whether readings that differ are not the same in mathematics either.

    math-verify lets units, the case of letters, the base of a number, and brackets around a list
    make no difference.
    """
    if isinstance(one, Value) and isinstance(other, Value):
        return True
    if isinstance(one, Listed) and isinstance(other, Listed):
        brackets = {one.brackets[0], other.brackets[0]}
        is_set = "\\{" in brackets
        return len(brackets) > 1 and ("" in brackets) != is_set
    if not (isinstance(one, str) or isinstance(other, str)):
        return False
    texts = [reading if isinstance(reading, str) else "" for reading in (one, other)]
    bases = [_BASE.findall(text) for text in texts]
    return texts[0].casefold() == texts[1].casefold() or bases[0] != bases[1]


def _formula(text: str) -> str | None:
    """Part of a text that is compared; None if there is none, or if it is prose."""
    final = final_text(text)
    part = compared_part(final)
    formula = (final if part is None else part).strip().strip("$")
    return None if not formula or _WORDS_IN_A_ROW.search(formula) else formula


_WORKER = ChildProcess(PACKAGE, Path(__file__).with_name("math_worker.py"), ["1", "1"])
