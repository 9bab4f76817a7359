"""Writes the tables in `docs/architectures.md` from `tests/support/architectures.py`.

    .venv/bin/python docs/make_architectures.py

The page's head, above the marker, is written by hand and kept. The tests try every architecture
and fail if it does anything else than its row says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.architectures import (
    ARCHITECTURES,
    REFUSED_TEACHERS,
    TEACHERS,
    Architecture,
    RefusedTeacher,
)

PAGE = ROOT / "docs" / "architectures.md"
COMMAND = ".venv/bin/python docs/make_architectures.py"
MARKER = f"<!-- Made by `{COMMAND}` from here on; change the architectures, not this text. -->\n"
STUDENTS = """
## Students

A student that trains has the gradients that transformers computes for each sequence alone: in both
formats of `student.dtype`, packed and padded, with `student.gradient_checkpointing` and without it.
A setting in a row is one that the architecture needs; with another it is refused. The attention is
the one that it was tried with.
"""


TEACHERS_HEAD = """
## Teachers

Rows of these come out of vLLM's engine on a CPU as transformers computes them, within 1e-4 nats in
float32, attention windows and answers to one prompt included. Any other teacher is
[compared with transformers](operations.md#engines-beside-transformers) where a cache begins.

"""

REFUSED_HEAD = """
vLLM computes these otherwise than transformers, without a word. The comparison refuses them before
a row is written: `vLLM computes another model than transformers: …`.

"""


def main() -> None:
    """Writes the page again; the command line has no options."""
    argparse.ArgumentParser(description="Writes the tables of architectures.").parse_args()
    PAGE.write_text(page(PAGE.read_text()))


def page(before: str) -> str:
    """The whole page: the head of the page as it is, and the tables as they should be."""
    head, marker, _ = before.partition(MARKER)
    if not marker:
        raise ValueError(f"{PAGE.relative_to(ROOT)} has lost its marker: {MARKER!r}")
    students = STUDENTS + "\n" + students_table(ARCHITECTURES)
    teachers = TEACHERS_HEAD + teachers_table(ARCHITECTURES)
    return head + MARKER + students + teachers + REFUSED_HEAD + refused_table(REFUSED_TEACHERS)


def students_table(architectures: Sequence[Architecture]) -> str:
    """A row for every architecture: those that train first."""
    rows = [
        student_row(each) for each in sorted(architectures, key=lambda each: bool(each.refused))
    ]
    return table(("architecture", "`model_type`", "trains", "packs", "attention"), rows)


def student_row(architecture: Architecture) -> tuple[str, ...]:
    """The cells of an architecture."""
    name, kind = architecture.name, f"`{architecture.kind}`"
    if architecture.refused:
        return name, kind, "refused", "", ""
    needs = "yes" + "".join(f", with `{setting}`" for setting in architecture.needs)
    packs = "yes" if architecture.packs else "`training.packing: false`"
    return name, kind, needs, packs, f"`{architecture.attention}`"


def teachers_table(architectures: Sequence[Architecture]) -> str:
    """A row for every architecture that is tried as a teacher."""
    rows = [(each.name, f"`{each.kind}`") for each in architectures if each.name in TEACHERS]
    return table(("architecture", "`model_type`"), rows)


def refused_table(refused: Sequence[RefusedTeacher]) -> str:
    """A row for every teacher that is refused."""
    rows = []
    for each in refused:
        block = ", ".join(f"`{key}: {value}`" for key, value in each.block.items())
        rows.append((each.name, block, each.reason))
    return table(("architecture", "`vllm:`", "vLLM 0.32"), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


if __name__ == "__main__":
    main()
