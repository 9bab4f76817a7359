"""The filters of a run: they need text and, behind scoring, cached rows, and make a new dataset."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jobs.stages.teacher_pools import engine_seconds, teacher_work
from pipeline import storage
from pipeline.cache.index import load_index
from pipeline.config.filters import Filter, Judge, scoring_teacher
from pipeline.config.run import Config
from pipeline.filters.answer_checkers import SafeChecker
from pipeline.filters.candidates import Candidate, Evidence
from pipeline.filters.run import run_filters
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout, Layout
from pipeline.records import DatasetEntry, Prompt
from pipeline.run.identities import judging_identity
from pipeline.run.preparation import Prepared
from pipeline.sequences import read_sequences, write_dataset
from pipeline.synthesis.index import sample_counts
from pipeline.synthesis.prompts import load_prompts
from pipeline.synthesis.rewriting import fill, rubric_of
from pipeline.synthesis.steps import all_prompts, walk
from teachers.pool.pool import run_pools
from teachers.tasks.judge import JudgingTask, plan_judging, read_grades
from teachers.tokenizing import answer_text, prompt_ids, student_tokenizer


@dataclass(frozen=True)
class Filtered:
    """What filters left.

    Attributes:
        counts: of each filter.
        engine_seconds: of judges, by teacher.
    """

    entries: list[DatasetEntry]
    counts: list[dict[str, Any]] = field(default_factory=list)
    engine_seconds: Counter[str] = field(default_factory=Counter)


def filter_answers(
    config: Config, layout: Layout, prepared: Prepared, entries: Sequence[DatasetEntry]
) -> Filtered:
    """Runs the filters before scoring.

    Raises:
        FilterError: nothing of a split that is needed is left.
        TeacherError: a judge's engine cannot run.
    """
    rules = config.synthesis.filters_before_scoring
    digest = digest_json(prepared.filters_before_scoring)
    return _filtered(config, layout, prepared, entries, rules, digest)


def filter_scored(
    config: Config, layout: Layout, prepared: Prepared, entries: Sequence[DatasetEntry]
) -> Filtered:
    """Runs the filters that need cached rows, and those behind them.

    Raises:
        FilterError: nothing of a split that is needed is left.
        TeacherError: a judge's engine cannot run.
    """
    rules = config.synthesis.filters_after_scoring
    digest = digest_json([prepared.filters_after_scoring, prepared.scoring_recipes])
    return _filtered(config, layout, prepared, entries, rules, digest)


def mean_gold_logprobs(cache: CacheLayout, sequence_ids: AbstractSet[str]) -> dict[str, float]:
    """The mean log-probability in nats of each scored sequence's gold tokens.

    Raises:
        StorageError: a shard cannot be read.
    """
    means: dict[str, float] = {}
    for entry in load_index(cache):
        if sequence_ids.isdisjoint(entry.sequence_ids):
            continue
        table = storage.read_table(cache.shard(entry.digest), ["sequence_id", "gold_logprobs"])
        for row in table.to_pylist():
            gold_P = np.frombuffer(row["gold_logprobs"], "<f2").astype(np.float64)
            means.setdefault(row["sequence_id"], float(gold_P.mean()))
    return means


def _filtered(
    config: Config,
    layout: Layout,
    prepared: Prepared,
    entries: Sequence[DatasetEntry],
    rules: Sequence[Filter],
    digest: str,
) -> Filtered:
    if not rules:
        return Filtered(list(entries))
    given = load_prompts(layout, prepared.prompts)
    steps = list(walk(config, layout, prepared.synthesis_digests, given))
    prompts = {prompt.prompt_id: prompt for prompt in all_prompts(steps, given)}
    samples = sample_counts(layout, [(work.digest, work.prompts) for work in steps])
    caches, ids = prepared.caches(layout), {entry.sequence_id for entry in entries}
    teachers = {teacher for rule in rules if (teacher := scoring_teacher(rule)) is not None}
    name = config.prompts.checker
    checker = None if name is None else SafeChecker(name)
    took: Counter[str] = Counter()
    evidence = Evidence(
        checker=checker,
        holdout_prompts={
            f"hold-out prompt {p.prompt_id}": p.words
            for p in prompts.values()
            if p.split == "holdout"
        },
        gold_logprobs={name: mean_gold_logprobs(caches[name], ids) for name in sorted(teachers)},
        grade=lambda rule, asked: _grades(config, layout, prepared, prompts, took, rule, asked),
    )
    kept, counts = run_filters(
        layout,
        digest_json([write_dataset(layout, entries), digest]),
        rules,
        _candidates(config, layout, entries, prompts, samples),
        evidence,
    )
    if checker is not None:
        checker.log_count()
    return Filtered([candidate.entry for candidate in kept], counts, took)


def _candidates(
    config: Config,
    layout: Layout,
    entries: Sequence[DatasetEntry],
    prompts: Mapping[str, Prompt],
    samples: Mapping[tuple[str, str], int],
) -> list[Candidate]:
    """The sequences with their text, in the order of the entries; each shard is read once."""
    tokenizer, _ = student_tokenizer(config.student.files)
    candidates: dict[int, Candidate] = {}
    by_shard: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        by_shard.setdefault(entry.shard, []).append(i)
    for shard, places in by_shard.items():
        found = {s.sequence_id: s for s in read_sequences(storage.join(layout.root, shard))}
        for i in places:
            entry, prompt = entries[i], prompts[entries[i].prompt_id]
            gold_ids = found[entry.sequence_id].gold_ids
            candidates[i] = Candidate(
                entry=entry,
                prompt=prompt.words,
                answer=answer_text(tokenizer, gold_ids.tolist()),
                answer_ids=gold_ids,
                reference=prompt.reference,
                samples=samples[entry.prompt_id, entry.sequence_id],
            )
    return [candidates[i] for i in range(len(entries))]


def _grades(
    config: Config,
    layout: Layout,
    prepared: Prepared,
    prompts: Mapping[str, Prompt],
    took: Counter[str],
    rule: Judge,
    candidates: Sequence[Candidate],
) -> Mapping[str, int | None]:
    """The grades of all candidates; those without one are graded now, and `took` says how long.

    What is too long for the judge is left out, and asked once its engine holds it.
    """
    name = rule.teacher
    identity, teacher = prepared.identities[name], config.teachers[name]
    recipe = digest_json(judging_identity(config, rule, identity, prepared.tokenizer_hash))
    rubric = rubric_of(rule)
    questions = [
        (c.entry.sequence_id, _question(rubric, prompts[c.entry.prompt_id], c)) for c in candidates
    ]
    template = JudgingTask(layout, recipe, (), config.student, not teacher.returns_text)
    known = read_grades(layout, recipe)
    tokenizer, _ = student_tokenizer(config.student.files)
    needs = {
        sequence_id: len(prompt_ids(tokenizer, question)) + template.max_tokens
        for sequence_id, question in questions
        if sequence_id not in known
    }
    room = teacher.max_model_len or math.inf
    new = [(i, asked) for i, asked in questions if i in needs and needs[i] <= room]
    tasks = plan_judging(template, new, config.synthesis.prompts_per_shard)
    job = teacher_work(
        config,
        name,
        prepared,
        tasks,
        min_model_len=max((needs[i] for i, _ in new), default=1),
        num_logprobs=0,
        unit="answers",
    )
    started = time.monotonic()
    took.update(engine_seconds(config, run_pools([job]), time.monotonic() - started))
    return read_grades(layout, recipe)


def _question(rubric: str, prompt: Prompt, candidate: Candidate) -> Prompt:
    """The filled rubric, in chat form where the prompt has it."""
    text = fill(rubric, prompt=candidate.prompt, answer=candidate.answer)
    if prompt.messages is None:
        return replace(prompt, text=text)
    return replace(prompt, messages=({"role": "user", "content": text},))
