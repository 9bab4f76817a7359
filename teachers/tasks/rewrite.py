"""A teacher writes prompts: one shard of requests, asked, read and recorded."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.student import StudentConfig
from pipeline.fingerprint import digest_bytes
from pipeline.layout import Layout
from pipeline.synthesis.answered_shards import (
    AnsweredShard,
    ShardReplies,
    shard_digest,
    write_answered_shard,
)
from pipeline.synthesis.index import new_prompts
from pipeline.synthesis.rewriting import PromptRequest, new_prompt, read_reply
from teachers.pool.dispatch import ask_each
from teachers.protocol import GeneratedAnswer, ItemsFailedError, Teacher
from teachers.tokenizing import answer_text, prompt_ids, student_tokenizer


@dataclass(frozen=True)
class WritingTask:
    """Requests of one domain to one teacher under one recipe.

    Attributes:
        max_model_len: tokens that the engine holds, where the config says so; longer requests are
            counted as `too_long` and not asked before an engine holds them.
    """

    layout: Layout
    generator: str
    recipe_digest: str
    requests: tuple[PromptRequest, ...]
    student: StudentConfig
    sampling: dict[str, Any]
    seed: int
    max_model_len: int | None = None

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def label(self) -> str:
        name = shard_digest(request.prompt for request in self.requests)[:8]
        return f"request shard {name} ({len(self)} requests)"

    def halves(self) -> tuple[WritingTask, WritingTask]:
        """The same work in two shards."""
        middle = len(self) // 2
        first, second = self.requests[:middle], self.requests[middle:]
        return replace(self, requests=first), replace(self, requests=second)

    def quarantine(self, error: str) -> None:
        """Records that the requests cannot be answered, so that they are not asked again."""
        errors = {request.prompt.prompt_id: error for request in self.requests}
        counts = {name: Counter(quarantined=1) for name in errors}
        self._record(ShardReplies(counts=counts, errors=errors))

    async def run(self, teacher: Teacher) -> AnsweredShard:
        """Asks the teacher and records the prompts that it wrote.

        Returns:
            The record.

        Raises:
            ItemsFailedError: some requests failed; the record is of the others.
        """
        tokenizer, _ = student_tokenizer(self.student.files)
        room = (self.max_model_len or math.inf) - self.sampling["max_tokens"]
        outcome = ShardReplies()
        rendered = [(request, prompt_ids(tokenizer, request.prompt)) for request in self.requests]
        fitting = [(request, ids) for request, ids in rendered if len(ids) <= room]
        for request, ids in rendered:
            if len(ids) > room:
                outcome.needs[request.prompt.prompt_id] = len(ids) + self.sampling["max_tokens"]
                detail = f"a request of {len(ids)} tokens leaves no room for a reply"
                name = request.prompt.prompt_id
                outcome.reject(request.source, self.generator, "too_long", detail, request_id=name)
        replied, failed = await ask_each(fitting, lambda each: self._ask(teacher, *each))
        for (request, _), (answer,) in replied:
            name, who = request.prompt.prompt_id, self.generator
            outcome.count(name, generated_tokens=len(answer.token_ids))
            text = answer_text(tokenizer, answer.token_ids)
            reply = read_reply(request, text, answer.finish_reason)
            if reply.reason is not None:
                source, detail = request.source, reply.detail
                outcome.reject(source, who, reply.reason, detail, text, request_id=name)
                continue
            outcome.count(name, answers=1, kept=1, prompts_written=len(reply.texts))
            outcome.written[name] = [new_prompt(request.source, text) for text in reply.texts]
        lacking = {request.prompt.prompt_id for (request, _), _ in failed}
        done = tuple(each for each in self.requests if each.prompt.prompt_id not in lacking)
        record = replace(self, requests=done)._record(outcome)
        if failed:
            alone = [(replace(self, requests=(request,)), error) for (request, _), error in failed]
            raise ItemsFailedError(record, alone)
        return record

    async def _ask(
        self, teacher: Teacher, request: PromptRequest, ids: list[int]
    ) -> list[GeneratedAnswer]:
        sampling = self.sampling | {"seed": self._seed(request)}
        return await teacher.generate(ids, sampling, 1, request.prompt)

    def _seed(self, request: PromptRequest) -> int:
        name = request.prompt.prompt_id.encode()
        return int(digest_bytes(name, self.generator.encode())[:7], 16) + self.seed

    def _record(self, outcome: ShardReplies) -> AnsweredShard:
        asked = [request.prompt for request in self.requests]
        return write_answered_shard(self.layout, self.recipe_digest, self.generator, asked, outcome)


def plan_writing(
    template: WritingTask, requests: Sequence[PromptRequest], requests_per_shard: int
) -> list[WritingTask]:
    """The requests that are new to the recipe, or have room only now, grouped by domain.

    Args:
        template: a task whose requests are replaced.
    """
    asked = [request.prompt for request in requests]
    found = new_prompts(template.layout, template.recipe_digest, asked, template.max_model_len)
    new = {prompt.prompt_id for prompt in found}
    groups: dict[str, list[PromptRequest]] = {}
    for request in requests:
        if request.prompt.prompt_id in new:
            groups.setdefault(request.prompt.domain, []).append(request)
    return [
        replace(template, requests=tuple(group[start : start + requests_per_shard]))
        for group in groups.values()
        for start in range(0, len(group), requests_per_shard)
    ]
