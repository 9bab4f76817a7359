"""Answers: one prompt shard becomes one sequence shard.

`synthesis/<identity digest>/<prompt shard digest>.json`, the answered shard, is written last and
maps the prompts to their sequence shard. A prompt is new if no answered shard of its identity knows
its content. The dataset of a run is built from the answered shards.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.config.student import StudentConfig
from pipeline.fingerprint import sequence_id
from pipeline.layout import Layout
from pipeline.records import AnswerEnds, Prompt, TokenSequence
from pipeline.synthesis.answered_shards import (
    AnsweredShard,
    ShardReplies,
    shard_digest,
    write_answered_shard,
)
from pipeline.synthesis.index import new_prompts
from teachers.concurrency import ask_each
from teachers.protocol import GeneratedAnswer, ItemsFailedError, Teacher
from teachers.tasks.items import halves_of, prompt_seed
from teachers.tokenizing import (
    answer_ids,
    answer_text,
    prompt_ids,
    student_tokenizer,
    vocabulary_size,
)


@dataclass(frozen=True)
class AnswerTask:
    """One prompt shard of one domain, to be answered by one author under one recipe.

    Attributes:
        layout: layout of the run.
        author: name of the teacher that answers, `student`, or `dataset` for given references.
        identity_digest: digest of the recipe's identity, which names its folder.
        prompts: the prompts.
        student: student, whose tokenizer is used.
        sampling: parameters of vLLM's `SamplingParams`.
        samples_per_prompt: number of answers to each prompt.
        max_sequence_tokens: largest number of tokens of prompt and answer; None for no limit.
        seed: seed of the run.
        ends: tokens with which answers end.
        finish_reasons: proper ends of an answer; answers with others are dropped as `truncated`.
    """

    layout: Layout
    author: str
    identity_digest: str
    prompts: tuple[Prompt, ...]
    student: StudentConfig
    sampling: dict[str, Any]
    samples_per_prompt: int
    max_sequence_tokens: int | None
    seed: int
    ends: AnswerEnds
    finish_reasons: tuple[str, ...] = ("stop",)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def label(self) -> str:
        name = shard_digest(self.prompts)[:8]
        return f"prompt shard {name} ({self.prompts[0].domain}, {len(self)} prompts)"

    def halves(self) -> tuple[AnswerTask, AnswerTask]:
        """The same work in two shards."""
        first, second = halves_of(self.prompts)
        return replace(self, prompts=first), replace(self, prompts=second)

    def quarantine(self, error: str) -> None:
        """Notes that the prompts cannot be answered, so that they are not asked again."""
        self._write(
            ShardReplies(
                counts={prompt.prompt_id: Counter(quarantined=1) for prompt in self.prompts},
                errors={prompt.prompt_id: error for prompt in self.prompts},
            )
        )

    async def run(self, teacher: Teacher) -> AnsweredShard:
        """Asks the teacher for all answers and writes the shard.

        Returns:
            The answered shard.

        Raises:
            ItemsFailedError: some prompts failed; the answered shard holds the others.
        """
        tokenizer, tokenizer_digest = student_tokenizer(self.student.files)
        rendered = [(prompt, prompt_ids(tokenizer, prompt)) for prompt in self.prompts]
        room = self._most_tokens - self.sampling["max_tokens"]
        fitting = [(prompt, ids) for prompt, ids in rendered if len(ids) <= room]
        answered, failed = await ask_each(fitting, lambda item: self._ask(teacher, *item))
        outcome, author, known = ShardReplies(), self.author, vocabulary_size(tokenizer)
        for prompt, ids in rendered:
            if len(ids) > room:
                detail = f"a prompt of {len(ids)} tokens leaves no room for an answer"
                number = self.samples_per_prompt
                outcome.reject(prompt, author, "too_long", detail, num_answers=number)
        for (prompt, ids), samples in answered:
            for sample in samples:
                outcome.count(prompt.prompt_id, generated_tokens=len(sample.token_ids))
                if sample.had_thoughts:
                    outcome.count(prompt.prompt_id, thoughts=1)
                answer = self._ended(sample, prompt)
                text = answer_text(tokenizer, answer)
                reason = sample.finish_reason
                unknown = [i for i in answer if i >= known]
                if unknown:
                    detail = f"{len(unknown)} ids that no tokenizer has, the first is {unknown[0]}"
                    outcome.reject(prompt, author, "malformed", detail, text)
                elif reason == "content_filter":
                    detail = f"withheld after {len(sample.token_ids)} tokens"
                    outcome.reject(prompt, author, "withheld", detail, text)
                elif reason not in (*self.finish_reasons, "unknown"):
                    detail = f"{reason} after {len(sample.token_ids)} tokens"
                    outcome.reject(prompt, author, "truncated", detail, text)
                elif not text.strip():
                    outcome.reject(prompt, author, "empty", "", text)
                elif len(ids) + len(sample.token_ids) > self._most_tokens:
                    # An endpoint counts `max_tokens` of its own.
                    detail = f"{len(ids) + len(sample.token_ids)} tokens"
                    outcome.reject(prompt, author, "too_long", detail, text)
                else:
                    outcome.keep(self._sequence(prompt, ids, answer, reason, tokenizer_digest))
                    if reason == "unknown":
                        outcome.count(prompt.prompt_id, unknown_end=1)
        lacking = {prompt.prompt_id for (prompt, _), _ in failed}
        done = tuple(prompt for prompt in self.prompts if prompt.prompt_id not in lacking)
        answered_shard = replace(self, prompts=done)._write(outcome) if done else None
        if failed:
            alone = [(replace(self, prompts=(prompt,)), error) for (prompt, _), error in failed]
            raise ItemsFailedError(answered_shard, alone)
        assert answered_shard is not None, "a task has prompts"
        return answered_shard

    async def _ask(self, teacher: Teacher, prompt: Prompt, ids: list[int]) -> list[GeneratedAnswer]:
        seed = prompt_seed(prompt.prompt_id, self.author, self.seed)
        sampling = self.sampling | {"seed": seed}
        return await teacher.generate(ids, sampling, self.samples_per_prompt, prompt)

    def _ended(self, sample: GeneratedAnswer, prompt: Prompt) -> list[int]:
        """Tokens of an answer. If the author ended it by an end token of its own, the run's end
        stands in its place; a stop token that the recipe names is kept.
        """
        named = self.sampling.get("stop_token_ids") or ()
        if sample.finish_reason != "stop" or any(i in named for i in sample.token_ids[-1:]):
            return sample.token_ids
        return [*sample.token_ids[:-1], self.ends.after(prompt)]

    def from_references(self) -> AnsweredShard:
        """Takes the given references as answers, without a teacher; returns the answered shard."""
        tokenizer, tokenizer_digest = student_tokenizer(self.student.files)
        outcome = ShardReplies()
        for prompt in self.prompts:
            assert prompt.reference is not None, "prompts without a reference are not asked"
            ids = prompt_ids(tokenizer, prompt)
            written = answer_ids(tokenizer, prompt, ids, _separated(prompt))
            answer = [*written, self.ends.after(prompt)]
            sequence = self._sequence(prompt, ids, answer, "dataset", tokenizer_digest)
            if len(sequence.input_ids) > self._most_tokens:
                detail = f"{len(sequence.input_ids)} tokens"
                outcome.reject(prompt, self.author, "too_long", detail, prompt.reference)
            else:
                outcome.keep(sequence)
        return self._write(outcome)

    def _write(self, outcome: ShardReplies) -> AnsweredShard:
        return write_answered_shard(
            self.layout, self.identity_digest, self.author, self.prompts, outcome
        )

    def _sequence(
        self,
        prompt: Prompt,
        prompt_token_ids: list[int],
        answer: list[int],
        finish_reason: str,
        tokenizer_digest: str,
    ) -> TokenSequence:
        input_ids = np.array(prompt_token_ids + answer, dtype=np.int32)
        spans = ((len(prompt_token_ids), len(input_ids)),)
        return TokenSequence(
            sequence_id=sequence_id(input_ids, spans, tokenizer_digest),
            input_ids=input_ids,
            loss_spans=spans,
            prompt_id=prompt.prompt_id,
            domain=prompt.domain,
            authors=(self.author,),
            finish_reason=finish_reason,
        )

    @property
    def _most_tokens(self) -> float:
        return math.inf if self.max_sequence_tokens is None else self.max_sequence_tokens


def plan_answers(
    template: AnswerTask, prompts: Iterable[Prompt], prompts_per_shard: int
) -> list[AnswerTask]:
    """Tasks for the prompts that no answered shard of the recipe knows, grouped by domain.

    Args:
        template: task whose prompts are replaced.
        prompts: all prompts that the recipe answers.
        prompts_per_shard: largest number of prompts of a task.
    """
    groups: dict[str, list[Prompt]] = {}
    for prompt in new_prompts(template.layout, template.identity_digest, prompts):
        groups.setdefault(prompt.domain, []).append(prompt)
    return [
        replace(template, prompts=tuple(group[start : start + prompts_per_shard]))
        for group in groups.values()
        for start in range(0, len(group), prompts_per_shard)
    ]


def _separated(prompt: Prompt) -> str:
    """Reference as it follows its prompt: raw text continues after a space, while a chat template
    ends the prompt itself.
    """
    separate = prompt.text is not None and not prompt.text[-1].isspace()
    return f" {prompt.reference}" if separate else str(prompt.reference)
