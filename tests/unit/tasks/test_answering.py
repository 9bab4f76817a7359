"""Answers of one model to hold-out prompts, from a scripted teacher."""

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import pytest
from transformers import PreTrainedTokenizerBase

from jobs.stages.serving import answers_line
from pipeline.config.student import StudentConfig
from pipeline.errors import ConfigError
from pipeline.records import Prompt
from teachers.protocol import GeneratedAnswer
from teachers.tasks.holdout import HoldoutTask
from teachers.tokenizing import answer_text, begins_in_thought
from tests.support.tokenizers_for_tests import save_byte_tokenizer, save_tokenizer


def test_prompts_that_all_leave_no_room_are_refused_with_what_to_change(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "student")
    task = HoldoutTask(
        model="t",
        prompts=(Prompt("p", "d", "holdout", text="1+1="),),
        student=StudentConfig(model=str(tmp_path / "student"), initialization="random"),
        sampling={"max_tokens": 5},
        max_sequence_tokens=8,
        checker=None,
        answers_path=str(tmp_path / "answers.jsonl"),
    )
    with pytest.raises(
        ConfigError, match=r"longer than 3 tokens.*max_tokens \(5\).*max_sequence_tokens \(8\)"
    ):
        asyncio.run(task.run(cast(Any, None)))


class AnsweringTeacher:
    async def generate(
        self, ids: list[int], sampling: dict[str, Any], num_samples: int
    ) -> list[GeneratedAnswer]:
        return [GeneratedAnswer([ids[0], 1], "stop", 0.01)] * num_samples


def test_prompts_that_are_too_long_are_counted_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teachers.tasks.holdout.MEASURED_SECONDS", 0.01)
    save_tokenizer(tmp_path / "student")
    prompts = [Prompt(t, "d", "holdout", text=t, reference="1") for t in ("1+", "2+", "1+1+1+1+")]
    task = HoldoutTask(
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


class ThinkingTeacher:
    """Thinks before it answers, as far as the length of the prompt lets it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    async def generate(
        self, ids: list[int], sampling: dict[str, Any], num_samples: int
    ) -> list[GeneratedAnswer]:
        words = self.tokenizer.decode(ids)
        text = {"a": "<think>1?</think>1", "b": "<think>1", "c": "1"}[words.strip("<think>")[0]]
        answer = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [GeneratedAnswer(answer, "stop", 0.01)] * num_samples


@pytest.mark.parametrize("returns_text", [False, True])
def test_the_final_text_is_checked_and_the_whole_answer_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returns_text: bool
) -> None:
    monkeypatch.setattr("teachers.tasks.holdout.MEASURED_SECONDS", 0.01)
    tokenizer = save_byte_tokenizer(tmp_path / "student")
    prompts = [
        Prompt(text, "d", "holdout", text=text, reference=reference)
        for text, reference in (("a", "1"), ("b", "1"), ("c", "1"), ("c<think>", "1"), ("cc", "no"))
    ]
    task = HoldoutTask(
        model="t",
        prompts=tuple(prompts),
        student=StudentConfig(model=str(tmp_path / "student"), initialization="random"),
        sampling={"max_tokens": 30},
        max_sequence_tokens=None,
        checker="number",
        answers_path=str(tmp_path / "answers.jsonl"),
        returns_text=returns_text,
    )
    answered = asyncio.run(task.run(cast(Any, ThinkingTeacher(tokenizer))))
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in lines] == [True, False, True, returns_text, None]
    assert [line["answer"] for line in lines] == ["<think>1?</think>1", "<think>1", "1", "1", "1"]
    cut = [line["prompt_id"] for line in lines if line.get("thoughts_cut")]
    assert cut == (["b"] if returns_text else ["b", "c<think>"])
    assert answered.num_checked == {"d": 4} and answered.num_unread == 1
    assert "1 answers are unchecked, because" in answers_line({}, answered, "a.jsonl")


def test_tags_of_thoughts_stay_where_they_are_special_tokens(tmp_path: Path) -> None:
    tokenizer = save_byte_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]", "<user>"]})
    ids = tokenizer("<user>[THINK]1?[/THINK]2<user>", add_special_tokens=False)["input_ids"]
    assert answer_text(tokenizer, ids) == "[THINK]1?[/THINK]2"
    assert begins_in_thought(tokenizer, ids[:2]) and not begins_in_thought(tokenizer, ids)


RULES = """import numpy as np


def of_numpy(answer, reference):
    return np.True_ if answer == reference else np.False_


def of_numbers(answer, reference):
    return 1 if answer == reference else 0


def raising(answer, reference):
    return 1 / (answer == reference)
"""


@pytest.mark.parametrize("name", ["of_numpy", "of_numbers", "raising"])
def test_every_verdict_counts_as_yes_or_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Any true value counts, like in the filter, not only `True`."""
    monkeypatch.setattr("teachers.tasks.holdout.MEASURED_SECONDS", 0.01)
    (tmp_path / "odd_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(tmp_path)
    save_tokenizer(tmp_path / "student")
    prompts = [Prompt(t, "d", "holdout", text=t, reference="1") for t in ("1+", "2+", "3+")]
    task = HoldoutTask(
        model="t",
        prompts=(*prompts, Prompt("q", "d", "holdout", text="1")),
        student=StudentConfig(model=str(tmp_path / "student"), initialization="random"),
        sampling={"max_tokens": 5},
        max_sequence_tokens=None,
        checker=f"odd_rules.{name}",
        answers_path=str(tmp_path / "answers.jsonl"),
    )
    answered = asyncio.run(task.run(cast(Any, AnsweringTeacher())))
    assert answered.correct == {"d": 1 / 3} and answered.num_checked == {"d": 3}
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [line["correct"] for line in lines] == [True, False, False, None]
    problem = "ZeroDivisionError: division by zero" if name == "raising" else None
    assert [line.get("error") for line in lines] == [None, problem, problem, None]
    messages = [record.message for record in caplog.records]
    assert len(messages) == (1 if problem else 0)
    assert all("odd_rules.raising" in message for message in messages)
    assert answered.checker_errors == (2 if problem else 0)
    line = answers_line({}, answered, "a.jsonl")
    said = "raised an error at 2 answers, which count as wrong: a.jsonl"
    assert (said in line) == bool(problem)
