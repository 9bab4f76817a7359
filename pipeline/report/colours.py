"""One colour for each model, the same in every plot and table of the report."""

from __future__ import annotations

from typing import Any

from pipeline.cache.projection import teacher_of

# Okabe and Ito's palette, which survives the common colour blindnesses, and two teachers more.
ROLE_COLOURS = {"student": "#0072B2", "twin": "#E69F00"}
TEACHER_COLOURS = ("#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#A79AD8", "#B5A642")


def colours_of(report: dict[str, Any]) -> dict[str, str]:
    """One colour per model, in every plot and table."""
    teachers = [model["name"] for model in report["models"] if model["role"] == "teacher"]
    named = enumerate(dict.fromkeys([*teachers, *map(teacher_of, report["caches"])]))
    colours = {name: TEACHER_COLOURS[index % len(TEACHER_COLOURS)] for index, name in named}
    colours |= {cache: colours[teacher_of(cache)] for cache in report["caches"]}
    pair = [model for model in report["models"] if model["role"] in ROLE_COLOURS]
    return colours | {model["name"]: ROLE_COLOURS[model["role"]] for model in pair}
