"""Synthesis: prompts to answers to sequence shards, one prompt shard at a time, each shard once.

`synthesis/<recipe>/<prompt shard digest>.json` is written last and maps a finished prompt shard to
its sequence shard; a prompt is new when no record of its recipe knows its content. The dataset of a
run is then built from the records.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline import storage
from pipeline.config_training import StudentConfig
from pipeline.datasets import write_sequences
from pipeline.errors import ConfigError
from pipeline.filters import reason_to_drop
from pipeline.fingerprint import digest_bytes, digest_ids, sequence_id
from pipeline.layout import Layout
from pipeline.records import Prompt, TokenSequence
from pipeline.synthesis_index import new_prompts
from teachers.engine import GeneratedAnswer
from teachers.vocabulary import answer_text, load_tokenizer, prompt_ids, tokenizer_hash

if TYPE_CHECKING:
    from teachers.vllm_teacher import VllmTeacher


@dataclass(frozen=True)
class SynthesisTask:
    """One prompt shard of one domain, answered by one generator under one recipe."""

    layout: Layout
    generator: str
    recipe_digest: str
    prompts: tuple[Prompt, ...]
    student: StudentConfig
    sampling: dict[str, Any]
    samples_per_prompt: int
    max_sequence_tokens: int | None
    checker: str | None
    seed: int

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def label(self) -> str:
        return f"prompt shard {self._digest[:8]} ({self.prompts[0].domain}, {len(self)} prompts)"

    @property
    def _digest(self) -> str:
        return digest_ids(prompt.digest for prompt in self.prompts)

    @property
    def _record(self) -> str:
        return storage.join(
            self.layout.synthesis_folder(self.recipe_digest), f"{self._digest}.json"
        )

    def halves(self) -> tuple[SynthesisTask, SynthesisTask]:
        """The same work in two shards."""
        middle = len(self) // 2
        return replace(self, prompts=self.prompts[:middle]), replace(
            self, prompts=self.prompts[middle:]
        )

    def quarantine(self, error: str) -> None:
        """Records that the prompts cannot be answered, so that they are not asked again."""
        self._write_record(
            None, Counter(quarantined=len(self)), 0, 0.0, {p.prompt_id: error for p in self.prompts}
        )

    async def run(self, teacher: VllmTeacher) -> dict[str, Any]:
        """Asks the teacher for all answers and writes the shard.

        Returns:
            The record: counts by reason, generated tokens, seconds.
        """
        started = time.monotonic()
        tokenizer, tokenizer_digest = student_tokenizer(self.student)
        rendered = [(prompt, prompt_ids(tokenizer, prompt)) for prompt in self.prompts]
        room = self._most_tokens - self.sampling["max_tokens"]
        fitting = [(prompt, ids) for prompt, ids in rendered if len(ids) <= room]
        answers = await asyncio.gather(
            *(
                teacher.generate(
                    ids, self.sampling | {"seed": self._seed(prompt)}, self.samples_per_prompt
                )
                for prompt, ids in fitting
            )
        )
        too_long = (len(rendered) - len(fitting)) * self.samples_per_prompt
        counts = Counter(answers=too_long, too_long=too_long)
        kept: dict[str, TokenSequence] = {}
        for (prompt, ids), samples in zip(fitting, answers, strict=True):
            for sample in samples:
                counts["answers"] += 1
                _keep(self, prompt, ids, sample, tokenizer, tokenizer_digest, kept, counts)
        shard = (
            write_sequences(self.layout, self.prompts[0].domain, list(kept.values()))
            if kept
            else None
        )
        num_tokens = sum(len(sample.token_ids) for samples in answers for sample in samples)
        return self._write_record(shard, counts, num_tokens, time.monotonic() - started, {})

    def from_references(self) -> dict[str, Any]:
        """Takes the given references as answers; needs no engine.

        Raises:
            ConfigError: a prompt has no reference.
        """
        started = time.monotonic()
        tokenizer, tokenizer_digest = student_tokenizer(self.student)
        counts: Counter[str] = Counter()
        kept: dict[str, TokenSequence] = {}
        for prompt in self.prompts:
            if prompt.reference is None:
                raise ConfigError(
                    f"generator `dataset` needs references; prompt {prompt.prompt_id} has none"
                )
            counts["answers"] += 1
            answer = tokenizer(_separated(prompt), add_special_tokens=False)["input_ids"] + [
                tokenizer.eos_token_id
            ]
            sequence = _sequence(
                prompt,
                prompt_ids(tokenizer, prompt),
                answer,
                self.generator,
                "dataset",
                tokenizer_digest,
            )
            reason = None
            if len(sequence.input_ids) > self._most_tokens:
                reason = "too_long"
            elif sequence.sequence_id in kept:
                reason = "duplicate"
            else:
                kept[sequence.sequence_id] = sequence
            counts[reason or "kept"] += 1
        shard = (
            write_sequences(self.layout, self.prompts[0].domain, list(kept.values()))
            if kept
            else None
        )
        return self._write_record(shard, counts, 0, time.monotonic() - started, {})

    @property
    def _most_tokens(self) -> float:
        return math.inf if self.max_sequence_tokens is None else self.max_sequence_tokens

    def _seed(self, prompt: Prompt) -> int:
        return (
            int(digest_bytes(prompt.prompt_id.encode(), self.generator.encode())[:7], 16)
            + self.seed
        )

    def _write_record(
        self,
        shard: str | None,
        counts: Counter[str],
        num_tokens: int,
        seconds: float,
        errors: dict[str, str],
    ) -> dict[str, Any]:
        record = {
            "generator": self.generator,
            "domain": self.prompts[0].domain,
            "prompts": {prompt.prompt_id: prompt.digest for prompt in self.prompts},
            "shard": shard,
            "counts": {name: count for name, count in counts.items() if count},
            "generated_tokens": num_tokens,
            "seconds": seconds,
            "errors": errors,
        }
        storage.write_json(self._record, record)
        return record


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


@functools.lru_cache(maxsize=1)
def _load(
    model: str, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedTokenizerBase, str]:
    config = StudentConfig(
        model=model,
        revision=revision,
        trust_remote_code=trust_remote_code,
        initialization="pretrained",
    )
    tokenizer = load_tokenizer(config)
    return tokenizer, tokenizer_hash(tokenizer)


def student_tokenizer(student: StudentConfig) -> tuple[PreTrainedTokenizerBase, str]:
    """The student's tokenizer and its hash, loaded once per process."""
    return _load(student.model, student.revision, student.trust_remote_code)


def _separated(prompt: Prompt) -> str:
    """An answer continues raw text after a space; a chat template ends its prompt itself."""
    separate = prompt.text is not None and not prompt.text[-1].isspace()
    return f" {prompt.reference}" if separate else str(prompt.reference)


def _sequence(
    prompt: Prompt,
    asked: list[int],
    answer: list[int],
    generator: str,
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
        generators=(generator,),
        finish_reason=finish_reason,
    )


def _keep(
    task: SynthesisTask,
    prompt: Prompt,
    asked: list[int],
    sample: GeneratedAnswer,
    tokenizer: PreTrainedTokenizerBase,
    tokenizer_digest: str,
    kept: dict[str, TokenSequence],
    counts: Counter[str],
) -> None:
    text = answer_text(tokenizer, sample.token_ids)
    reason = reason_to_drop(text, sample.finish_reason, prompt.reference, task.checker)
    sequence = _sequence(
        prompt, asked, sample.token_ids, task.generator, sample.finish_reason, tokenizer_digest
    )
    if reason is None and sequence.sequence_id in kept:
        reason = "duplicate"
    counts[reason or "kept"] += 1
    if reason is None:
        kept[sequence.sequence_id] = sequence
