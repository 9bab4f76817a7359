"""Exact values of short texts such as `\\frac{3}{4}`, `7 1/2`, `2.5e-3` or `$1,234`.

A text is read as a whole or not at all: nothing is ever taken out of a text that has more in it
than one number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from pipeline.checkers.number_words import (
    ALTERING,
    ALTERING_CHARACTERS,
    GLUED_UNITS,
    PROSE,
    SCALES,
    UNITS,
    VERBS,
)
from pipeline.checkers.plain_text import with_marks_as_letters

MOST_DIGITS = 2_000
"""Digits of the largest number that is computed with; the size of an exponent is bound alike."""
FLOAT_DIGITS = 16
"""Digits from which a decimal counts as the print-out of a double."""
LONGEST_VALUE = 400
"""Characters of the longest text that is read as a value, unless it is one number alone."""

_DECIMAL = r"(?:(?:[1-9]\d{0,2}(?:(?:,\d{3})+|(?:\ \d{3})+)|\d+)(?:\.\d+)?|\.\d+)"
_TIMES = r"\ ?(?:\\times|\\cdot|\*|x|X)\ ?"
_NUMBER = re.compile(
    rf"""
    (?P<whole>\d+)(?:\ and)?(?:\ ?\\frac\{{\ ?(?P<over1>\d+)\ ?\}}\{{\ ?(?P<under1>\d+)\ ?\}}
        |\ (?P<over2>\d+)\ ?/\ ?(?P<under2>\d+))
    |\\frac\{{\ ?(?P<over3>[-+]?\ ?{_DECIMAL})\ ?\}}\{{\ ?(?P<under3>[-+]?\ ?{_DECIMAL})\ ?\}}
    |(?P<over4>{_DECIMAL})\ ?/\ ?(?P<under4>{_DECIMAL})
    |(?:(?P<factor>{_DECIMAL}){_TIMES})?(?P<base>\d+)\ ?\^\{{\ ?(?P<power>[-+]?\d+)\ ?\}}
    |(?P<mantissa>\d+(?:\.\d+)?|\.\d+)[eE](?P<exponent>[-+]?\d+)
    |(?P<decimal>{_DECIMAL})
    """,
    re.VERBOSE,
)
EAST_ASIAN = "\u2e80-\ud7af"
"""Range of scripts that write a unit directly behind its number."""
_WORD = r"(?:[^\W\d_]{2,}(?:['.-][^\W\d_]+)*)"
_CURRENCY = (
    r"(?:US\ ?\$|USD|EUR|GBP|INR|JPY|Rs\.?|[$\u00a3\u00a5\u0e3f\u20a0-\u20bf]|\ue000dollars\ue000)"
)
_BEFORE = re.compile(
    rf"""
    (?:(?:approximately|approx\.?|about|roughly|around|exactly|only|just|\\approx|\\sim)\ ?)?
    (?P<sign1>[-+]|minus\ |negative\ )?\ ?(?P<currency>{_CURRENCY})?\ ?(?P<sign2>[-+])?\ ?
    """,
    re.VERBOSE,
)
_AFTER = re.compile(
    rf"""
    (?:\ ?-?[\ue000"']?(?P<scale>{"|".join(SCALES)})[\ue000"']?(?![A-Za-z]))?
    (?P<percent>\ ?(?:%|[\ue000"']?\s?per\ ?cent\s?[\ue000"']?(?![A-Za-z])))?
    (?P<ordinal>\ ?(?:\^\{{)?\ ?[\ue000"']?(?:st|nd|rd|th)[\ue000"']?\}}?(?![A-Za-z]))?
    (?P<unit>.*)
    """,
    re.VERBOSE | re.DOTALL,
)
_UNIT_PHRASE = re.compile(
    rf"""
    (?:\ ?(?:
        [{EAST_ASIAN}]+
        |\ue000[^\ue000]*\ue000
        |(?<![^\W\d_])-?{_WORD}
        |/\ ?[^\W\d_]+
        |(?:km/h|m/s)(?![A-Za-z])
        |an?(?=\ )
        |\^\{{[23]\}}
        |\((?:{_WORD}\ ?){{1,4}}\)
        |{_CURRENCY}
        |(?<=\ue000)\ ?[CF](?![A-Za-z])
    )\.?){{1,10}}
    """,
    re.VERBOSE,
)
_VARIABLES = re.compile(r"\^|/ ?[A-Za-z](?![A-Za-z])")
_SHORT_WORD = re.compile(r"[-/(]? ?([a-z]{2,3})(?![^\W\d_])")
_UNIT_WORD = re.compile(r"[^\W\d_]+|\^\{[23]\}|[$\u00a3\u00a5\u0e3f\u20a0-\u20bf]")
_NAME = re.compile(
    r"(?P<name>\\?[A-Za-z]+(?: [A-Za-z]{2,})*(?:_\{\w+\})?(?: ?\([\w, ]+\))?) ?[:=] ?(?![=:])"
)
_VARIABLE = re.compile(r"(?:\\[A-Za-z]+|[A-Za-z])(?![A-Za-z])")
_FULL_STOP = re.compile(r"(?<!\.)\.$")
_ANSWER_IS = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the |my )?(?:final |correct )?answer is:? ?",
    re.IGNORECASE,
)
_BETWEEN_PARENTHESES = re.compile(r"\(([^(),]*)\)|\{([^{}]*)\}")


@dataclass(frozen=True)
class Value:
    """A number with what is written around it.

    Attributes:
        number: the exact number; that of a percentage is the number before the sign.
        is_percent: whether it is a percentage.
        name: variable that has the value, as in `x = 5`; None if it is not named by a letter.
        units: known units under their first names, as in `mile`, `hour` for miles an hour.
        num_digits: digits that are written, which tells the print-out of a float.
    """

    number: Fraction
    is_percent: bool = False
    name: str | None = None
    units: tuple[str, ...] = ()
    num_digits: int = 0

    @property
    def plain(self) -> Fraction:
        """The number itself; a percentage is a hundredth of what is written."""
        return self.number / 100 if self.is_percent else self.number


def read_value(text: str) -> Value | None:
    """The value that a text is as a whole, after `plain_text`; None if it is anything else."""
    text = without_frame(text)
    if (answer := _ANSWER_IS.match(text)) is not None:
        text = without_frame(text[answer.end() :])
    if (named := _NAME.match(text)) is None:
        return _read_number(text, None)
    variable = _VARIABLE.match(named["name"])
    rest = without_frame(text[named.end() :])
    if variable is None:
        return read_value(rest)
    return _read_number(rest, named["name"].replace(" ", ""))


def without_frame(text: str) -> str:
    """A text without what may stand around a value: marks, a full stop, brackets around it all."""
    for _ in range(4):  # frames stand within frames
        text = text.strip().strip("*'\"").lstrip("=").rstrip(",;:").strip()
        text = _FULL_STOP.sub("", text)
        if len(text) > 1 and text[0] == text[-1] == "$":
            text = text.strip("$")
        elif (inside := _BETWEEN_PARENTHESES.fullmatch(text)) is not None:
            text = inside[1] or inside[2] or ""
    return text


def is_unit(word: str) -> bool:
    """Whether a word, in lower case, is a known unit of measure."""
    return word in UNITS and len(word) > 1


def is_east_asian(word: str) -> bool:
    """Whether a word is of a script without spaces, so that it may stand beside a number."""
    return re.match(rf"[{EAST_ASIAN}]", word) is not None


def alters_number(word: str) -> bool:
    """Whether a word behind a number makes it another number, as in `5 million` and `5 or 6`."""
    return word in ALTERING or word[:1] in ALTERING_CHARACTERS


def same_value(one: Value, other: Value) -> bool:
    """Whether two values are the same.

    Units and variables must be equal where both texts name one. A percentage equals its hundredth,
    and above 1 % also the bare number, since references leave the sign out: 45 % is 0.45 and 45.
    """
    if one.name and other.name and one.name != other.name:
        return False
    if any(ours != theirs for ours, theirs in zip(one.units, other.units, strict=False)):
        return False
    if one.is_percent == other.is_percent:
        return _equal(one.number, other.number, max(one.num_digits, other.num_digits))
    percentage, bare = (one, other) if one.is_percent else (other, one)
    is_bare = percentage.number == bare.number and abs(bare.number) > 1
    return percentage.plain == bare.number or is_bare


def _equal(one: Fraction, other: Fraction, num_digits: int) -> bool:
    """Equality, up to the rounding of a double where one has the digits of a printed double."""
    if num_digits < FLOAT_DIGITS:
        return one == other
    return abs(one - other) * 2**51 <= abs(other)


def _read_number(text: str, name: str | None) -> Value | None:
    before = _BEFORE.match(text)
    assert before is not None, "every part of the pattern is optional"
    match = _NUMBER.match(text, before.end())
    if match is None or (len(text) > LONGEST_VALUE and len(match[0]) < len(text)):
        return None
    after = _AFTER.fullmatch(text, match.end())
    assert after is not None, "every part of the pattern is optional"
    number = _number(match)
    units = _units(after["unit"], is_glued=after["unit"][:1].isalpha())
    if number is None or units is None or (before["sign1"] and before["sign2"]):
        return None
    sign = (before["sign1"] or before["sign2"] or "+").strip()
    number *= SCALES.get(after["scale"] or "", 1) * (1 if sign == "+" else -1)
    currency = re.sub(r"[\ue000. ]|US(?=\W)", "", before["currency"] or "")
    first = (UNITS.get(currency, currency),) if currency else ()
    return Value(
        number=number,
        is_percent=after["percent"] is not None,
        name=name,
        units=units if first == units[:1] else (*first, *units),
        num_digits=sum(map(str.isdigit, match["decimal"] or "")) if "." in match[0] else 0,
    )


def _number(match: re.Match[str]) -> Fraction | None:
    """Number of a match; None if it is improper or too large to compute with."""
    if any(len(part) > MOST_DIGITS for part in match.groups() if part):
        return None
    if match["decimal"] is not None:
        return _decimal(match["decimal"])
    if match["mantissa"] is not None:
        return _times_power(_decimal(match["mantissa"]), 10, match["exponent"])
    if match["base"] is not None:
        factor = Fraction(1) if match["factor"] is None else _decimal(match["factor"])
        return _times_power(factor, int(match["base"]), match["power"])
    over = next(match[f"over{i}"] for i in range(1, 5) if match[f"over{i}"] is not None)
    under = next(match[f"under{i}"] for i in range(1, 5) if match[f"under{i}"] is not None)
    above, below = _decimal(over), _decimal(under)
    if below == 0 or (match["whole"] is not None and above >= below):
        return None
    return above / below + int(match["whole"] or 0)


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", ""))


def _times_power(factor: Fraction, base: int, power: str) -> Fraction | None:
    """A number times a power; None if that has too many digits, or divides by 0."""
    if len(power) > 6 or abs(int(power)) * len(str(base)) > MOST_DIGITS:
        return None
    exponent = int(power)
    return None if base == 0 and exponent < 0 else factor * Fraction(base) ** exponent


def _units(text: str, is_glued: bool) -> tuple[str, ...] | None:
    """Known units in the words behind a number; None if they are more than a unit.

    Args:
        is_glued: whether the words follow the number without a space, as in `5km` or `5x`.
    """
    text = _FULL_STOP.sub("", with_marks_as_letters(text).strip().rstrip(",;:")).strip()
    if not text:
        return ()
    words = _UNIT_WORD.findall(text)
    if _UNIT_PHRASE.fullmatch(text) is None or _VARIABLES.match(text) is not None:
        return None
    if text[0] in "/-(^" and (short := _SHORT_WORD.match(text)) and short[1] not in UNITS:
        return None
    if re.match(r"[a-z]{2}(?![^\W\d_])", text) and words[0] not in UNITS.keys() | PROSE:
        return None
    if not (ALTERING | VERBS).isdisjoint(map(str.lower, words)):
        return None
    if not ALTERING_CHARACTERS.isdisjoint(text):
        return None
    if is_glued and words[0] not in GLUED_UNITS and not is_east_asian(words[0]):
        return None
    if words[0] == "mph":
        return ("mile", "hour")
    units: list[str] = []
    for word in words:
        if word in UNITS:
            units.append(UNITS[word])
        elif word[0] == "^" and units:
            units[-1] += word
        elif word in ("square", "sq", "cubic"):
            units.append("^{3}" if word == "cubic" else "^{2}")
    joined: list[str] = []
    for unit in units:  # `square cm` is written before its unit, and `cm^{2}` behind it
        if joined and joined[-1] in ("^{2}", "^{3}") and unit not in ("^{2}", "^{3}"):
            joined[-1] = unit + joined[-1]
        else:
            joined.append(unit)
    return tuple(joined)
