"""What CI asks of the quickstart's report."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / ".ci/check_quickstart.py"
spec = importlib.util.spec_from_file_location("check_quickstart", SCRIPT)
assert spec is not None and spec.loader is not None
check = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check)


def report(**student: float | None) -> dict[str, Any]:
    exact = {
        "arithmetic": {"arithmetic": 1.0, "words": 0.0},
        "words": {"arithmetic": 0.0, "words": 0.8},
        "student": {"arithmetic": 0.9, "words": 0.72} | student,
        "twin": {"arithmetic": 0.1, "words": 0.1},
    }
    return {
        "models": [
            {
                "name": name,
                "domains": {d: {"exact_match": r, "prompts": 100} for d, r in rates.items()},
            }
            for name, rates in exact.items()
        ],
        "weights": {"arithmetic": {}, "words": {}},
        "differences": [
            {"other": "twin", "teacher": None, "domain": None}
            | {figure: {"mean": -0.2, "high": -0.1} for figure in ("loss", "kl")}
        ],
        "filters": [{"filter": name, "seen": 9} for name in check.FILTERS],
    }


def test_nine_tenths_of_the_own_teacher_in_each_domain_suffice() -> None:
    assert check.problems(report()) == []


@pytest.mark.parametrize("rate", [0.71, 0.0, None])
def test_one_domain_that_is_too_low_is_named(rate: float | None) -> None:
    (problem,) = check.problems(report(words=rate))
    assert problem == f"words: the student answers {rate} exactly, its teacher 0.8"


def test_a_missing_twin_and_a_filter_that_saw_nothing_are_named() -> None:
    made = report()
    del made["models"][3]
    made["filters"][1]["seen"] = 0
    assert check.problems(made) == [
        "there is no twin",
        "the filters that saw answers are ['checker', 'contamination']",
    ]


@pytest.mark.parametrize("high", [0.01, None])
def test_a_twin_that_is_as_good_is_named(high: float | None) -> None:
    made = report()
    made["models"][3]["domains"] = {
        domain: {"exact_match": 0.75, "prompts": 100} for domain in ("arithmetic", "words")
    }
    made["differences"][0]["kl"] = {"mean": -0.1, "high": high}
    exact, kl = check.problems(made)
    assert exact == "the student answers 0.810 of all prompts exactly, the twin 0.750"
    assert kl.startswith("kl, student less twin: [{'mean': -0.1")
