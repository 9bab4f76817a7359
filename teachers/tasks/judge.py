"""Grades: a teacher grades answers, one shard at a time.

The engine may write nothing but one digit, so every reply is a grade. A teacher that exchanges text
cannot be limited in this way; its replies that are no grade count as ungraded.

`judgements/<identity digest>/<digest of the sequence ids>.json` holds the grades of a shard; a
sequence is graded once under an identity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline import storage
from pipeline.config.student import StudentConfig
from pipeline.errors import ConfigError
from pipeline.final_text import final_text
from pipeline.fingerprint import digest_ids
from pipeline.layout import Layout
from pipeline.records import Prompt
from teachers.concurrency import ask_each
from teachers.protocol import ItemsFailedError, Teacher
from teachers.tasks.items import halves_of
from teachers.tokenizing import answer_text, prompt_ids, student_tokenizer

GRADES = (1, 2, 3, 4, 5)
"""Replies of a judge that grades; one that compares has others."""
FREE_REPLY_TOKENS = 32
_GRADE = re.compile(
    r"\W*(?:(?:grade|score|rating|answer)\W+)?([1-5])(?:\s*/\s*5)?\W*", re.IGNORECASE
)


@dataclass(frozen=True)
class JudgeTask:
    """One shard of answers for one judge.

    Attributes:
        layout: layout of the run.
        identity_digest: digest that names the folder of the grades.
        questions: sequence ids, each with the rubric into which prompt and answer are filled.
        student: student, whose tokenizer is used.
        is_bound: the judge can be kept from writing anything but a grade.
        grades: digits that the judge may reply.
    """

    layout: Layout
    identity_digest: str
    questions: tuple[tuple[str, Prompt], ...]
    student: StudentConfig
    is_bound: bool = True
    grades: tuple[int, ...] = GRADES

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens of a reply."""
        return 1 if self.is_bound else FREE_REPLY_TOKENS

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def label(self) -> str:
        return f"judgement shard ({len(self)} answers)"

    def halves(self) -> tuple[JudgeTask, JudgeTask]:
        """The same work in two shards."""
        first, second = halves_of(self.questions)
        return replace(self, questions=first), replace(self, questions=second)

    def quarantine(self, error: str) -> None:
        """Notes that the answers cannot be graded, so that they are not asked again."""
        self._write({name: None for name, _ in self.questions})

    async def run(self, teacher: Teacher) -> int:
        """Grades all answers.

        Returns:
            The number of replies.

        Raises:
            ConfigError: a grade is not a single token.
            ItemsFailedError: some answers could not be graded; the others are graded.
        """
        tokenizer, _ = student_tokenizer(self.student.files)
        sampling: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": 0.0}
        grade_of = grade_tokens(tokenizer, self.grades) if self.is_bound else {}
        if self.is_bound:
            sampling["allowed_token_ids"] = sorted(grade_of)
        grades: dict[str, int | None] = {}
        replied, failed = await ask_each(
            self.questions,
            lambda item: teacher.generate(prompt_ids(tokenizer, item[1]), sampling, 1, item[1]),
        )
        for (name, _), (reply,) in replied:
            if self.is_bound:
                grades[name] = grade_of[reply.token_ids[0]]
            else:
                grade = read_grade(answer_text(tokenizer, reply.token_ids))
                grades[name] = grade if grade in self.grades else None
        if grades:
            self._write(grades)
        if failed:
            alone = [(replace(self, questions=(item,)), error) for item, error in failed]
            raise ItemsFailedError(len(replied), alone)
        return len(replied)

    def _write(self, grades: dict[str, int | None]) -> None:
        name = digest_ids(grades)
        storage.write_json(self.layout.judgements(self.identity_digest, f"{name}.json"), grades)


def read_grade(reply: str) -> int | None:
    """Grade in the first line of a reply, such as `4`, `**4**`, `Grade: 4` or `4/5`; None if the
    line is anything else.
    """
    text = final_text(reply)
    match = _GRADE.fullmatch(text.partition("\n")[0])
    return int(match[1]) if match else None


def grade_tokens(
    tokenizer: PreTrainedTokenizerBase, grades: Sequence[int] = GRADES
) -> dict[int, int]:
    """Grades by the token id that stands for them.

    Raises:
        ConfigError: a digit is not a single token of the tokenizer.
    """
    grade_of: dict[int, int] = {}
    for grade in grades:
        ids = tokenizer(str(grade), add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ConfigError(
                f"a judge needs a tokenizer in which {str(grade)!r} is one token, but "
                f"{tokenizer.name_or_path} turns it into {ids}: leave the judge out, or judge by "
                "an endpoint with `api: openai`"
            )
        grade_of[ids[0]] = grade
    return grade_of


def read_grades(layout: Layout, identity_digest: str) -> dict[str, int | None]:
    """All grades under an identity by sequence id; None for an answer that could not be graded."""
    grades: dict[str, int | None] = {}
    folder = layout.judgements(identity_digest)
    for info in storage.list_files(folder, ".json"):
        grades |= storage.read_json(storage.join(folder, info.base_name))
    return grades


def forget_ungraded(layout: Layout, identity_digest: str) -> int:
    """Forgets the answers that could not be graded, so that they are asked again; returns their
    number.
    """
    num_forgotten = 0
    folder = layout.judgements(identity_digest)
    for info in storage.list_files(folder, ".json"):
        path = storage.join(folder, info.base_name)
        grades = storage.read_json(path)
        graded = {name: grade for name, grade in grades.items() if grade is not None}
        if len(graded) < len(grades):
            num_forgotten += len(grades) - len(graded)
            storage.write_json(path, graded)
    return num_forgotten


def plan_judging(
    template: JudgeTask, questions: Sequence[tuple[str, Prompt]], answers_per_shard: int
) -> list[JudgeTask]:
    """Tasks for the questions, in shards.

    Args:
        template: task whose questions are replaced.
        questions: sequence ids with their filled rubrics.
        answers_per_shard: largest number of answers of a task.
    """
    return [
        replace(template, questions=tuple(questions[start : start + answers_per_shard]))
        for start in range(0, len(questions), answers_per_shard)
    ]
