"""What every benchmark says of itself: machine, commit, a table for people, JSON for programs."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from pipeline.config.run import Config
from pipeline.layout import Layout
from pipeline.run.training_spec import TrainingSpec
from teachers.engine.hardware import cpu_name

ROOT = Path(__file__).resolve().parents[1]
MADE_UP = "0" * 32
"""Fingerprint of caches that no teacher filled."""


def machine() -> dict[str, Any]:
    """Processor, memory, devices, and how busy the machine was."""
    return {
        "cpu": cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def commit() -> str:
    """The commit that is checked out, with a `+` when files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints rows of the same keys, numbers to the right."""
    names = list(rows[0])
    cells = [[_shown(row[name]) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    for line, row in zip([names, *cells], [rows[0], *rows], strict=True):
        print(
            "  ".join(
                text.ljust(width) if isinstance(row[name], str) else text.rjust(width)
                for text, width, name in zip(line, widths, names, strict=True)
            ).rstrip()
        )


def write_json(path: Path, rows: Sequence[Mapping[str, Any]], ratios: Mapping[str, float]) -> None:
    """Writes the machine, the commit, the rows and the ratios that are promised."""
    document = {"machine": machine(), "commit": commit(), "rows": rows, "ratios": ratios}
    path.write_text(json.dumps(document, indent=1) + "\n")


def made_up_spec(
    root: Path, teachers: Sequence[str], dataset: str, student: Mapping[str, Any], **training: Any
) -> TrainingSpec:
    """A training whose models, prompts and recipes exist in name only; its teachers weigh by
    token.
    """
    schedule = {
        "losses": [{"type": "forward_kl", "weight": 1.0}],
        "learning_rate": 1e-4,
        "warmup_steps": 0,
        "evaluate_every_steps": 1,
        "checkpoint_every_steps": 1,
    }
    config = Config.model_validate(
        {
            "name": "benchmark",
            "seed": 0,
            "storage": {"root": str(root)},
            "prompts": {"sources": [{"path": "made-up.jsonl"}]},
            "teachers": {name: {"model": "made-up"} for name in teachers},
            "synthesis": {"recipes": [{"type": "dataset"}]},
            "scoring": {"num_logprobs": 64, "selection": {"type": "top_k", "max_entries": 64}},
            "combine": {
                "method": "mixture",
                "weights": {"type": "gold_likelihood", "temperature": 1.0, "per": "token"},
            },
            "student": {"model": "made-up", "initialization": "random", **student},
            "training": schedule | training,
            "evaluation": {"sampling": {}},
        }
    )
    layout = Layout(str(root), config.name)
    caches = {name: layout.cache(name, MADE_UP) for name in teachers}
    return TrainingSpec(
        config=config,
        layout=layout,
        dataset_digest=dataset,
        student="student",
        losses=tuple(config.training.losses),
        caches=caches,
        cache_fingerprints=dict.fromkeys(teachers, MADE_UP),
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)
