"""Plain tables, shown values, spelling hints and foreign text in messages for people."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COLOUR = re.compile(r"\x1b\[[0-9;:]*m")
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters with which a terminal does something else than to show them: control characters but
newline and tab, overrides of the direction of writing; and halves of characters, which cannot be
written at all."""

LONGEST_SHOWN = 120
"""Characters of a value in a message."""
LONGEST_REASON = 400
"""Characters of another library's message in a message."""
LONGEST_PATH = 1000
MOST_NAMES = 20
"""Names that a message lists."""
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


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


def resources_in_words(amounts: Mapping[str, float]) -> str:
    """Ray's resources as in `1 CPU + 0.5 teacher_node`, without memory and addresses of nodes."""
    shown = {
        key: n
        for key, n in amounts.items()
        if key not in ("memory", "object_store_memory") and ":" not in key and n > 0
    }
    return " + ".join(f"{n:g} {key}" for key, n in sorted(shown.items())) or "nothing"


def closest(name: str, known: Iterable[str]) -> str:
    """Hint for a name that does not exist: the most similar known name, or else all of them."""
    names = sorted(known)
    similar = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {shown(similar[0])}?" if similar else f"there are: {listed(names)}"


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


def shown(value: object) -> str:
    """A value of any size and depth as Python writes it, cut to a length that can be read."""
    return short(_SHORT.repr(value), LONGEST_SHOWN)


def listed(names: Iterable[object]) -> str:
    """Names separated by commas, the first few of many; `none` if there are none."""
    all_names = [shown_name(name) for name in names]
    more = len(all_names) - MOST_NAMES
    rest = f" and {more} more" if more > 0 else ""
    return (", ".join(all_names[:MOST_NAMES]) or "none") + rest


def shown_name(name: object) -> str:
    """A name without quotes, if it is one that can be read."""
    text = str(name)
    return text if text.isprintable() and 0 < len(text) <= LONGEST_SHOWN else shown(name)


def shown_path(path: str) -> str:
    """A path whole, or its beginning and end if it is longer than any that people use."""
    half = LONGEST_PATH // 2
    return path if len(path) <= LONGEST_PATH else f"{path[:half]}...{path[-half:]}"


def shorter(error: BaseException) -> str:
    """Message of another library's error on one line, without the rest of a long one."""
    return foreign(str(error), LONGEST_REASON)
