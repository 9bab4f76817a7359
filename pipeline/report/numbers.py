"""Numbers as the report writes them: significant digits, percentages, units."""

from __future__ import annotations

import math

MISSING = "—"


def number(value: float | None, digits: int = 3) -> str:
    """The value with a fixed number of decimals; a value that rounds to zero has no sign."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:z,.{digits}f}"


def significant(value: float | None) -> str:
    """The value with at least three significant digits, never as a power of ten."""
    if value is None or value == 0 or not math.isfinite(value):
        return number(value, 0)
    return number(value, max(0, 2 - math.floor(math.log10(abs(value)))))


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal."""
    return f"{number(100 * value, 1)} %" if value is not None else MISSING


def scaled(value: float | None, base: int = 1000) -> str:
    """A large number with its unit, such as 1.54 B parameters, or 3.09 GiB with base 1024."""
    if value is None:
        return MISSING
    units = ("", " k", " M", " B") if base == 1000 else (" B", " KiB", " MiB", " GiB")
    power = min(int(math.log(max(value, 1), base) + 1e-9), 3)
    return significant(value / base**power) + units[power]
