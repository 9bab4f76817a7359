"""Cheap filters on answers before a shard is written, and the checkers that evaluation shares."""

from __future__ import annotations

import re
from collections.abc import Callable

_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def exact(answer: str, reference: str) -> bool:
    """Whether both texts are the same but for white space around them."""
    return answer.strip() == reference.strip()


def number(answer: str, reference: str) -> bool:
    """Whether the final numbers agree, see `final_number`."""
    expected = final_number(reference)
    return expected is not None and final_number(answer) == expected


def final_number(text: str) -> float | None:
    """The number after the last `####` (GSM8K's mark), else the last of the text, else None."""
    marked = text.rsplit("####", 1)
    found = _NUMBER.findall(marked[1]) if len(marked) == 2 else _NUMBER.findall(text)[-1:]
    return float(found[0].replace(",", "")) if found else None


CHECKERS: dict[str, Callable[[str, str], bool]] = {"exact": exact, "number": number}


def reason_to_drop(
    answer: str, finish_reason: str, reference: str | None, checker: str | None
) -> str | None:
    """Why an answer is not kept: `truncated`, `empty` or `wrong`; None when it is kept."""
    if finish_reason != "stop":
        return "truncated"
    if not answer.strip():
        return "empty"
    if checker is not None and reference is not None and not CHECKERS[checker](answer, reference):
        return "wrong"
    return None
