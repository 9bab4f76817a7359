"""Readings of the part of an answer that is compared: a value, a list, or plain text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from pipeline.checkers.exact_values import Value, read_value, same_value, without_frame
from pipeline.checkers.plain_text import comparable_text, plain_text

LONGEST_PART = 2_000
"""Characters of the longest part that is read; a longer one is compared as it stands."""
MOST_NESTED = 4
_EQUALS = re.compile(r" ?(?:=|\\approx|\\Rightarrow|\\implies|\\to)(?![A-Za-z]) ?")
_NAMED_TUPLE = re.compile(r" *\( ?[A-Za-z](?: ?, ?[A-Za-z])+ ?\) ?= ?(?=\()")
_ITEMS = re.compile(r", |;| and ")
_COMPARES = re.compile(r"[<>]|\\(?:le|ge|ne|pm|mp|in)(?![A-Za-z])|\b(?:or|not)\b")
_WORDS = re.compile(
    r"\ue000[^\ue000]*\ue000|\\(?:times|cdot|frac|div)(?![A-Za-z])|(?<![A-Za-z\\])[A-Za-z]{2,}"
    r"|(?<=[\d)%]) ?[xX](?= ?[$\d(])"
)
"""Units and signs of multiplication, which are no variables."""
_LEFT, _RIGHT = ("\\{", "(", "["), ("\\}", ")", "]")
_OPENING, _CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class Listed:
    """Several readings in a row, with the brackets around them: a tuple, an interval, a set."""

    brackets: tuple[str, str]
    items: tuple[Reading, ...]


Reading = Value | Listed | str


def read_part(part: str) -> Reading:
    """Reading of the part of an answer that is compared."""
    if len(part) > LONGEST_PART:
        return " ".join(part.split())
    return _read(plain_text(part), MOST_NESTED)


def same_reading(one: Reading, other: Reading) -> bool:
    """Whether two readings are the same; readings of different kinds never are."""
    if isinstance(one, Value) and isinstance(other, Value):
        return same_value(one, other)
    if isinstance(one, Listed) and isinstance(other, Listed):
        return (
            one.brackets == other.brackets
            and len(one.items) == len(other.items)
            and all(map(same_reading, one.items, other.items))
        )
    return one == other and one != ""


def reading_key(reading: Reading) -> str:
    """Text that is equal for equal readings, for votes; a percentage has that of its hundredth."""
    if isinstance(reading, Value):
        return str(reading.plain)
    if isinstance(reading, Listed):
        return ", ".join(map(reading_key, reading.items)).join(reading.brackets)
    return reading


def _read(plain: str, depth: int) -> Reading:
    if (value := read_value(plain)) is not None:
        return value
    if (value := read_value(_right_side(plain))) is not None:
        return value
    if (named := _NAMED_TUPLE.match(plain)) is not None:
        plain = plain[named.end() :]
    return (_listed(plain, depth) if depth else None) or comparable_text(plain)


def _right_side(plain: str) -> str:
    """Right side of the last equation whose other sides are calculations, as in `A = 3 x 4 = 12`;
    the text itself if there is none, as in `2x = 8`.
    """
    if _COMPARES.search(plain):
        return plain
    first, *others = _EQUALS.split(_ITEMS.split(plain)[-1])
    is_name = len(others) > 1 and re.fullmatch(r"[ $(]*[A-Za-z]*[ $]*", first) is not None
    calculations = others[:-1] if is_name else [first, *others[:-1]]
    return others[-1] if others and all(map(_is_calculation, calculations)) else plain


def _is_calculation(side: str) -> bool:
    """Whether a side of an equation has numbers, and units, but no variables."""
    return re.search(r"\d", side) is not None and not re.search(r"[A-Za-z\\]", _WORDS.sub("", side))


def _listed(plain: str, depth: int) -> Listed | None:
    """Items between the outermost commas; None if there are none."""
    text = plain.strip().strip("$").rstrip(".;:").strip()
    left = next((bracket for bracket in _LEFT if text.startswith(bracket)), "")
    right = next((bracket for bracket in _RIGHT if text.endswith(bracket)), "")
    if bool(left) != bool(right):
        return None
    inside = text[len(left) : len(text) - len(right)]
    items, level, start = [], 0, 0
    for i, character in enumerate(inside):
        level += (character in _OPENING) - (character in _CLOSING)
        if level < 0:
            return None
        if character == "," and level == 0:
            items.append(inside[start:i])
            start = i + 1
    items.append(inside[start:])
    if level or len(items) < 2 or not all(map(without_frame, items)):
        return None
    return Listed((left, right), tuple(_read(item, depth - 1) for item in items))
