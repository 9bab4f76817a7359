"""The quickstart's material, made smaller."""

import json
from pathlib import Path
from typing import Any

from tests.support.command_line import QUICKSTART

DOMAINS = ("arithmetic", "words")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def some_prompts(name: str, count: int, folder: Path) -> Path:
    """Copies the first prompts of each domain: the file itself holds one domain after the other."""
    rows = read_lines(QUICKSTART / name)
    by_domain = [[row for row in rows if row["domain"] == domain] for domain in DOMAINS]
    chosen = [row for group in by_domain for row in group[:count]]
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return path
