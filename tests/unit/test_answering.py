"""Answers of one model to hold-out prompts, from a scripted teacher."""

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline.config_training import StudentConfig
from pipeline.errors import ConfigError
from pipeline.records import Prompt
from teachers.answering import AnsweringTask
from teachers.engine import GeneratedAnswer
from tests.support.tokenizers_for_tests import save_tokenizer


def test_prompts_that_all_leave_no_room_are_refused_with_what_to_change(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "student")
    task = AnsweringTask(
        model="t",
        prompts=(Prompt("p", "d", "holdout", text="1+1="),),
        student=StudentConfig(model=str(tmp_path / "student"), initialization="random"),
        sampling={"max_tokens": 5},
        max_sequence_tokens=8,
        checker=None,
        answers_path=str(tmp_path / "answers.jsonl"),
    )
    with pytest.raises(ConfigError, match=r"longer than 3 tokens.*max_sequence_tokens"):
        asyncio.run(task.run(cast(Any, None)))


class AnsweringTeacher:
    async def generate(
        self, ids: list[int], sampling: dict[str, Any], num_samples: int
    ) -> list[GeneratedAnswer]:
        return [GeneratedAnswer([ids[0], 1], "stop", 0.01)] * num_samples


def test_prompts_that_are_too_long_are_counted_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teachers.answering.MEASURED_SECONDS", 0.01)
    save_tokenizer(tmp_path / "student")
    prompts = [Prompt(t, "d", "holdout", text=t, reference="1") for t in ("1+", "2+", "1+1+1+1+")]
    task = AnsweringTask(
        model="t",
        prompts=tuple(prompts),
        student=StudentConfig(model=str(tmp_path / "student"), initialization="random"),
        sampling={"max_tokens": 5},
        max_sequence_tokens=8,
        checker="exact",
        answers_path=str(tmp_path / "answers.jsonl"),
    )
    answered = asyncio.run(task.run(cast(Any, AnsweringTeacher())))
    assert answered.num_too_long == 1
    assert answered.num_checked == {"d": 2} and answered.correct == {"d": 0.5}
