"""One colour for each model, the same in every plot and table of the report."""

from __future__ import annotations

from pipeline.cache.kinds import teacher_of
from pipeline.report.models import Report

# Okabe and Ito's palette, which survives the common colour blindnesses, and two more colours.
ROLE_COLOURS = {"student": "#0072B2", "twin": "#E69F00"}
TEACHER_COLOURS = ("#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#A79AD8", "#B5A642")


def colours_of(report: Report) -> dict[str, str]:
    """Colour of each model and each cache; a cache has its teacher's colour."""
    teachers = [model.name for model in report.models if model.role == "teacher"]
    named = enumerate(dict.fromkeys([*teachers, *map(teacher_of, report.caches)]))
    colours = {name: TEACHER_COLOURS[index % len(TEACHER_COLOURS)] for index, name in named}
    colours |= {cache: colours[teacher_of(cache)] for cache in report.caches}
    students = [model for model in report.models if model.role in ROLE_COLOURS]
    return colours | {model.name: ROLE_COLOURS[model.role] for model in students}
