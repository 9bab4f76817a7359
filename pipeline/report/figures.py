"""Numbers as the report writes them: significant digits, percentages, prices, units."""

from __future__ import annotations

import math
from typing import Any

MISSING = "—"


def number(value: float | None, digits: int = 3) -> str:
    """With a fixed number of decimals; what rounds to zero has no sign."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:z,.{digits}f}"


def significant(value: float | None) -> str:
    """At least three significant digits, never as a power of ten."""
    if value is None or value == 0 or not math.isfinite(value):
        return number(value, 0)
    return number(value, max(0, 2 - math.floor(math.log10(abs(value)))))


def percent(value: float | None) -> str:
    return f"{number(100 * value, 1)} %" if value is not None else MISSING


def scaled(value: float | None, base: int = 1000) -> str:
    """A large number with its unit, as 1.54 B parameters, or 3.09 GiB with base 1024."""
    if value is None:
        return MISSING
    units = ("", " k", " M", " B") if base == 1000 else (" B", " KiB", " MiB", " GiB")
    power = min(int(math.log(max(value, 1), base) + 1e-9), 3)
    return significant(value / base**power) + units[power]


def price(model: dict[str, Any]) -> float | None:
    """Per million tokens; None where no cost is given, since free is not a measurement."""
    return (model["price_per_million_tokens"] or None) if model["cost_per_hour"] else None


def device(model: dict[str, Any]) -> str:
    """What a model was measured on."""
    engine = model["engine"]
    if engine["engine"] == "endpoint":
        return "over the network"
    count = engine["num_devices"]
    return engine["device"] if count == 1 else f"{count} x {engine['device']}"
