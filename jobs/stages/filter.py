"""The filters of stages 2 and 3: filters after scoring read cached rows, all others text alone."""

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
from pipeline.checkers.answer_checkers import SafeChecker
from pipeline.config.filters import Filter, Judge
from pipeline.config.synthesis import DATASET_AUTHOR
from pipeline.filters.candidates import Candidate, Evidence
from pipeline.filters.run import run_filters
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout
from pipeline.records import DatasetEntry, Prompt
from pipeline.run.identities import judging_identity
from pipeline.run.prepared_run import Run
from pipeline.sequences import read_sequences, write_dataset
from pipeline.synthesis.index import sample_counts
from pipeline.synthesis.prompts import load_prompts
from pipeline.synthesis.rewriting import fill, rubric_of
from pipeline.synthesis.steps import all_prompts, walk
from teachers.pool.pool import run_pools
from teachers.tasks.judge import GRADES, JudgeTask, plan_judging, read_grades
from teachers.tokenizing import answer_text, begins_in_thought, prompt_ids, student_tokenizer


@dataclass(frozen=True)
class Filtered:
    """The outcome of filters.

    Attributes:
        entries: entries that are left.
        counts: numbers of sequences that each filter has seen and dropped.
        engine_seconds: seconds of the judges' engines, by teacher.
    """

    entries: Sequence[DatasetEntry]
    counts: list[dict[str, Any]] = field(default_factory=list)
    engine_seconds: Counter[str] = field(default_factory=Counter)


def filter_answers(run: Run, entries: Sequence[DatasetEntry]) -> Filtered:
    """Runs the filters before scoring.

    Raises:
        FilterError: nothing of a domain in a split is left.
        TeacherError: a judge's engine cannot run.
    """
    digest = digest_json(run.prepared.filters_before_scoring)
    return _filtered(run, entries, run.config.synthesis.filters_before_scoring, digest)


def filter_scored(run: Run, entries: Sequence[DatasetEntry]) -> Filtered:
    """Runs the filters that need cached rows, and the filters that follow them.

    Raises:
        FilterError: nothing of a domain in a split is left.
        TeacherError: a judge's engine cannot run.
    """
    prepared = run.prepared
    digest = digest_json([prepared.filters_after_scoring, prepared.cache_identities])
    return _filtered(run, entries, run.config.synthesis.filters_after_scoring, digest)


