"""Stage 2: has prompts and answers written, takes given answers, and writes the dataset."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from jobs.bookkeeping.stage_records import StageRecord, synthesis_key
from jobs.stages.filter import filter_answers
from jobs.stages.teacher_pools import engine_seconds, teacher_work
from pipeline.config.run import Config
from pipeline.config.synthesis import Answer, Answering, Complete, GivenAnswers, Recipe, Writing
from pipeline.errors import TeacherError
from pipeline.filters.run import filter_summary
from pipeline.records import Prompt
from pipeline.run.identities import sampling_of
from pipeline.run.prepared_run import Run
from pipeline.sequences import write_dataset
from pipeline.synthesis.index import answer_counts, build_dataset
from pipeline.synthesis.outcomes import often_cut, outcome_summary
from pipeline.synthesis.prompts import load_prompts
from pipeline.synthesis.steps import StepWork, all_prompts, walk
from teachers.pool.pool import run_pools
from teachers.tasks.answer import AnswerTask, plan_answers
from teachers.tasks.rewrite import RewriteTask, plan_rewrites
from teachers.tokenizing import prompt_ids, student_tokenizer


def synthesize(run: Run) -> StageRecord:
    """Lets teachers write the missing prompts and answers of all recipes, and writes the dataset.

    Raises:
        TeacherError: no answer of the train or hold-out split was kept, or an engine cannot run.
        FilterError: the filters leave nothing of the train or hold-out split.
    """
    layout = run.layout
    prompts = load_prompts(layout, run.prepared.prompts_digest)
    seconds: Counter[str] = Counter()
    steps: list[StepWork] = []
    for work in walk(run.config, layout, run.prepared.synthesis_digests, prompts):
        steps.append(work)
        if isinstance(work.step.recipe, Writing):
            seconds.update(_write_prompts(run, work))
    answering = [work for work in steps if not isinstance(work.step.recipe, Writing)]
    seconds.update(_write_answers(run, answering))
    answered = [(work.digest, work.prompts) for work in answering]
    entries = build_dataset(layout, all_prompts(steps, prompts), answered)
    counts = {w.step.label: answer_counts(layout, w.digest, w.prompts) for w in steps}
    lines = [outcome_summary(counts), *often_cut(counts, _max_tokens(run.config, steps))]
    _check_splits({entry.split for entry in entries}, "; ".join(lines))
    filtered = filter_answers(run, entries)
    seconds.update(filtered.engine_seconds)
    if filtered.counts:
        lines.insert(1, f"dropped by filters: {filter_summary(filtered.counts)}")
    return StageRecord(
        key=synthesis_key(run),
        dataset=write_dataset(layout, filtered.entries),
        counts=counts,
        filters=filtered.counts,
        engine_seconds=dict(seconds),
        summary="; ".join([f"{len(filtered.entries)} sequences", *lines]),
    )


def _max_tokens(config: Config, steps: Sequence[StepWork]) -> dict[str, tuple[str, int]]:
    """Key and value of the `max_tokens` of each step in which a model writes, by its label."""
    settings = {}
    for step in (work.step for work in steps):
        if isinstance(step.recipe, GivenAnswers):
            continue
        place = f"synthesis.recipes.{config.synthesis.recipes.index(step.recipe)}.sampling"
        own = isinstance(step.recipe, Answering) and step.recipe.sampling_of.get(step.author, {})
        key = f"{place}_of.{step.author}" if own and "max_tokens" in own else place
        settings[step.label] = (
            f"{key}.max_tokens",
            sampling_of(step.recipe, step.author)["max_tokens"],
        )
    return settings


def _write_prompts(run: Run, work: StepWork) -> dict[str, float]:
    """Has one teacher write the prompts that it has not written yet; returns engine seconds."""
    config, name, recipe = run.config, work.step.author, work.step.recipe
    template = RewriteTask(
        layout=run.layout,
        author=name,
        identity_digest=work.digest,
        requests=(),
        student=config.student,
        sampling=sampling_of(recipe, name),
        seed=config.seed,
        max_model_len=config.teachers[name].max_model_len,
    )
    tasks = plan_rewrites(template, work.requests, config.synthesis.prompts_per_shard)
    requests = [request.prompt for task in tasks for request in task.requests]
    need = _longest(config, requests) + template.sampling["max_tokens"]
    pool = teacher_work(
        run,
        name,
        tasks,
        min_model_len=min(need, template.max_model_len or need),
        num_logprobs=0,
        unit="requests",
    )
    started = time.monotonic()
    return engine_seconds(config, run_pools([pool]), time.monotonic() - started)


def _write_answers(run: Run, steps: Sequence[StepWork]) -> dict[str, float]:
    """Has all authors answer at once what they have not answered yet; returns engine seconds."""
    config = run.config
    tasks: dict[str, list[AnswerTask]] = {}
    for work in steps:
        new_tasks = plan_answers(
            _template(run, work), work.prompts, config.synthesis.prompts_per_shard
        )
        if isinstance(work.step.recipe, GivenAnswers):
            for task in new_tasks:
                task.from_references()
        else:
            tasks.setdefault(work.step.author, []).extend(new_tasks)
    started = time.monotonic()
    reports = run_pools(
        [
            teacher_work(
                run,
                name,
                own_tasks,
                min_model_len=_longest_answer(config, own_tasks),
                num_logprobs=0,
                unit="prompts",
            )
            for name, own_tasks in tasks.items()
        ]
    )
    return engine_seconds(config, reports, time.monotonic() - started)


def _template(run: Run, work: StepWork) -> AnswerTask:
    """The task of a step, without prompts."""
    config, recipe = run.config, work.step.recipe
    return AnswerTask(
        layout=run.layout,
        author=work.step.author,
        identity_digest=work.digest,
        prompts=(),
        student=config.student,
        sampling=sampling_of(recipe, work.step.author),
        samples_per_prompt=recipe.samples_per_prompt if isinstance(recipe, Answering) else 1,
        max_sequence_tokens=config.synthesis.max_sequence_tokens,
        seed=config.seed,
        ends=run.prepared.answer_ends,
        finish_reasons=("stop", "length") if _may_be_cut(recipe) else ("stop",),
    )


def _may_be_cut(recipe: Recipe) -> bool:
    return isinstance(recipe, Complete) or (isinstance(recipe, Answer) and recipe.keep_truncated)


def _longest_answer(config: Config, tasks: Sequence[AnswerTask]) -> int:
    """Tokens that an engine must hold for the longest prompt and its answer.

    A sequence above `synthesis.max_sequence_tokens` is dropped, so it does not count.
    """
    needs = [_longest(config, task.prompts) + task.sampling["max_tokens"] for task in tasks]
    need = max(needs, default=1)
    return min(need, config.synthesis.max_sequence_tokens or need)


def _longest(config: Config, prompts: Sequence[Prompt]) -> int:
    tokenizer, _ = student_tokenizer(config.student.files)
    return max((len(prompt_ids(tokenizer, prompt)) for prompt in prompts), default=1)


def _check_splits(splits: set[str], outcome: str) -> None:
    for split in ("train", "holdout"):
        if split not in splits:
            raise TeacherError(
                f"no answer of the {split} split was kept ({outcome}): change the sampling, the "
                "length bound or the prompts, and run again: finished answers are kept"
            )
