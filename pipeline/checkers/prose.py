"""Numbers in running text, each with everything that belongs to it: `3 to 5`, `x = 5`, `not 7`.

What belongs to a number is never cut off, so that `12 or 13` is not 13 and `\\sqrt{3}` not 3.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

from pipeline.checkers.exact_values import alters_number, is_east_asian, is_unit
from pipeline.checkers.plain_text import plain_text, with_marks_as_letters

LOOK_BEHIND, LOOK_AHEAD = 1_500, 300
"""Characters before and behind the last number of a text that are looked at."""
MOST_JOINED = 6
"""Numbers of a statement that may belong together, as in `3 hours and 20 minutes`."""
_CUT = "\u2026"
_DIGIT = re.compile("[\\d\u00bc-\u00be\u2150-\u215f]")
_TOKEN = re.compile(
    r"""
    (?P<number>(?<!\w)\.\d+|\d+(?:[.,]\d+)*)
    |(?P<quoted>\ue000[^\ue000]*\ue000)
    |(?P<command>\\(?:begin|end)\s*\{[a-z]+\*?\}|\\[A-Za-z]+|\\.)
    |(?P<word>[^\W\d_]+(?:'[^\W\d_]+|-[^\W\d_]{2,})*)
    |(?P<end>\n+|[\u2022\u2023\u25a0-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff\ufe0f]|(?<!\.)(?:\.|(?<!\d)\.+)(?=\s|$)|(?<![\d)])[!?]+|(?<=[^\W\d])\.+|(?<=\d)\.(?!\.|\s*\d))
    |[^\S\n]+
    |(?P<sign>.)
    """,
    re.VERBOSE | re.DOTALL,
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_JOINING = _words(
    "or and to of in per over times plus minus by through till until vs versus choose mod"
)
"""Words that make one expression of the numbers before and behind them."""
_BENDING = _words(
    """
    or not never no neither nor than least most minus negative plus times twice double triple half
    third quarter over under below above almost nearly between without except up upto log sqrt root
    isn't wasn't aren't don't doesn't minimum maximum
    sin cos tan cot sec csc arcsin arccos arctan exp ln lg max min floor ceil gcd lcm
    """
)
"""Words directly before a number that make it another one."""
_BENDING_EAST_ASIAN = re.compile("(?:[负負不非或至到第近约超]|大于|小于|分之|以上|以下)是?$")
_NEGATING = _words("not never cannot can't couldn't won't wouldn't shouldn't isn't")
_BEING = _words("be is was are equal equals")
_REFUTING = _words("not never wrong incorrect false impossible")
_PARTS = _words("half third quarter thirds quarters fifth fifths tenth tenths out twice up")
_DIVIDING = _words("divided multiplied")
_NUMBERED = _words(
    "step part case question problem day example option method equation line item exercise"
)
"""Words whose number counts them, so that a colon behind it begins what they say."""
_LINKING = _words("is are was be equals equal to of at by becomes gives get")
"""Words behind which a dash is a sign."""
_FILLING = re.compile(
    r"(?:\W|\b(?:therefore|thus|hence|so|exactly|equal|equals|to|the|a|an|just|only|simply|about"
    r"|approximately|roughly|around|as|follows|number|total|value|of|result|given|by)\b)*",
    re.IGNORECASE,
)
_END_OF_CLAUSE = re.compile(r"\.(?=\s|$)|\n")
_MONTHS = _words(
    "january february march april may june july august september october november december"
)
_ARTICLES = ("a", "an", "one", "two", "three")
_COMPARING = _words("more less fewer greater than")
_OPENING, _CLOSING = ("(", "[", "{"), (")", "]", "}")


@dataclass(frozen=True)
class Token:
    """A piece of a text, without white space: its kind, its text and where it begins.

    Attributes:
        is_apart: whether white space stands before it.
    """

    kind: str
    text: str
    start: int
    is_apart: bool

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    @property
    def word(self) -> str:
        return self.text.strip("\ue000 ").lower() if self.kind in ("word", "quoted") else ""

    @property
    def is_formula(self) -> bool:
        """Whether the token continues a formula; a single letter is a variable."""
        is_variable = self.kind == "word" and len(self.text) == 1 and self.text not in "aAI"
        return self.kind in ("number", "command", "sign") or is_variable


_NOTHING = Token("end", "", 0, True)


def last_number(text: str) -> str | None:
    """The last number of a text, with what belongs to it; None if there is no number."""
    digits = deque(_DIGIT.finditer(text), maxlen=1)
    if not digits:
        return None
    at = digits[0]
    begin = max(0, at.start() - LOOK_BEHIND)
    window = plain_text(text[begin : at.end() + LOOK_AHEAD])
    window = window if begin == 0 else _CUT + window
    tokens = _tokens(window)
    places = [i for i, token in enumerate(tokens) if token.kind == "number"]
    return _around(window, tokens, places[-1])[0] if places else None


def stated_part(clause: str) -> str | None:
    """Part that a clause behind `the answer is` states; None if the clause is empty.

    Args:
        clause: text behind the statement, after `plain_text`.
    """
    sentence = _END_OF_CLAUSE.split(clause.lstrip(" \n:*="), maxsplit=1)[0]
    sentence = sentence.rpartition(": ")[2].strip()
    tokens = _tokens(sentence)
    places = [i for i, token in enumerate(tokens) if token.kind == "number"]
    if not places:
        return sentence or None
    part, start = _around(sentence, tokens, places[0])
    if not _FILLING.fullmatch(sentence, 0, start):
        return sentence
    joined = [place for place in places[1:MOST_JOINED] if _begin(tokens, place) <= places[0]]
    return sentence[start : tokens[_finish(tokens, joined[-1])].end] if joined else part


def _tokens(text: str) -> list[Token]:
    return [
        Token(
            match.lastgroup,
            match[0],
            match.start(),
            text[match.start() - 1 : match.start()].isspace(),
        )
        for match in _TOKEN.finditer(with_marks_as_letters(text))
        if match.lastgroup is not None
    ]


def _at(tokens: list[Token], place: int) -> Token:
    return tokens[place] if 0 <= place < len(tokens) else _NOTHING


def _around(text: str, tokens: list[Token], place: int) -> tuple[str, int]:
    """Text of the expression around a number, and where it begins."""
    first, last = _begin(tokens, place), _finish(tokens, place)
    kinds = [token.text for token in tokens[first : last + 1]]
    depth = sum((kind in _OPENING) - (kind in _CLOSING) for kind in kinds)
    while depth > 0 and tokens[first].text in _OPENING:
        first, depth = first + 1, depth - 1
    while depth < 0 and tokens[last].text in _CLOSING:
        last, depth = last - 1, depth + 1
    start = tokens[first].start
    part = text[start : tokens[last].end]
    if tokens[first].text in ("-", "\u2014") and _at(tokens, first + 1).is_apart:
        before = _at(tokens, first - 1)
        if before.word not in _LINKING and before.text != ":":
            part = _CUT + part  # a bullet, or a dash between words
    return part, start


def _begin(tokens: list[Token], place: int) -> int:
    """Place of the first token that belongs to a number."""
    first = place
    while first > 0:
        before, at = tokens[first - 1], first - 1
        joined = _joined_number(tokens, at)
        if before.text == ":" and tokens[first].is_apart:
            if not _is_ratio(tokens, at):
                break
            first = at
        elif before.text in (",", ";"):
            further = _at(tokens, at - 1)
            is_measure = is_unit(further.word) and _at(tokens, at - 2).kind == "number"
            if not further.is_formula and not is_measure:
                break
            first = at
        elif before.is_formula or before.kind == "quoted" or _names(tokens, at):
            first = at
        elif joined is not None:
            first = joined
        elif before.word in _BENDING or _BENDING_EAST_ASIAN.search(before.word):
            first = at
        elif before.word in _BEING and _at(tokens, at - 1).word in _NEGATING:
            first = at - 1
        else:
            break
    return first


def _finish(tokens: list[Token], place: int) -> int:
    """Place of the last token that belongs to a number."""
    last = place
    while last + 1 < len(tokens):
        token, at = tokens[last + 1], last + 1
        after = _at(tokens, at + 1)
        if token.text == "(" and token.is_apart and after.kind == "word" and len(after.text) > 1:
            break  # words between parentheses
        if token.text in (",", ";") and not (after.is_formula or after.word in _BENDING):
            break
        if token.text == ":" and (after.is_apart or after.kind == "end"):
            break
        belongs = token.kind == "quoted" or token.is_formula
        if not belongs and token.kind == "word":
            is_glued = not token.is_apart and not is_east_asian(token.text)
            belongs = is_glued or _alters(tokens, at)
        if not belongs:
            break
        last = at
    return last


def _alters(tokens: list[Token], at: int) -> bool:
    """Whether a word behind a number changes it: a scale, a fraction, an alternative."""
    word, after = tokens[at].word, _at(tokens, at + 1)
    if word in _BEING:
        return after.word in _REFUTING
    if word in _JOINING - {"or"}:
        is_part = after.word in _ARTICLES and _at(tokens, at + 2).word in _PARTS
        return is_part or after.is_formula or after.word in _BENDING
    return word == "percent" or (word not in _COMPARING and alters_number(word))


def _names(tokens: list[Token], at: int) -> bool:
    """Whether a word belongs to the formula behind it: a letter before `=`, glued letters, or the
    name of a function.
    """
    token, after = tokens[at], tokens[at + 1]
    if token.kind != "word" or is_east_asian(token.text):
        return False
    is_glued = not after.is_apart and (after.kind == "number" or after.text == "(")
    return is_glued or (after.kind != "number" and len(token.text) == 1)


def _joined_number(tokens: list[Token], at: int) -> int | None:
    """Place of the number to which a word or unit before another number joins it, if it does.

    `3 to`, `5 apples or`, `2 out of`, `half of` and `5 feet` join; `and the rest` does not.
    """
    token, before = tokens[at], _at(tokens, at - 1)
    if token.word in _JOINING:
        if before.is_formula or before.word in _PARTS or before.word in _DIVIDING:
            return at - 1
        return at - 2 if before.word and _at(tokens, at - 2).kind == "number" else None
    joins = is_unit(token.word) or token.word in _MONTHS
    return at - 1 if before.kind == "number" and joins else None


def _is_ratio(tokens: list[Token], at: int) -> bool:
    """Whether a colon with a space behind it stands in a ratio such as `3: 4`."""
    is_number = _at(tokens, at - 1).kind == "number"
    return is_number and _at(tokens, at - 2).word not in _NUMBERED
