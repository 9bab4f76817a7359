"""Hold-out answers of one model: share of correct answers, speed, latency of a single answer.

The exported student is one of the models: it is served and asked exactly like its teachers.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from pipeline import storage
from pipeline.checkers.answer_checkers import SafeChecker
from pipeline.config.student import StudentConfig
from pipeline.errors import ConfigError, TeacherError
from pipeline.final_text import final_text
from pipeline.records import Prompt, TokenSequence
from teachers.protocol import GeneratedAnswer, ScoringRequest, Teacher
from teachers.tokenizing import answer_text, begins_in_thought, prompt_ids, student_tokenizer

WARM_UP_PROMPTS = 4
PROMPTS_ASKED_ALONE = 8
# Speed is measured with answers of one length, so that a model gains nothing by long or short ones.
SPEED_TOKENS = 64
SPEED_ROUNDS = 3
MEASURED_SECONDS = 3.0


@dataclass(frozen=True)
class AnsweredPrompts:
    """Results of one model on the hold-out prompts.

    Attributes:
        correct: share of answers that pass the checker, by domain; None if no answer could be
            checked.
        num_checked: number of answers that were checked, by domain.
        checker_errors: number of answers at which the checker raised an error; they count as wrong.
        num_too_long: number of prompts that leave no room for an answer and were not asked.
        tokens_per_second: generated tokens per second with all prompts in flight and answers of
            equal length, median of at least 3 rounds.
        tokens_per_second_range: tokens per second of the slowest and of the fastest round.
        latency_seconds: median time of one such answer, asked alone.
        gold_logprobs: log-probabilities of the tokens of the sequences in `compared`, by sequence
            id.
        num_unread: number of answers whose reference the checker cannot read; they are unchecked.
    """

    correct: dict[str, float | None]
    num_checked: dict[str, int]
    checker_errors: int
    num_too_long: int
    tokens_per_second: float
    tokens_per_second_range: tuple[float, float]
    latency_seconds: float
    gold_logprobs: dict[str, list[float]]
    num_unread: int = 0


@dataclass(frozen=True)
class _Answer:
    """One answer before it is checked.

    Attributes:
        text: the whole answer, with its thoughts.
        begins_in_thought: whether the prompt ends with an opened thought.
        is_cut: whether the answer ends at `max_tokens`.
    """

    prompt: Prompt
    text: str
    begins_in_thought: bool
    is_cut: bool

    @property
    def final(self) -> str:
        """Text behind the thoughts."""
        return final_text(self.text, self.begins_in_thought)


@dataclass(frozen=True)
class HoldoutTask:
    """All hold-out prompts of one model in one task, so that its speed is measured undisturbed.

    Attributes:
        model: name of the model.
        prompts: hold-out prompts.
        student: student, whose tokenizer is used.
        sampling: parameters of vLLM's `SamplingParams`.
        max_sequence_tokens: largest number of tokens of prompt and answer; None for no limit.
        checker: name of the checker; None if answers are not checked.
        answers_path: file for the answers, as JSON lines.
        compared: sequences whose log-probabilities are compared with the trained weights.
        seed: seed of the run.
        returns_text: whether the model is a text API, which keeps thoughts to itself.
    """

    model: str
    prompts: tuple[Prompt, ...]
    student: StudentConfig
    sampling: dict[str, Any]
    max_sequence_tokens: int | None
    checker: str | None
    answers_path: str
    compared: tuple[TokenSequence, ...] = ()
    seed: int = 0
    returns_text: bool = False

    def __len__(self) -> int:
        return 1

    @property
    def label(self) -> str:
        return f"hold-out answers of {self.model}"

    def halves(self) -> tuple[Self, Self]:
        raise AssertionError("one item cannot be halved")

    def quarantine(self, error: str) -> None:
        """Stops the evaluation, which needs the answers of every model.

        Raises:
            TeacherError: always.
        """
        raise TeacherError(f"{self.model} cannot answer the hold-out prompts: {error}")

    async def run(self, teacher: Teacher) -> AnsweredPrompts:
        """Asks all prompts, measures the speed, then checks the answers and writes them.

        Raises:
            ConfigError: no prompt leaves room for an answer.
        """
        tokenizer, _ = student_tokenizer(self.student.files)
        room = (self.max_sequence_tokens or math.inf) - self.sampling["max_tokens"]
        rendered = [(prompt, prompt_ids(tokenizer, prompt)) for prompt in self.prompts]
        prompts = [prompt for prompt, ids in rendered if len(ids) <= room]
        prompts_ids = [ids for _, ids in rendered if len(ids) <= room]
        if not prompts_ids:
            raise ConfigError(
                f"every hold-out prompt is longer than {room} tokens, which is what evaluation."
                f"sampling.max_tokens ({self.sampling['max_tokens']}) leaves of synthesis."
                f"max_sequence_tokens ({self.max_sequence_tokens}): lower the first or raise the "
                "second"
            )
        answers = await asyncio.gather(*(self._ask(teacher, ids) for ids in prompts_ids))
        rates, latency = await self._speed(teacher, prompts_ids)
        given = [
            _Answer(
                prompt=prompt,
                text=answer_text(tokenizer, answer.token_ids),
                begins_in_thought=not self.returns_text and begins_in_thought(tokenizer, ids),
                is_cut=answer.finish_reason == "length",
            )
            for prompt, ids, answer in zip(prompts, prompts_ids, answers, strict=True)
        ]
        verdicts, checker = self._check(given)
        correct, num_checked = _shares(prompts, verdicts)
        return AnsweredPrompts(
            correct=correct,
            num_checked=num_checked,
            checker_errors=checker.num_errors if checker is not None else 0,
            num_too_long=len(rendered) - len(prompts_ids),
            tokens_per_second=statistics.median(rates),
            tokens_per_second_range=(min(rates), max(rates)),
            latency_seconds=latency,
            gold_logprobs={s.sequence_id: await _gold(teacher, s) for s in self.compared},
            num_unread=checker.num_unread if checker is not None else 0,
        )

    async def _speed(
        self, teacher: Teacher, prompts_ids: list[list[int]]
    ) -> tuple[list[float], float]:
        """Tokens per second of each round of all prompts, and median seconds of a single answer."""
        length = min(SPEED_TOKENS, self.sampling["max_tokens"])
        exactly = {"max_tokens": length, "min_tokens": length, "ignore_eos": True, "stop": None}
        warm_up = prompts_ids[:WARM_UP_PROMPTS]
        await asyncio.gather(*(self._ask(teacher, ids, exactly) for ids in warm_up))
        step = max(1, len(prompts_ids) // PROMPTS_ASKED_ALONE)
        spread = prompts_ids[::step][:PROMPTS_ASKED_ALONE]
        alone = [(await self._ask(teacher, ids, exactly)).seconds for ids in spread]
        rates: list[float] = []
        begun = time.monotonic()
        while len(rates) < SPEED_ROUNDS or time.monotonic() - begun < MEASURED_SECONDS:
            started = time.monotonic()
            requests = (self._ask(teacher, ids, exactly) for ids in prompts_ids)
            answers = await asyncio.gather(*requests)
            num_tokens = sum(len(answer.token_ids) for answer in answers)
            rates.append(num_tokens / (time.monotonic() - started))
        return rates, statistics.median(alone)

    async def _ask(
        self, teacher: Teacher, ids: list[int], changes: dict[str, Any] | None = None
    ) -> GeneratedAnswer:
        sampling = self.sampling | {"seed": self.seed} | (changes or {})
        return (await teacher.generate(ids, sampling, 1))[0]

    def _check(self, answers: Sequence[_Answer]) -> tuple[list[bool | None], SafeChecker | None]:
        """Checks every answer and writes it whole, with its verdict and whether it was cut.

        Returns:
            The verdicts, None if there is no checker or no reference that it can read; and the
            checker with its counts.
        """
        checker = None if self.checker is None else SafeChecker(self.checker)
        verdicts: list[bool | None] = []
        lines: list[str] = []
        for answer in answers:
            prompt, verdict, problem = answer.prompt, None, None
            if checker is not None and prompt.reference is not None:
                verdict, problem = checker.judge(answer.final, prompt.reference)
            verdicts.append(verdict)
            line = {
                "prompt_id": prompt.prompt_id,
                "domain": prompt.domain,
                "answer": answer.text,
                "reference": prompt.reference,
                "correct": verdict,
            }
            line |= {"cut": True} if answer.is_cut else {}
            line |= {"thoughts_cut": True} if answer.text.strip() and not answer.final else {}
            lines.append(json.dumps(line if problem is None else line | {"error": problem}))
        storage.write_bytes(self.answers_path, ("\n".join(lines) + "\n").encode())
        return verdicts, checker


def _shares(
    prompts: list[Prompt], verdicts: list[bool | None]
) -> tuple[dict[str, float | None], dict[str, int]]:
    checked, right = Counter[str](), Counter[str]()
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        checked[prompt.domain] += verdict is not None
        right[prompt.domain] += verdict is True
    return {d: right[d] / n if n else None for d, n in checked.items()}, dict(checked)


async def _gold(teacher: Teacher, sequence: TokenSequence) -> list[float]:
    positions = sequence.position_indices
    first = int(positions[0])
    captured = await teacher.score(ScoringRequest(sequence.input_ids.tolist(), first))
    return captured.gold_logprobs[positions - first].tolist()
