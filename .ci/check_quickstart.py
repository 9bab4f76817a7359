"""Does the quickstart do what it promises? Reads its report; ends with what it does not.

The student must answer at least 90 % as many hold-out prompts of a domain as that domain's own
teacher, beside a twin, from answers that passed the filters of the config.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPORT = Path(__file__).parents[1] / "examples/quickstart/output/runs/quickstart/report.json"
SHARE_OF_TEACHER = 0.9
FILTERS = ["checker", "near_duplicate", "contamination"]


def problems(report: dict[str, Any]) -> list[str]:
    """What is missing or too low. A teacher of the quickstart has the name of its domain."""
    exact = {
        model["name"]: {name: of["exact_match"] for name, of in model["domains"].items()}
        for model in report["models"]
    }
    found = [f"there is no {name}" for name in ("student", "twin") if name not in exact]
    for domain in report["weights"]:
        ours, theirs = exact.get("student", {}).get(domain), exact[domain][domain]
        if not theirs or ours is None or ours + 1e-9 < SHARE_OF_TEACHER * theirs:
            found.append(f"{domain}: the student answers {ours} exactly, its teacher {theirs}")
    names = [each["filter"] for each in report["filters"] if each["seen"]]
    return found + ([] if names == FILTERS else [f"the filters that saw answers are {names}"])


if __name__ == "__main__":
    sys.exit("; ".join(problems(json.loads(REPORT.read_text()))) or None)
