"""The text of a model card, without a training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from pipeline import storage
from pipeline.config.load import load_config
from students.export.card import model_card

QUICKSTART = Path(__file__).resolve().parents[3] / "examples/quickstart/config.yaml"
HUB_TEACHER = "teachers.words.model=org/teacher"
TUNED = ["student.model=org/small", "student.initialization=pretrained"]


def card_of(overrides: list[str], folder: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    """The header, and the whole card."""
    summary = folder / "training.json"
    storage.write_json(str(summary), {"steps": 2, "final": {}, "identity": {}, "changes": []})
    config = load_config(QUICKSTART, [HUB_TEACHER, *overrides]).model_copy(update=changes)
    spec: Any = SimpleNamespace(
        config=config,
        summary_path=str(summary),
        student="student",
        cache_fingerprints={},
        dataset_digest="d",
    )
    card = model_card(spec)
    return yaml.safe_load(card.split("---\n")[1]), card


def test_base_model_is_what_was_tuned_and_teachers_stand_in_the_text(tmp_path: Path) -> None:
    header, card = card_of(TUNED, tmp_path)
    assert header["base_model"] == "org/small"
    assert "distilled from arithmetic, words (org/teacher) with polystill" in card


@pytest.mark.parametrize(
    "overrides",
    [
        ["student.model=org/small", "student.initialization=random"],
        ["student.initialization=pretrained"],
        [*TUNED, "student.initial_weights=/elsewhere"],
    ],
)
def test_nothing_is_named_that_it_was_not_tuned_from(overrides: list[str], tmp_path: Path) -> None:
    assert "base_model" not in card_of(overrides, tmp_path)[0]


def test_a_later_round_was_tuned_from_what_the_first_was(tmp_path: Path) -> None:
    before = [*TUNED, "student.initial_weights=/output/runs/quickstart/export/student"]
    assert card_of(before, tmp_path, round=2)[0]["base_model"] == "org/small"


def test_template_arguments_stand_in_the_provenance(tmp_path: Path) -> None:
    named = ["student.template_arguments={enable_thinking: false}"]
    named.append("student.template_date=2026-11-30")
    card = card_of([*TUNED, *named], tmp_path)[1]
    assert "template_arguments:\n  enable_thinking: false\ntemplate_date: '2026-11-30'\n" in card
    assert "template_" not in card_of(TUNED, tmp_path)[1]
