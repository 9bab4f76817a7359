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
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from pipeline import storage
from pipeline.config_training import StudentConfig
from pipeline.datasets import write_sequences
from pipeline.errors import ConfigError
from pipeline.fingerprint import digest_bytes, digest_ids, sequence_id
from pipeline.layout import Layout
from pipeline.records import Prompt, TokenSequence
from pipeline.rejected import Rejected, write_rejected
from pipeline.synthesis_index import new_prompts
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
            _Outcome(counts=Counter(quarantined=len(self))),
            0.0,
            {p.prompt_id: error for p in self.prompts},
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
        outcome = _Outcome()
        for prompt, ids in rendered:
            if len(ids) > room:
                detail = f"a prompt of {len(ids)} tokens leaves no room for an answer"
                self._reject(outcome, prompt, "too_long", detail, None, self.samples_per_prompt)
        for (prompt, ids), samples in zip(fitting, answers, strict=True):
            for sample in samples:
                outcome.generated_tokens += len(sample.token_ids)
                text = answer_text(tokenizer, sample.token_ids)
                if sample.finish_reason != "stop":
                    detail = f"{sample.finish_reason} after {len(sample.token_ids)} tokens"
                    self._reject(outcome, prompt, "truncated", detail, text)
                elif not text.strip():
                    self._reject(outcome, prompt, "empty", "", text)
                else:
                    answer, reason = sample.token_ids, sample.finish_reason
                    outcome.keep(self._sequence(prompt, ids, answer, reason, tokenizer_digest))
        return self._write_record(outcome, time.monotonic() - started, {})

    def from_references(self) -> dict[str, Any]:
        """Takes the given references as answers; needs no engine.

        Raises:
            ConfigError: a prompt has no reference.
        """
        started = time.monotonic()
        tokenizer, tokenizer_digest = student_tokenizer(self.student)
        outcome = _Outcome()
        for prompt in self.prompts:
            if prompt.reference is None:
                raise ConfigError(
                    f"generator `dataset` needs references; prompt {prompt.prompt_id} has none"
                )
            answer = tokenizer(_separated(prompt), add_special_tokens=False)["input_ids"] + [
                tokenizer.eos_token_id
            ]
            asked = prompt_ids(tokenizer, prompt)
            sequence = self._sequence(prompt, asked, answer, "dataset", tokenizer_digest)
            if len(sequence.input_ids) > self._most_tokens:
                detail = f"{len(sequence.input_ids)} tokens"
                self._reject(outcome, prompt, "too_long", detail, prompt.reference)
            else:
                outcome.keep(sequence)
        return self._write_record(outcome, time.monotonic() - started, {})

    def _reject(
        self,
        outcome: _Outcome,
        prompt: Prompt,
        reason: str,
        detail: str,
        answer: str | None,
        num_answers: int = 1,
    ) -> None:
        """Counts an answer that becomes no sequence, and keeps it for people to look at."""
        outcome.counts.update({"answers": num_answers, reason: num_answers})
        outcome.rejected.append(
            Rejected(
                reason=reason,
                detail=detail,
                prompt_id=prompt.prompt_id,
                domain=prompt.domain,
                split=prompt.split,
                generators=(self.generator,),
                prompt=prompt.words,
                answer=answer,
            )
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
            generators=(self.generator,),
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

    def _write_record(
        self, outcome: _Outcome, seconds: float, errors: dict[str, str]
    ) -> dict[str, Any]:
        """Writes shard and rejected answers, then the record that names them."""
        kept, domain = list(outcome.kept.values()), self.prompts[0].domain
        if outcome.rejected:
            path = self.layout.rejected(self.recipe_digest, self._digest)
            write_rejected(path, outcome.rejected)
        record = {
            "generator": self.generator,
            "domain": domain,
            "prompts": {prompt.prompt_id: prompt.digest for prompt in self.prompts},
            "shard": write_sequences(self.layout, domain, kept) if kept else None,
            "samples": {name: count for name, count in outcome.samples.items() if count > 1},
            "counts": {name: count for name, count in outcome.counts.items() if count},
            "generated_tokens": outcome.generated_tokens,
            "seconds": seconds,
            "errors": errors,
        }
        storage.write_json(self._record, record)
        return record


@dataclass
class _Outcome:
    """What has become of a prompt shard's answers so far.

    Attributes:
        samples: how often each sequence was written.
    """

    kept: dict[str, TokenSequence] = field(default_factory=dict)
    samples: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    rejected: list[Rejected] = field(default_factory=list)
    generated_tokens: int = 0

    def keep(self, sequence: TokenSequence) -> None:
        """Counts an answer; equal ones are one sequence."""
        known = sequence.sequence_id in self.kept
        self.counts.update({"answers": 1, "duplicate" if known else "kept": 1})
        self.samples[sequence.sequence_id] += 1
        self.kept.setdefault(sequence.sequence_id, sequence)


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
