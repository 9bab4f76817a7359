"""A teacher grades answers: the engine may write nothing but one digit, so each grade parses. What
a teacher that exchanges text writes cannot be bounded; replies that are no grade give none.

`judgements/<recipe>/<digest of the sequence ids>.json` holds the grades of a shard; a sequence is
graded once under a recipe.
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
from pipeline.fingerprint import digest_ids
from pipeline.layout import Layout
from pipeline.records import Prompt
from teachers.pool.dispatch import ask_each
from teachers.protocol import ItemsFailedError, Teacher
from teachers.tokenizing import answer_text, prompt_ids, student_tokenizer

GRADES = (1, 2, 3, 4, 5)
FREE_REPLY_TOKENS = 32
_GRADE = re.compile(r"\W*(?:(?:grade|score|rating)\W+)?([1-5])(?:\s*/\s*5)?\W*", re.IGNORECASE)


@dataclass(frozen=True)
class JudgingTask:
    """A shard of answers for one judge.

    Attributes:
        questions: by sequence id, the rubric with prompt and answer filled in.
        is_bound: the judge can be bound to write nothing but a grade.
    """

    layout: Layout
    recipe_digest: str
    questions: tuple[tuple[str, Prompt], ...]
    student: StudentConfig
    is_bound: bool = True

    @property
    def max_tokens(self) -> int:
        """Of a reply."""
        return 1 if self.is_bound else FREE_REPLY_TOKENS

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def label(self) -> str:
        return f"judgement shard ({len(self)} answers)"

    def halves(self) -> tuple[JudgingTask, JudgingTask]:
        """The same work in two shards."""
        middle = len(self) // 2
        first, second = self.questions[:middle], self.questions[middle:]
        return replace(self, questions=first), replace(self, questions=second)

    def quarantine(self, error: str) -> None:
        """Records that the answers cannot be graded, so that nobody tries again."""
        self._record({name: None for name, _ in self.questions})

    async def run(self, teacher: Teacher) -> int:
        """Grades all answers.

        Returns:
            The number of replies.

        Raises:
            ConfigError: a grade is no single token.
            ItemsFailedError: some answers could not be graded; the others are.
        """
        tokenizer, _ = student_tokenizer(self.student.files)
        sampling: dict[str, Any] = {"max_tokens": self.max_tokens, "temperature": 0.0}
        grade_of = grade_tokens(tokenizer) if self.is_bound else {}
        if self.is_bound:
            sampling["allowed_token_ids"] = sorted(grade_of)
        grades: dict[str, int | None] = {}
        replied, failed = await ask_each(
            self.questions,
            lambda asked: teacher.generate(prompt_ids(tokenizer, asked[1]), sampling, 1, asked[1]),
        )
        for (name, _), (reply,) in replied:
            if self.is_bound:
                grades[name] = grade_of[reply.token_ids[0]]
            else:
                grades[name] = read_grade(answer_text(tokenizer, reply.token_ids))
        self._record(grades)
        if failed:
            alone = [(replace(self, questions=(asked,)), error) for asked, error in failed]
            raise ItemsFailedError(len(replied), alone)
        return len(replied)

    def _record(self, grades: dict[str, int | None]) -> None:
        name = digest_ids(grades)
        storage.write_json(self.layout.judgements(self.recipe_digest, f"{name}.json"), grades)


def read_grade(reply: str) -> int | None:
    """The grade that the first line of a reply is, such as `4`, `**4**`, `Grade: 4` or `4/5`; None
    of anything else.
    """
    said = reply.rpartition("</think>")[2].strip()
    found = _GRADE.fullmatch(said.partition("\n")[0])
    return int(found[1]) if found else None


def grade_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, int]:
    """The grade that each of the allowed tokens stands for.

    Raises:
        ConfigError: a digit is no single token of the tokenizer.
    """
    found: dict[int, int] = {}
    for grade in GRADES:
        ids = tokenizer(str(grade), add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ConfigError(
                f"the filter judge needs a tokenizer in which {str(grade)!r} is one token; "
                f"{tokenizer.name_or_path} makes {ids} of it"
            )
        found[ids[0]] = grade
    return found


def read_grades(layout: Layout, recipe_digest: str) -> dict[str, int | None]:
    """All grades under a recipe by sequence id; None of what could not be graded."""
    grades: dict[str, int | None] = {}
    folder = layout.judgements(recipe_digest)
    for info in storage.list_files(folder, ".json"):
        grades |= storage.read_json(storage.join(folder, info.base_name))
    return grades


def forget_ungraded(layout: Layout, recipe_digest: str) -> int:
    """Makes the answers new again that could not be graded; returns how many they are."""
    found = 0
    folder = layout.judgements(recipe_digest)
    for info in storage.list_files(folder, ".json"):
        path = storage.join(folder, info.base_name)
        grades = storage.read_json(path)
        graded = {name: grade for name, grade in grades.items() if grade is not None}
        if len(graded) < len(grades):
            found += len(grades) - len(graded)
            storage.write_json(path, graded)
    return found


def plan_judging(
    template: JudgingTask, questions: Sequence[tuple[str, Prompt]], answers_per_shard: int
) -> list[JudgingTask]:
    """The questions in shards.

    Args:
        template: a task whose questions are replaced.
    """
    return [
        replace(template, questions=tuple(questions[start : start + answers_per_shard]))
        for start in range(0, len(questions), answers_per_shard)
    ]
