"""Plain tables, spelling hints and foreign text in the messages that commands show to people."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters with which a terminal does something else than to show them: control characters but
newline and tab, overrides of the direction of writing; and halves of characters, which cannot be
written at all."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lays out a text table: each column is as wide as its widest cell, numbers align right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if cell[:1].isdigit() or cell == "-" else cell.ljust(width)
            for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def closest(name: str, known: Iterable[str]) -> str:
    """Hint for a name that does not exist: the most similar known name, or else all of them."""
    names = sorted(known)
    similar = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {similar[0]!r}?" if similar else f"there are: {', '.join(names)}"


def short(text: str, width: int = 80) -> str:
    """The beginning of a text that may be long, for a message."""
    return text if len(text) <= width else f"{text[: width - 3]}..."


def printable(text: str) -> str:
    """Text that a terminal shows and does nothing else with: other characters become escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def harmless(text: str) -> str:
    """Text with which a terminal does nothing but to show it: codes of colours are left out, other
    control characters become escapes such as `\\x1b`.
    """
    lines = COLOUR.sub("", text).replace("\r\n", "\n")
    return CONTROL.sub(lambda found: printable(found[0]), lines)


def foreign(value: Any, width: int = 300) -> str:
    """Words of a server, a file, a library or another program, for a message: one short line of
    characters that can be printed.

    Args:
        value: text, an error, which has a text, or any other value.
        width: most characters of the line.
    """
    text = str(value) if isinstance(value, str | Exception) else repr(value)
    words = printable(" ".join(text[: 4 * width].split()))
    return short(words if len(text) <= 4 * width else f"{words}...", width)
