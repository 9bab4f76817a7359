"""One writing of short mathematical texts: ASCII digits and signs, LaTeX without its typesetting.

Values are read from it, and what is no value is compared in it.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

QUOTE = "\ue000"
"""Character around words in a typeface of LaTeX, which no text has by itself."""
_SYMBOLS = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
    **dict.fromkeys("\u200b\u2060\ufeff", ""),
    **dict.fromkeys("\u2044\u2215", "/"),
    "\u201c": "'", "\u201d": "'", "\u2018": "'", "\u2019": "'",
    "\u3001": ",", "\u3002": ". ", "\u0964": ". ",
    "\u066b": ".", "\u066c": ",", "\u060c": ",", "\u066a": "%",
    "\u00a2": f" {QUOTE}cents{QUOTE} ",
    "\u221e": r"\infty ", "\u03c0": r"\pi ", "\u221a": r"\sqrt ",
    "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u22c5": r"\cdot ", "\u00f7": r"\div ",
    "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u00b1": r"\pm ",
    "\u222a": r"\cup ", "\u2248": r"\approx ", "\u00b0": r"^\circ ",
}  # fmt: skip
_UNUSUAL = re.compile(r"[^\x00-\x7f]")
_RAISED = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u207b\u207f]+")
_LOWERED = re.compile("[\u2080-\u208b]+")
_ROOT = re.compile("\u221a *(\\d+(?:\\.\\d+)?)")
_LATEX: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), new)
    for pattern, new in (
        (r"(?<=[\d)])\*\*(?=[-\d(])|(?<=(?<![A-Za-z])[A-Za-z])\*\*(?=\d)", "^"),
        (r"\\f?boxed ?\{([^{}]*)\}", r"\1"),
        (r"<<[^<>]*>>", ""),  # a calculation, as GSM8K notes it before its result
        (r"\*\*|__|`|</?answer>", " "),
        (r"\{,\}", ","),
        (r"\\[\[\]()]", " "),
        (r"\\!", ""),
        (r"(?<!\\)\\(?:[,;:> ]|(?:q?quad|thinspace|displaystyle|limits)(?![A-Za-z]))|~", " "),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z]) ?\.?", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\(?:leq|leqslant)(?![A-Za-z])", r"\\le"),
        (r"\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge"),
        (r"\\neq(?![A-Za-z])", r"\\ne"),
        (r"\\%", "%"),
        (r"\\\$", f"{QUOTE}dollars{QUOTE}"),
        (
            r"\^ ?(?:\\circ(?![A-Za-z])|\{ ?\\circ ?\})|\\degree(?![A-Za-z])",
            f" {QUOTE}degrees{QUOTE} ",
        ),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"\\frac\s*\{([^{}]*)\}\s*\{", r"\\frac{\1}{"),
        (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
        (r"([_^])\s*(-?\d+|[A-Za-z])", r"\1{\2}"),
        (r"[^\S\n]+", " "),
    )
]
_TYPEFACE = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|normal|up)?|math(?:rm|bf|it|sf|bb)|mbox|operatorname\*?|boldsymbol)"
    r"\s*\{([^{}]*)\}"
)
_SPACE_IN_WORDS = re.compile(r"(?<=[^\W_])\s+(?=[^\W_])")
_SPACE_OUTSIDE_WORDS = re.compile(r"(?<![^\W_])\s+|\s+(?![^\W_])")
_FACTOR = re.compile(r" ?(?:\\times|\\cdot)(?![A-Za-z]) ?| ?\* ?")
_BRACED = re.compile(r"\{([^{}]*)\}")
_CHOICE = re.compile(r"\(([A-Za-z])\)|([A-Za-z])[).]")
_WORDS = re.compile(r"(?=..)[A-Z]?[a-z]+(?:[ -][A-Z]?[a-z]+)*")


class _MarksAsLetters(dict[int, int]):
    """Table for `str.translate` that makes letters of the marks of Indic, Thai and NFD texts."""

    def __missing__(self, code: int) -> int:
        self[code] = 0x02BC if unicodedata.category(chr(code))[0] == "M" else code
        return self[code]


_MARKS = _MarksAsLetters()


def with_marks_as_letters(text: str) -> str:
    """The text, of the same length, in which a mark is a letter of its word."""
    return text if text.isascii() else text.translate(_MARKS)


def plain_text(text: str) -> str:
    """The text in one writing: ASCII digits and signs, and LaTeX without its spaces and sizes.

    Words in a typeface of LaTeX (`\\text{ cm}`) stand between two `QUOTE` afterwards.
    """
    if not text.isascii():
        text = _ROOT.sub(r"\\sqrt{\1}", text)
        text = _RAISED.sub(lambda run: f"^{{{unicodedata.normalize('NFKC', run[0])}}}", text)
        text = _LOWERED.sub(lambda run: f"_{{{unicodedata.normalize('NFKC', run[0])}}}", text)
        text = _UNUSUAL.sub(lambda match: _in_ascii(match[0]), text.replace("\u2212", "-"))
    text = _TYPEFACE.sub(_without_typeface, text)
    for pattern, new in _LATEX:
        text = pattern.sub(new, text)
    return text.strip()


def comparable_text(plain: str) -> str:
    """The text in which two texts that are no values are compared, after `plain_text`.

    White space, dollar signs, a full stop and braces around the whole make no difference, nor does
    the case of words.
    """
    text = plain.replace(QUOTE, " ").replace("$", " ")
    text = _SPACE_OUTSIDE_WORDS.sub("", _SPACE_IN_WORDS.sub(" ", text))
    text = _FACTOR.sub("*", text).rstrip(".,;:")
    while (framed := _BRACED.fullmatch(text)) is not None:
        text = framed[1]
    if (choice := _CHOICE.fullmatch(text)) is not None:
        return choice[1] or choice[2]
    return text.casefold() if _WORDS.fullmatch(text) else text


def _without_typeface(match: re.Match[str]) -> str:
    """Content of a LaTeX typeface: words between quotes, other things as they are."""
    content = match[1]
    is_upright = match[0].startswith(("\\text{", "\\mathrm{", "\\textrm{"))
    units = "mgshlLCFJNWVAT" if is_upright else ""
    if len(letter := content.strip()) == 1 and letter.isalpha() and letter not in units:
        return letter
    is_words = all(each.isalpha() or each in " .-'\\,/" for each in content)
    return (
        f"{QUOTE}{content.strip()}{QUOTE}"
        if is_words and len(content.strip()) > 0
        else f" {content} "
    )


@lru_cache(maxsize=4096)
def _in_ascii(character: str) -> str:
    """Counterpart of a character in ASCII or LaTeX; the character itself if it has none."""
    if character in _SYMBOLS:
        return _SYMBOLS[character]
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.digit(character))
    if category == "Zs":
        return " "
    if "\uff01" <= character <= "\uff5e":
        return chr(ord(character) - 0xFEE0)
    if unicodedata.decomposition(character).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    return character