def mean_gold_logprobs(cache: CacheLayout, sequence_ids: AbstractSet[str]) -> dict[str, float]:
    """Mean log-probability in nats of the gold tokens of each scored sequence.

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
    run: Run, entries: Sequence[DatasetEntry], rules: Sequence[Filter], digest: str
) -> Filtered:
    """Runs filters in order; `digest` identifies them, and names the folder of rejected answers."""
    if not rules:
        return Filtered(entries)
    layout = run.layout
    given = load_prompts(layout, run.prepared.prompts_digest)
    steps = list(walk(run.config, layout, run.prepared.synthesis_digests, given))
    prompts = {prompt.prompt_id: prompt for prompt in all_prompts(steps, given)}
    samples = sample_counts(layout, [(work.digest, work.prompts) for work in steps])
    caches, ids = run.cache_layouts(), {entry.sequence_id for entry in entries}
    teachers = {teacher for rule in rules if (teacher := rule.scoring_teacher) is not None}
    name = run.config.prompts.checker
    checker = None if name is None else SafeChecker(name)
    seconds: Counter[str] = Counter()
    held_out = {
        f"hold-out prompt {p.prompt_id}": p for p in prompts.values() if p.split == "holdout"
    }
    evidence = Evidence(
        checker=checker,
        holdout_prompts={name: prompt.words for name, prompt in held_out.items()},
        holdout_domains={name: prompt.domain for name, prompt in held_out.items()},
        wording=run.config.prompts.wording,
        gold_logprobs={name: mean_gold_logprobs(caches[name], ids) for name in sorted(teachers)},
        grade=lambda rule, candidates: _grades(run, prompts, seconds, rule, candidates),
    )
    kept, counts = run_filters(
        layout,
        digest_json([write_dataset(layout, entries), digest]),
        rules,
        _candidates(run, entries, prompts, samples),
        evidence,
    )
    if checker is not None:
        checker.log_count()
    return Filtered([candidate.entry for candidate in kept], counts, seconds)


def _candidates(
    run: Run,
    entries: Sequence[DatasetEntry],
    prompts: Mapping[str, Prompt],
    samples: Mapping[tuple[str, str], int],
) -> list[Candidate]:
    """Sequences with their text, in the order of the entries; each shard is read once."""
    tokenizer, _ = student_tokenizer(run.config.student.files)
    # A text API keeps thoughts to itself, and references have none, whatever the template opens.
    teachers = run.config.teachers.items()
    thoughtless = {DATASET_AUTHOR} | {name for name, each in teachers if each.returns_text}
    candidates: dict[int, Candidate] = {}
    by_shard: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        by_shard.setdefault(entry.shard, []).append(i)
    for shard, places in by_shard.items():
        members = {s.sequence_id: s for s in read_sequences(storage.join(run.layout.root, shard))}
        for i in places:
            entry, prompt = entries[i], prompts[entries[i].prompt_id]
            sequence = members[entry.sequence_id]
            gold_ids, start = sequence.gold_ids, sequence.loss_spans[0][0]
            candidates[i] = Candidate(
                entry=entry,
                prompt=prompt.words,
                answer=answer_text(tokenizer, gold_ids.tolist()),
                answer_ids=gold_ids,
                reference=prompt.reference,
                samples=samples[entry.prompt_id, entry.sequence_id],
                begins_in_thought=not thoughtless.issuperset(entry.authors)
                and begins_in_thought(tokenizer, sequence.input_ids[:start].tolist()),
            )
    return [candidates[i] for i in range(len(entries))]


def _grades(
    run: Run,
    prompts: Mapping[str, Prompt],
    seconds: Counter[str],
    rule: Judge,
    candidates: Sequence[Candidate],
) -> Mapping[str, int | None]:
    """Grades of candidates, by sequence id. Candidates without a grade are graded now.

    An answer that is too long for the judge gets no grade; it is asked again once the judge's
    engine holds it.

    Args:
        seconds: engine seconds by teacher, to which the time of the judge is added.
    """
    identity, tokenizer = run.prepared.identities[rule.teacher], run.prepared.tokenizer_hash
    digest = digest_json(judging_identity(run.config, rule, identity, tokenizer))
    rubric = rubric_of(rule)
    questions = []
    for candidate in candidates:
        text = fill(rubric, prompt=candidate.prompt, answer=candidate.answer)
        prompt = prompts[candidate.entry.prompt_id]
        questions.append((candidate.entry.sequence_id, as_question(prompt, text)))
    return ask_judge(run, rule.teacher, digest, questions, seconds)


def ask_judge(
    run: Run,
    name: str,
    digest: str,
    questions: Sequence[tuple[str, Prompt]],
    seconds: Counter[str],
    grades: tuple[int, ...] = GRADES,
) -> dict[str, int | None]:
    """All replies of a judge under an identity, by question; questions without one are asked now.

    Args:
        name: teacher that judges.
        digest: digest of the identity, which names the folder of the replies.
        questions: ids of the questions, with their words.
        seconds: engine seconds by teacher, to which the time of the judge is added.
        grades: digits that the judge may reply.
    """
    config, teacher = run.config, run.config.teachers[name]
    template = JudgeTask(run.layout, digest, (), config.student, not teacher.returns_text, grades)
    known = read_grades(run.layout, digest)
    tokenizer, _ = student_tokenizer(config.student.files)
    needs = {
        identifier: len(prompt_ids(tokenizer, question)) + template.max_tokens
        for identifier, question in questions
        if identifier not in known
    }
    most = teacher.max_model_len or math.inf
    new = [(i, question) for i, question in questions if i in needs and needs[i] <= most]
    tasks = plan_judging(template, new, config.synthesis.prompts_per_shard)
    pool = teacher_work(
        run,
        name,
        tasks,
        min_model_len=max((needs[i] for i, _ in new), default=1),
        num_logprobs=0,
        unit="answers",
    )
    started = time.monotonic()
    seconds.update(engine_seconds(config, run_pools([pool]), time.monotonic() - started))
    return read_grades(run.layout, digest)


def as_question(prompt: Prompt, text: str) -> Prompt:
    """A text about a prompt's answers: a chat message if the prompt is a chat, otherwise raw."""
    if prompt.messages is None:
        return replace(prompt, text=text)
    return replace(prompt, messages=({"role": "user", "content": text},))
