"""The quickstart's material, made smaller."""

import importlib.util
import json
from pathlib import Path
from typing import Any

from tests.support.command_line import QUICKSTART

DOMAINS = ("arithmetic", "words")
SEED, NUM_HOLDOUT = 17, 180
"""The arguments of `make_material.py` that decide which prompts are held out."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_prompts(domain: str, count: int) -> list[dict[str, Any]]:
    """The first train prompts of a domain with their references, which the file does not give."""
    spec = importlib.util.spec_from_file_location("quickstart_tasks", QUICKSTART / "tasks.py")
    assert spec is not None and spec.loader is not None
    tasks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tasks)
    chosen = tasks.split_domain(domain, SEED, count, NUM_HOLDOUT).training
    return [json.loads(task.to_json(with_reference=True)) for task in chosen]


def some_prompts(name: str, count: int, folder: Path) -> Path:
    """Writes the first prompts of each domain, with their references."""
    if name == "prompts.jsonl":
        by_domain = [train_prompts(domain, count) for domain in DOMAINS]
    else:
        rows = read_lines(QUICKSTART / name)
        by_domain = [[row for row in rows if row["domain"] == domain] for domain in DOMAINS]
    chosen = [row for group in by_domain for row in group[:count]]
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return path
