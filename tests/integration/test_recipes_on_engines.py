"""Recipes and a judge on real engines, whose million parameters write no new prompts: what is asked
is answered, read and counted, and a second run asks nothing.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import QUICKSTART, file_times, polystill
from tests.support.quickstart import some_prompts

pytestmark = pytest.mark.timeout(400)
NUM_TRAIN, NUM_HOLDOUT = 6, 3  # prompts of each domain


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("recipes")
    template, rubric = folder / "template.txt", folder / "rubric.txt"
    template.write_text("{prompt}")
    rubric.write_text("{prompt}={answer}")
    recipes = [
        {
            "type": "evolve",
            "teacher": "words",
            "ways": ["deeper"],
            "templates": {"deeper": str(template)},
            "sampling": {"max_tokens": 24},
        },
        {
            "type": "answer",
            "by": "domain_teacher",
            "sampling": {"temperature": 0, "max_tokens": 24},
        },
    ]
    judge = {"type": "judge", "teacher": "words", "min_grade": 2, "rubric": str(rubric)}
    values = {
        "storage.root": folder / "out",
        "prompts.sources.0.path": some_prompts("prompts.jsonl", NUM_TRAIN, folder),
        "prompts.sources.1.path": some_prompts("holdout.jsonl", NUM_HOLDOUT, folder),
        "synthesis.recipes": json.dumps(recipes),
        "synthesis.filters": json.dumps([judge]),
    }
    return [str(QUICKSTART / "config.yaml"), *(f"{key}={value}" for key, value in values.items())]


def test_engines_are_asked_for_prompts_answers_and_grades(arguments: list[str]) -> None:
    root = Path(arguments[1].partition("=")[2])
    for stage in ("prepare", "synthesize"):
        done = polystill("stage", stage, *arguments, seconds=300)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    record: dict[str, Any] = json.loads(
        (root / "runs/quickstart/stages/synthesize.json").read_text()
    )
    evolved = record["counts"]["evolve by words"]
    assert evolved["answers"] == 2 * NUM_TRAIN == evolved["malformed"] + evolved.get("over_long", 0)
    kept = sum(record["counts"][name]["kept"] for name in ("arithmetic", "words"))
    assert kept == 2 * (NUM_TRAIN + NUM_HOLDOUT)
    (judged,) = record["filters"]
    assert judged["seen"] == kept and judged["dropped"] < kept
    grades = {
        name: grade
        for path in root.glob("judgements/*/*.json")
        for name, grade in json.loads(path.read_text()).items()
    }
    assert len(grades) == kept and set(grades.values()) <= {1, 2, 3, 4, 5}
    assert judged["dropped"] == list(grades.values()).count(1)
    before = file_times(root)
    again = polystill("stage", "synthesize", *arguments)
    assert "up to date" in again.stdout and file_times(root) == before
