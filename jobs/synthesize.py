"""The synthesize stage: answers of teachers, or given ones, and the dataset that follows."""

from __future__ import annotations

import json
import time
from typing import Any

from jobs.engines import engine_seconds, pool_job
from jobs.filtering import filter_answers
from jobs.plan import answers, synthesis_key
from pipeline.config import Config
from pipeline.datasets import write_dataset
from pipeline.errors import TeacherError
from pipeline.filters import summary
from pipeline.layout import Layout
from pipeline.prepared import Prepared
from pipeline.prompts import load_prompts
from pipeline.recipes import DATASET_GENERATOR
from pipeline.synthesis_index import answer_counts, build_dataset
from teachers.dispatch import PoolReport
from teachers.pool import run_pools
from teachers.synthesis import SynthesisTask, plan_synthesis


def synthesize(config: Config, layout: Layout, prepared: Prepared) -> dict[str, Any]:
    """Has every unanswered prompt answered and writes the run's dataset.

    Raises:
        TeacherError: no answer of the train or hold-out split was kept, or an engine cannot run.
        FilterError: the filters leave nothing of one of them.
    """
    prompts = load_prompts(layout, prepared.prompts)
    tasks = {
        generator: plan_synthesis(
            _template(config, layout, generator, digest),
            [prompt for prompt in prompts if answers(config, generator, prompt.domain)],
            config.synthesis.prompts_per_shard,
        )
        for generator, digest in prepared.synthesis_digests.items()
    }
    started = time.monotonic()
    reports = _write_answers(config, prepared, tasks)
    seconds = time.monotonic() - started
    entries = build_dataset(layout, prompts, list(prepared.synthesis_digests.values()))
    counts = {
        generator: answer_counts(layout, digest, prompts)
        for generator, digest in prepared.synthesis_digests.items()
    }
    _check_splits({entry.split for entry in entries}, counts)
    written = ", ".join(
        f"{name} {count['kept']:.0f}/{count['answers']:.0f}" for name, count in counts.items()
    )
    kept, filters = filter_answers(config, layout, prepared, entries)
    dropped = f"; dropped by filters: {summary(filters)}" if filters else ""
    return {
        "key": synthesis_key(prepared),
        "dataset": write_dataset(layout, kept),
        "counts": counts,
        "filters": filters,
        "engine_seconds": engine_seconds(config, reports, seconds),
        "summary": f"{len(kept)} sequences (answers kept: {written}{dropped})",
    }


def _write_answers(
    config: Config, prepared: Prepared, tasks: dict[str, list[SynthesisTask]]
) -> dict[str, PoolReport]:
    if DATASET_GENERATOR in tasks:
        for task in tasks[DATASET_GENERATOR]:
            task.from_references()
        return {}
    need = prepared.longest_request(config, config.synthesis.sampling)
    return run_pools(
        [
            pool_job(
                config, name, prepared, work, min_model_len=need, num_logprobs=0, unit="prompts"
            )
            for name, work in tasks.items()
        ]
    )


def _template(config: Config, layout: Layout, generator: str, digest: str) -> SynthesisTask:
    return SynthesisTask(
        layout=layout,
        generator=generator,
        recipe_digest=digest,
        prompts=(),
        student=config.student,
        sampling=config.synthesis.sampling,
        samples_per_prompt=config.synthesis.samples_per_prompt,
        max_sequence_tokens=config.synthesis.max_sequence_tokens,
        seed=config.seed,
    )


def _check_splits(splits: set[str], counts: dict[str, dict[str, float]]) -> None:
    for split in ("train", "holdout"):
        if split not in splits:
            raise TeacherError(
                f"no answer of the {split} split was kept; what became of the answers: "
                f"{json.dumps(counts)}. Check the sampling (max_tokens), the length bound and "
                "the references; what was finished is kept"
            )
