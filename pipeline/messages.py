"""Plain tables and spelling hints for the messages that commands show to people."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


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
