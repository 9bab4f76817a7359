"""The synthesize stage: written prompts, answers of teachers or given ones, and the dataset."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.bookkeeping.stage_records import synthesis_key
from jobs.stages.filter import filter_answers
from jobs.stages.teacher_pools import engine_seconds, teacher_work
from pipeline.config.run import Config
from pipeline.config.synthesis import Answer, Answering, Complete, GivenAnswers, Recipe, Writing
from pipeline.errors import TeacherError
from pipeline.filters.run import summary
from pipeline.layout import Layout
from pipeline.records import Prompt
from pipeline.run.identities import sampling_of
from pipeline.run.preparation import Prepared
from pipeline.sequences import write_dataset
from pipeline.synthesis.index import answer_counts, build_dataset
from pipeline.synthesis.prompts import load_prompts
from pipeline.synthesis.steps import Work, all_prompts, walk
from teachers.pool.pool import run_pools
from teachers.tasks.answer import SynthesisTask, plan_synthesis
from teachers.tasks.rewrite import WritingTask, plan_writing
from teachers.tokenizing import prompt_ids, student_tokenizer


def synthesize(config: Config, layout: Layout, prepared: Prepared) -> dict[str, Any]:
    """Has the recipes' missing prompts and answers written, and writes the run's dataset.

    Raises:
        TeacherError: no answer of the train or hold-out split was kept, or an engine cannot run.
        FilterError: the filters leave nothing of one of them.
    """
    prompts = load_prompts(layout, prepared.prompts)
    took: Counter[str] = Counter()
    steps: list[Work] = []
    for work in walk(config, layout, prepared.synthesis_digests, prompts):
        steps.append(work)
        if isinstance(work.step.recipe, Writing):
            took.update(_write_prompts(config, layout, prepared, work))
    answering = [work for work in steps if not isinstance(work.step.recipe, Writing)]
    took.update(_write_answers(config, layout, prepared, answering))
    asked = [(work.digest, work.prompts) for work in answering]
    entries = build_dataset(layout, all_prompts(steps, prompts), asked)
    counts = {w.step.label: answer_counts(layout, w.digest, w.prompts) for w in steps}
    _check_splits({entry.split for entry in entries}, counts)
    written = ", ".join(
        f"{name} {count['kept']}/{count['answers']}" for name, count in counts.items()
    )
    filtered = filter_answers(config, layout, prepared, entries)
    took.update(filtered.engine_seconds)
    dropped = f"; dropped by filters: {summary(filtered.counts)}" if filtered.counts else ""
    return {
        "key": synthesis_key(config, prepared),
        "dataset": write_dataset(layout, filtered.entries),
        "counts": counts,
        "filters": filtered.counts,
        "engine_seconds": dict(took),
        "summary": f"{len(filtered.entries)} sequences (answers kept: {written}{dropped})",
    }


def _write_prompts(
    config: Config, layout: Layout, prepared: Prepared, work: Work
) -> dict[str, float]:
    """Has one teacher write the prompts that it has not written yet; returns engine seconds."""
    name, recipe = work.step.generator, work.step.recipe
    template = WritingTask(
        layout=layout,
        generator=name,
        recipe_digest=work.digest,
        requests=(),
        student=config.student,
        sampling=sampling_of(recipe, name),
        seed=config.seed,
        max_model_len=config.teachers[name].max_model_len,
    )
    tasks = plan_writing(template, work.requests, config.synthesis.prompts_per_shard)
    asked = [request.asked for task in tasks for request in task.requests]
    need = _longest(config, asked) + template.sampling["max_tokens"]
    job = teacher_work(
        config,
        name,
        prepared,
        tasks,
        min_model_len=min(need, template.max_model_len or need),
        num_logprobs=0,
        unit="requests",
    )
    started = time.monotonic()
    return engine_seconds(config, run_pools([job]), time.monotonic() - started)


def _write_answers(
    config: Config, layout: Layout, prepared: Prepared, steps: Sequence[Work]
) -> dict[str, float]:
    """Has all generators answer at once what they have not answered yet; returns engine seconds."""
    tasks: dict[str, list[SynthesisTask]] = {}
    for work in steps:
        found = plan_synthesis(
            _template(config, layout, work), work.prompts, config.synthesis.prompts_per_shard
        )
        if isinstance(work.step.recipe, GivenAnswers):
            for task in found:
                task.from_references()
        else:
            tasks.setdefault(work.step.generator, []).extend(found)
    started = time.monotonic()
    reports = run_pools(
        [
            teacher_work(
                config,
                name,
                prepared,
                found,
                min_model_len=_longest_answer(config, found),
                num_logprobs=0,
                unit="prompts",
            )
            for name, found in tasks.items()
        ]
    )
    return engine_seconds(config, reports, time.monotonic() - started)


def _template(config: Config, layout: Layout, work: Work) -> SynthesisTask:
    recipe = work.step.recipe
    return SynthesisTask(
        layout=layout,
        generator=work.step.generator,
        recipe_digest=work.digest,
        prompts=(),
        student=config.student,
        sampling=sampling_of(recipe, work.step.generator),
        samples_per_prompt=recipe.samples_per_prompt if isinstance(recipe, Answering) else 1,
        max_sequence_tokens=config.synthesis.max_sequence_tokens,
        seed=config.seed,
        finish_reasons=("stop", "length") if _may_be_cut(recipe) else ("stop",),
    )


def _may_be_cut(recipe: Recipe) -> bool:
    return isinstance(recipe, Complete) or (isinstance(recipe, Answer) and recipe.keep_truncated)


def _longest_answer(config: Config, tasks: Sequence[SynthesisTask]) -> int:
    """Tokens that an engine must hold for every prompt that is not too long, with its answer."""
    needs = [_longest(config, task.prompts) + task.sampling["max_tokens"] for task in tasks]
    need = max(needs, default=1)
    return min(need, config.synthesis.max_sequence_tokens or need)


def _longest(config: Config, prompts: Sequence[Prompt]) -> int:
    tokenizer, _ = student_tokenizer(config.student.files)
    return max((len(prompt_ids(tokenizer, prompt)) for prompt in prompts), default=1)


def _check_splits(splits: set[str], counts: Mapping[str, dict[str, int]]) -> None:
    for split in ("train", "holdout"):
        if split not in splits:
            raise TeacherError(
                f"no answer of the {split} split was kept; what became of the answers: "
                f"{json.dumps(counts)}. Check the sampling (max_tokens), the length bound and "
                "the references; what was finished is kept"
            )
