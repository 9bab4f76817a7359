"""Does the quickstart do what it promises? Reads its report; ends with what it does not.

The student must answer at least 90 % as many hold-out prompts of a domain as that domain's own
teacher, from answers that passed the filters of the config. It must be better than its twin, which
learned from the same answers without soft targets, beyond the 95 % interval: in exact match, in the
loss on the right answers and in KL to the teachers.
"""

from __future__ import annotations

import json
import math
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
    if not found:
        found = _no_better_than_the_twin(report)
    names = [each["filter"] for each in report["filters"] if each["seen"]]
    return found + ([] if names == FILTERS else [f"the filters that saw answers are {names}"])


def _no_better_than_the_twin(report: dict[str, Any]) -> list[str]:
    """Figures in which the student's gain over the twin is missing or within its 95 % interval."""
    by_name = {model["name"]: model["domains"].values() for model in report["models"]}
    (ours, variance), (theirs, more) = (_share(by_name[name]) for name in ("student", "twin"))
    found = []
    if ours - theirs <= 1.96 * math.sqrt(variance + more):
        found.append(
            f"the student answers {ours:.3f} of all prompts exactly, the twin {theirs:.3f}"
        )
    overall = [
        each
        for each in report["differences"]
        if (each["other"], each["teacher"], each["domain"]) == ("twin", None, None)
    ]
    for figure in ("loss", "kl"):
        differences = [each[figure] for each in overall]
        if not any(d and d["high"] is not None and d["high"] < 0 for d in differences):
            found.append(f"{figure}, student less twin: {differences}")
    return found


def _share(domains: Any) -> tuple[float, float]:
    """Share of the prompts of all domains that are answered exactly, and its variance."""
    number = sum(of["prompts"] for of in domains)
    share = sum(of["prompts"] * of["exact_match"] for of in domains) / number
    return share, share * (1 - share) / number


if __name__ == "__main__":
    sys.exit("; ".join(problems(json.loads(REPORT.read_text()))) or None)
