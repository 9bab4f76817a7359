"""Part of an answer that is compared: the marked one, else the last number of the running text.

Marks are, in this order: the first `####` (GSM8K), the last balanced `\\boxed{…}` (MATH), and the
last statement such as `The answer is …`.
"""

from __future__ import annotations

import re
from collections import deque
from itertools import islice

from pipeline.checkers.exact_values import LONGEST_VALUE, Value, read_value
from pipeline.checkers.plain_text import plain_text
from pipeline.checkers.prose import last_number, stated_part
from pipeline.checkers.readings import LONGEST_PART, read_part

MOST_MARKS = 50
"""Marks of a text that are looked at, as far as they may be headings."""
_MARK = re.compile(r"(?<!#)####(?!#)")
_END_OF_SENTENCE = re.compile(r"[.!?]\s+(?=[A-Z])")
_HEADING = re.compile(
    r"\W*(?:(?:step|part|case|question|problem|method|option|example)\b.*"
    r"|(?:(?:the |my )?(?:final )?answer|solution|explanation|conclusion|result|verification"
    r"|calculations?|summary|given)\W*)",
    re.IGNORECASE | re.DOTALL,
)
_TITLE = re.compile(r"\W*(?:\d+[.:)]\s+)?[^\W\d_]{2,}")
_NUMBERED_TITLE = re.compile(r"\W*(\d{1,2})[.:)]\W*[^\W\d_]{2,}")
_BRACES = re.compile(r"\\(?P<box>boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_SPACE = r"(?:[\s$.]|\\[()\[\],;! ]|\\q?quad)*"
_BETWEEN_BOXES = re.compile(rf"{_SPACE}(?:(?:,|;|and|or|\\text\{{\s*(?:and|or)\s*\}}){_SPACE})+")
_STATEMENT = re.compile(
    r"\b(?:the|final|correct|right|my|our|your)\s+answers?\b[^.:=\n]{0,60}?(?::|=|\bis\b|\bare\b)"
    r"|\banswers?\s*(?:\*\*)?\s*(?::|=|\bis\b|\bare\b)|\u7b54\u6848(?:\u662f|\u4e3a)?[:\uff1a]?",
    re.IGNORECASE,
)
_CORRECTION = re.compile(
    r"\b(?:wait|actually|correction|mistake|mistaken|wrong|incorrect|instead|sorry|oops|hmm|rather)\b",
    re.IGNORECASE,
)


def compared_part(text: str) -> str | None:
    """Part of a text that is compared.

    Returns:
        The part; it is empty if a mark marks nothing. None if the text has neither a mark nor a
        number.
    """
    for find in (_behind_mark, last_box, _stated, _whole, last_number):
        if (part := find(text)) is not None:
            return part
    return None


def last_box(text: str) -> str | None:
    """Content of the last balanced `\\boxed{…}`; empty if there are only boxes that never close.

    Boxes with nothing but `or`, `and` or commas between them are one answer.
    """
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    open_braces: list[tuple[int, int] | None] = []
    boxes: list[tuple[int, int, int, int]] = []
    has_box = False
    for brace in _BRACES.finditer(text):
        if brace["box"]:
            has_box = True
            open_braces.append(brace.span())
        elif brace[0] == "{":
            open_braces.append(None)
        elif brace[0] == "}" and open_braces and (opened := open_braces.pop()) is not None:
            while boxes and boxes[-1][0] > opened[0]:
                boxes.pop()  # it lies within this one
            boxes.append((*opened, *brace.span()))
    if not boxes:
        return "" if has_box else None
    first = len(boxes) - 1
    while first and _BETWEEN_BOXES.fullmatch(text, boxes[first - 1][3], boxes[first][0]):
        first -= 1
    return ", ".join(dict.fromkeys(text[begin:end].strip() for _, begin, end, _ in boxes[first:]))


def _behind_mark(text: str) -> str | None:
    """Rest of the line behind the first `####`; Markdown headings of that level are none."""
    marks = list(islice(_MARK.finditer(text), MOST_MARKS))
    num_headings = 0
    for i, mark in enumerate(marks):
        end = marks[i + 1].start() if i + 1 < len(marks) else len(text)
        behind = text[mark.end() : end].strip()
        part = _END_OF_SENTENCE.split(behind.partition("\n")[0], 1)[0].strip()
        if not part:
            return part
        numbered = _NUMBERED_TITLE.match(behind)
        if numbered is not None and int(numbered[1]) == num_headings + 1 and "\n" in behind:
            num_headings += 1
            continue
        if len(part) <= LONGEST_PART and isinstance(read_part(part), Value):
            return part
        is_marked_later = i + 1 < len(marks) or bool(last_box(text[mark.end() :]))
        if not (_HEADING.fullmatch(part) or (is_marked_later and _TITLE.match(part))):
            return part
    return None


def _whole(text: str) -> str | None:
    """The text itself, if it is a value and nothing else."""
    is_value = len(text) <= LONGEST_VALUE and read_value(plain_text(text)) is not None
    return text if is_value else None


def _stated(text: str) -> str | None:
    """Part behind the last `the answer is`, unless the text corrects itself behind that."""
    statements = deque(_STATEMENT.finditer(text), maxlen=1)
    if not statements or _CORRECTION.search(text, statements[0].end()):
        return None
    begin = statements[0].end()
    return stated_part(plain_text(text[begin : begin + LONGEST_PART]))
