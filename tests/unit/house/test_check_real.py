"""What CI asks of the report on the real model."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / ".ci/check_real.py"
spec = importlib.util.spec_from_file_location("check_real", SCRIPT)
assert spec is not None and spec.loader is not None
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


def estimate(mean: float, half: float = 0.05) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def report(**changed: dict[str, Any] | None) -> dict[str, Any]:
    """A report with nothing to object to; `changed` replaces differences as `start_loss`."""
    differences = {
        "start": {"loss": estimate(-1.0), "kl": estimate(-0.9)},
        "twin": {"loss": estimate(0.01), "kl": estimate(-0.12)},
    }
    for name, value in changed.items():
        other, figure = name.split("_")
        differences[other][figure] = value  # type: ignore[assignment]
    everywhere = {"teacher": None, "domain": None}
    return {
        "models": [{"name": name} for name in check.MODELS],
        "fidelity": [
            {"model": model, "teacher": teacher}
            for model in ("student", "twin", "start")
            for teacher in ("generalist", "mathematician", None)
        ],
        "shown_prompts": [
            {"domain": domain, "answers": [{"author": m, "answer": "Yes."} for m in check.MODELS]}
            for domain in check.DOMAINS
        ],
        "differences": [
            {"other": other, **figures, **everywhere} for other, figures in differences.items()
        ]
        + [{"other": "start", "teacher": None, "domain": "gsm8k", "loss": estimate(9), "kl": None}],
    }


def test_a_student_better_than_its_start_and_closer_than_its_twin_passes() -> None:
    assert check.problems(report()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("start_loss", estimate(-0.04)),
        ("start_kl", estimate(0.1)),
        ("start_kl", None),
        ("start_kl", {"mean": -1.0, "low": None, "high": None}),
        ("twin_kl", estimate(-0.04)),
        ("twin_kl", None),
    ],
)
def test_a_difference_that_shows_nothing_is_named(name: str, value: Any) -> None:
    (problem,) = check.problems(report(**{name: value}))
    other, figure = name.split("_")
    assert problem.startswith(f"{figure}, student less {other}: ")


def test_missing_models_comparisons_and_fidelity_are_named() -> None:
    made = report()
    del made["models"][3], made["fidelity"][0], made["differences"][1]
    made["shown_prompts"][1]["answers"][2]["answer"] = "\n"
    assert check.problems(made) == [
        "the models are ['generalist', 'mathematician', 'student']",
        "no fidelity of student to generalist",
        "no prompt of requests is shown with an answer of each model",
        "the student is not compared with its twin",
    ]
