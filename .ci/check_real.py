"""Does the example with a real model do what it promises? Reads its report; ends with what it does
not.

On the hold-out split the student must be better than what training started from in the loss on the
text and in KL to the teachers, and in KL better than the twin, each beyond the 95 % interval. The
report must show answers of all models in each domain.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

REPORT = Path(__file__).parents[1] / "examples/smollm2/output/runs/smollm2/report.json"
MODELS = ["generalist", "mathematician", "student", "twin"]
DOMAINS = ["gsm8k", "requests"]


def problems(report: dict[str, Any]) -> list[str]:
    """What is missing or not better."""
    names = [model["name"] for model in report["models"]]
    found = [] if names == MODELS else [f"the models are {names}"]
    measured = {(each["model"], each["teacher"]) for each in report["fidelity"]}
    wanted = [(model, teacher) for model in MODELS[2:] for teacher in MODELS[:2]]
    found += [f"no fidelity of {m} to {t}" for m, t in wanted if (m, t) not in measured]
    for domain in DOMAINS:
        shown = [each["answers"] for each in report["shown_prompts"] if each["domain"] == domain]
        authors = [{a["author"] for a in answers if a["answer"].strip()} for answers in shown]
        if not any(set(MODELS) <= each for each in authors):
            found.append(f"no prompt of {domain} is shown with an answer of each model")
    overall = {
        each["other"]: each
        for each in report["differences"]
        if each["teacher"] is None and each["domain"] is None
    }
    for other in ("start", "twin"):
        if other not in overall:
            found.append(f"the student is not compared with its {other}")
            continue
        for figure in ("loss", "kl") if other == "start" else ("kl",):
            difference = overall[other][figure] or {"high": None}
            if difference["high"] is None or difference["high"] >= 0:
                found.append(f"{figure}, student less {other}: {difference}")
    return found


if __name__ == "__main__":
    sys.exit("; ".join(problems(json.loads(REPORT.read_text()))) or None)
