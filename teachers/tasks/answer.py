"""Synthesis: prompts to answers to sequence shards, one prompt shard at a time, each shard once.

`synthesis/<recipe>/<prompt shard digest>.json` is written last and maps a finished prompt shard to
its sequence shard; a prompt is new when no record of its recipe knows its content. The dataset of a
run is then built from the records.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.config.student import StudentConfig
from pipeline.fingerprint import digest_bytes, sequence_id
from pipeline.layout import Layout
from pipeline.records import Prompt, TokenSequence
from pipeline.synthesis.answered_shards import (
    AnsweredShard,
    ShardReplies,
    shard_digest,
    write_answered_shard,
)
from pipeline.synthesis.index import new_prompts
from teachers.pool.dispatch import ask_each
from teachers.protocol import GeneratedAnswer, ItemsFailedError, Teacher
from teachers.tokenizing import answer_text, prompt_ids, student_tokenizer


@dataclass(frozen=True)
class SynthesisTask:
    """One prompt shard of one domain, answered by one generator under one recipe.

    Attributes:
        finish_reasons: how an answer may end; others are dropped as `truncated`.
    """

    layout: Layout
    generator: str
    recipe_digest: str
    prompts: tuple[Prompt, ...]
    student: StudentConfig
    sampling: dict[str, Any]
    samples_per_prompt: int
    max_sequence_tokens: int | None
    seed: int
    finish_reasons: tuple[str, ...] = ("stop",)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def label(self) -> str:
        name = shard_digest(self.prompts)[:8]
        return f"prompt shard {name} ({self.prompts[0].domain}, {len(self)} prompts)"

    def halves(self) -> tuple[SynthesisTask, SynthesisTask]:
        """The same work in two shards."""
        middle = len(self) // 2
        return replace(self, prompts=self.prompts[:middle]), replace(
            self, prompts=self.prompts[middle:]
        )

    def quarantine(self, error: str) -> None:
        """Records that the prompts cannot be answered, so that they are not asked again."""
        self._record(
            ShardReplies(
                counts={prompt.prompt_id: Counter(quarantined=1) for prompt in self.prompts},
                errors={prompt.prompt_id: error for prompt in self.prompts},
            )
        )

    async def run(self, teacher: Teacher) -> AnsweredShard:
        """Asks the teacher for all answers and writes the shard.

        Returns:
            The record.

        Raises:
            ItemsFailedError: some prompts failed; the shard is of the others.
        """
        tokenizer, tokenizer_digest = student_tokenizer(self.student.files)
        rendered = [(prompt, prompt_ids(tokenizer, prompt)) for prompt in self.prompts]
        room = self._most_tokens - self.sampling["max_tokens"]
        fitting = [(prompt, ids) for prompt, ids in rendered if len(ids) <= room]
        answered, failed = await ask_each(fitting, lambda each: self._ask(teacher, *each))
        outcome, who = ShardReplies(), self.generator
        for prompt, ids in rendered:
            if len(ids) > room:
                detail = f"a prompt of {len(ids)} tokens leaves no room for an answer"
                number = self.samples_per_prompt
                outcome.reject(prompt, who, "too_long", detail, num_answers=number)
        for (prompt, ids), samples in answered:
            for sample in samples:
                outcome.count(prompt.prompt_id, generated_tokens=len(sample.token_ids))
                text = answer_text(tokenizer, sample.token_ids)
                reason = sample.finish_reason
                if reason not in self.finish_reasons:
                    detail = f"{reason} after {len(sample.token_ids)} tokens"
                    outcome.reject(prompt, who, "truncated", detail, text)
                elif not text.strip():
                    outcome.reject(prompt, who, "empty", "", text)
                elif len(ids) + len(sample.token_ids) > self._most_tokens:
                    # An endpoint counts `max_tokens` of its own.
                    detail = f"{len(ids) + len(sample.token_ids)} tokens"
                    outcome.reject(prompt, who, "too_long", detail, text)
                else:
                    answer = sample.token_ids
                    outcome.keep(self._sequence(prompt, ids, answer, reason, tokenizer_digest))
        lacking = {prompt.prompt_id for (prompt, _), _ in failed}
        done = tuple(prompt for prompt in self.prompts if prompt.prompt_id not in lacking)
        record = replace(self, prompts=done)._record(outcome)
        if failed:
            alone = [(replace(self, prompts=(prompt,)), error) for (prompt, _), error in failed]
            raise ItemsFailedError(record, alone)
        return record

    async def _ask(self, teacher: Teacher, prompt: Prompt, ids: list[int]) -> list[GeneratedAnswer]:
        sampling = self.sampling | {"seed": self._seed(prompt)}
        return await teacher.generate(ids, sampling, self.samples_per_prompt, prompt)

    def from_references(self) -> AnsweredShard:
        """Takes the given references as answers; needs no engine."""
        tokenizer, tokenizer_digest = student_tokenizer(self.student.files)
        outcome = ShardReplies()
        for prompt in self.prompts:
            assert prompt.reference is not None, "prompts without one are not asked"
            answer = tokenizer(_separated(prompt), add_special_tokens=False)["input_ids"] + [
                tokenizer.eos_token_id
            ]
            asked = prompt_ids(tokenizer, prompt)
            sequence = self._sequence(prompt, asked, answer, "dataset", tokenizer_digest)
            if len(sequence.input_ids) > self._most_tokens:
                detail = f"{len(sequence.input_ids)} tokens"
                outcome.reject(prompt, self.generator, "too_long", detail, prompt.reference)
            else:
                outcome.keep(sequence)
        return self._record(outcome)

    def _record(self, outcome: ShardReplies) -> AnsweredShard:
        return write_answered_shard(
            self.layout, self.recipe_digest, self.generator, self.prompts, outcome
        )

    def _sequence(
        self,
        prompt: Prompt,
        asked: list[int],
        answer: list[int],
        finish_reason: str,
        tokenizer_digest: str,
    ) -> TokenSequence:
        input_ids = np.array(asked + answer, dtype=np.int32)
        spans = ((len(asked), len(input_ids)),)
        return TokenSequence(
            sequence_id=sequence_id(input_ids, spans, tokenizer_digest),
            input_ids=input_ids,
            loss_spans=spans,
            prompt_id=prompt.prompt_id,
            domain=prompt.domain,
            authors=(self.generator,),
            finish_reason=finish_reason,
        )

    @property
    def _most_tokens(self) -> float:
        return math.inf if self.max_sequence_tokens is None else self.max_sequence_tokens

    def _seed(self, prompt: Prompt) -> int:
        return (
            int(digest_bytes(prompt.prompt_id.encode(), self.generator.encode())[:7], 16)
            + self.seed
        )


def plan_synthesis(
    template: SynthesisTask, prompts: Iterable[Prompt], prompts_per_shard: int
) -> list[SynthesisTask]:
    """The work that no record of the recipe knows yet: new prompts, grouped by domain.

    Args:
        template: a task whose prompts are replaced.
    """
    groups: dict[str, list[Prompt]] = {}
    for prompt in new_prompts(template.layout, template.recipe_digest, prompts):
        groups.setdefault(prompt.domain, []).append(prompt)
    return [
        replace(template, prompts=tuple(group[start : start + prompts_per_shard]))
        for group in groups.values()
        for start in range(0, len(group), prompts_per_shard)
    ]


def _separated(prompt: Prompt) -> str:
    """An answer continues raw text after a space; a chat template ends its prompt itself."""
    separate = prompt.text is not None and not prompt.text[-1].isspace()
    return f" {prompt.reference}" if separate else str(prompt.reference)
