"""Grades: a teacher grades answers, one shard at a time.

The engine may write nothing but one digit, so every reply is a grade. A teacher that exchanges text
cannot be limited in this way; its replies that are no grade count as ungraded.

`judgements/<identity digest>/<digest of the sequence ids>.json` holds the grades of a shard; a
sequence is graded once under an identity.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from pipeline import storage
from pipeline.config.student import StudentConfig
from pipeline.errors import ConfigError
from pipeline.final_text import final_text
from pipeline.fingerprint import digest_ids, is_digest
from pipeline.layout import Layout
from pipeline.records import Prompt
from teachers.concurrency import ask_each
from teachers.protocol import ItemsFailedError, Teacher
from teachers.tasks.items import halves_of
from teachers.tokenizing import answer_text, prompt_ids, student_tokenizer

GRADES = (1, 2, 3, 4, 5)
"""Replies of a judge that grades; one that compares has others."""
FREE_REPLY_TOKENS = 32
# The scale of a grade, before which it stands or which stands alone: `4/5`, `4 out of 5`, `1 to 5`.
_SCALE = re.compile(
    r"(?<=\d)\s*(?:\(\s*out\s+of\s+5\s*\)|(?:/|out\s+of|of)\s*5(?:\.0)?\b(?![./]\d))"
    r"|\b(?:on\s+a\s+scale\s+)?(?:(?:of|from)\s+)?1\s*(?:-|\u2013|to)\s*5\b(?![./]\d)",
    re.IGNORECASE,
)
# No digit, fraction, range, choice or other scale goes on behind a grade.
_ALONE = (
    r"(?<![\d.,/-])([1-5])(?:\.0+)?(?![\d%]|\s*(?:[.,/]\d|[-\u2013/]\s*\d"
    r"|\(?\s*(?:or|to|and|out|of)\b))"
)
_NAMES = "grade|score|rating|mark|verdict|\u8bc4\u5206|\u5f97\u5206"
_WHOLE_LINE = re.compile(
    rf"\W*(?:(?:{_NAMES}|answer)\W+)?{_ALONE}\s*(?:stars?|points?|\u5206)?\W*", re.IGNORECASE
)
# `1.` begins a list, of which a short reply may have no more than the beginning.
_BEFORE_REASON = re.compile(rf"\W*(?!1[.)]\s){_ALONE}\s*[(:;,.\u2013\u2014-]\D*")
_NAMED = re.compile(
    rf"\b(?:{_NAMES})\W*(?:[:=]|\bis\b|\bof\b|\b(?:would|should)\s+be\b)\W*"
    rf"(?:an?\s+)?{_ALONE}",
    re.IGNORECASE,
)
_GIVEN = re.compile(
    r"(?:\bi(?:'d|'ll|\s+would|\s+will)?\s+(?:say|give|rate|grade|score|assign)"
    r"|\b(?:it|this|answer|response)\s+(?:deserves|earns))\b"
    r"(?:\s+(?:it|this|that|the|answer|response|an?|as|with|at|solid)\b)*"
    rf"\W*{_ALONE}(?!\s+points?\s+off)",
    re.IGNORECASE,
)
_LIST = re.compile(r"\W*1[.)]\s.*\n\W*2[.)]\s", re.DOTALL)
_END_OF_SENTENCE = re.compile(r"[.!?]\s|\n")
_NEGATION = re.compile(r"n't\b|\b(?:not|never|cannot|if|unless)\b", re.IGNORECASE)


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
        grades: Grades = {}
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
    """Grade that a reply says clearly; None if it says none, several, or one of another scale.

    A grade stands alone in the first line (`4`, `**4**`, `Grade: 4`, `4/5`) or before a reason
    (`4 (good)`), is named anywhere (`Reason: … Grade: 4`, `{"grade": 4}`, `The grade is 4.`), or
    given in a sentence (`I'd say 4 out of 5`).
    """
    text = unicodedata.normalize("NFKC", final_text(reply)).replace("\u2019", "'")
    text = re.sub(r"\\boxed\{(\d)\}", r"\1", text)
    text = _SCALE.sub("", re.sub(r"[*_`\[\]]", "", text)).strip()
    first = text.partition("\n")[0]
    if _LIST.match(text):
        return None
    if match := _WHOLE_LINE.fullmatch(first) or _BEFORE_REASON.fullmatch(first):
        named = {int(other[1]) for other in _NAMED.finditer(text)} | {int(match[1])}
        return None if len(named) > 1 else named.pop()
    for pattern in (_NAMED, _GIVEN):
        if grades := {int(match[1]) for match in pattern.finditer(text)}:
            sentences = (
                _END_OF_SENTENCE.split(text[: m.end()])[-1]
                + _END_OF_SENTENCE.split(text[m.end() :])[0]
                for m in pattern.finditer(text)
            )
            doubtful = len(grades) > 1 or any(map(_NEGATION.search, sentences))
            return None if doubtful else grades.pop()
    return None


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


Grades = dict[str, int | None]


def read_grades(layout: Layout, identity_digest: str) -> Grades:
    """All grades under an identity by sequence id; None for an answer that could not be graded."""
    grades: Grades = {}
    folder = layout.judgements(identity_digest)
    for info in storage.list_files(folder, ".json"):
        grades |= storage.read_json(storage.join(folder, info.base_name), Grades)
    return grades


def forget_ungraded(layout: Layout, identity_digest: str) -> int:
    """Forgets the answers that could not be graded, so that they are asked again; returns their
    number.
    """
    num_forgotten = 0
    folder = layout.judgements(identity_digest)
    for info in storage.list_files(folder, ".json"):
        path = storage.join(folder, info.base_name)
        if not is_digest(info.base_name.removesuffix(".json")):
            continue  # somebody else's file
        grades = storage.read_json(path, Grades)
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
