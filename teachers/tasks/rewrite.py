"""New prompts: a teacher rewrites prompts, one shard of requests at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.config.student import StudentConfig
from pipeline.layout import Layout
from pipeline.synthesis.answered_shards import (
    AnsweredShard,
    ShardReplies,
    shard_digest,
    write_answered_shard,
)
from pipeline.synthesis.index import new_prompts
from pipeline.synthesis.rewriting import PromptRequest, new_prompt, read_reply
from teachers.concurrency import ask_each
from teachers.protocol import GeneratedAnswer, ItemsFailedError, Teacher
from teachers.tasks.items import halves_of, prompt_seed
from teachers.tokenizing import answer_text, prompt_ids, student_tokenizer


@dataclass(frozen=True)
class RewriteTask:
    """Requests of one domain to one author under one recipe.

    Attributes:
        layout: layout of the run.
        author: name of the teacher that writes.
        identity_digest: digest of the recipe's identity, which names its folder.
        requests: the requests.
        student: student, whose tokenizer is used.
        sampling: parameters of vLLM's `SamplingParams`.
        seed: seed of the run.
        max_model_len: number of tokens that the engine holds, if the config names it; longer
            requests are counted as `too_long` and asked as soon as an engine holds them.
    """

    layout: Layout
    author: str
    identity_digest: str
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

    def halves(self) -> tuple[RewriteTask, RewriteTask]:
        """The same work in two shards."""
        first, second = halves_of(self.requests)
        return replace(self, requests=first), replace(self, requests=second)

    def quarantine(self, error: str) -> None:
        """Notes that the requests cannot be answered, so that they are not asked again."""
        errors = {request.prompt.prompt_id: error for request in self.requests}
        counts = {name: Counter(quarantined=1) for name in errors}
        self._write(ShardReplies(counts=counts, errors=errors))

    async def run(self, teacher: Teacher) -> AnsweredShard:
        """Asks the teacher and writes the prompts that its replies hold.

        Returns:
            The answered shard.

        Raises:
            ItemsFailedError: some requests failed; the answered shard holds the others.
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
                outcome.reject(request.source, self.author, "too_long", detail, request_id=name)
        replied, failed = await ask_each(fitting, lambda item: self._ask(teacher, *item))
        for (request, _), (answer,) in replied:
            name, author = request.prompt.prompt_id, self.author
            outcome.count(name, generated_tokens=len(answer.token_ids))
            text = answer_text(tokenizer, answer.token_ids)
            reply = read_reply(request, text, answer.finish_reason)
            if reply.reason is not None:
                source, detail = request.source, reply.detail
                outcome.reject(source, author, reply.reason, detail, text, request_id=name)
                continue
            outcome.count(name, answers=1, kept=1, prompts_written=len(reply.texts))
            outcome.written[name] = [new_prompt(request.source, text) for text in reply.texts]
        lacking = {request.prompt.prompt_id for (request, _), _ in failed}
        done = tuple(r for r in self.requests if r.prompt.prompt_id not in lacking)
        answered_shard = replace(self, requests=done)._write(outcome) if done else None
        if failed:
            alone = [(replace(self, requests=(request,)), error) for (request, _), error in failed]
            raise ItemsFailedError(answered_shard, alone)
        assert answered_shard is not None, "a task has requests"
        return answered_shard

    async def _ask(
        self, teacher: Teacher, request: PromptRequest, ids: list[int]
    ) -> list[GeneratedAnswer]:
        seed = prompt_seed(request.prompt.prompt_id, self.author, self.seed)
        sampling = self.sampling | {"seed": seed}
        return await teacher.generate(ids, sampling, 1, request.prompt)

    def _write(self, outcome: ShardReplies) -> AnsweredShard:
        prompts = [request.prompt for request in self.requests]
        return write_answered_shard(
            self.layout, self.identity_digest, self.author, prompts, outcome
        )


def plan_rewrites(
    template: RewriteTask, requests: Sequence[PromptRequest], requests_per_shard: int
) -> list[RewriteTask]:
    """Tasks for the requests that are new to the recipe, or have room only now, grouped by domain.

    Args:
        template: task whose requests are replaced.
        requests: all requests of the recipe.
        requests_per_shard: largest number of requests of a task.
    """
    prompts = [request.prompt for request in requests]
    new_ones = new_prompts(
        template.layout, template.identity_digest, prompts, template.max_model_len
    )
    new = {prompt.prompt_id for prompt in new_ones}
    groups: dict[str, list[PromptRequest]] = {}
    for request in requests:
        if request.prompt.prompt_id in new:
            groups.setdefault(request.prompt.domain, []).append(request)
    return [
        replace(template, requests=tuple(group[start : start + requests_per_shard]))
        for group in groups.values()
        for start in range(0, len(group), requests_per_shard)
    ]
