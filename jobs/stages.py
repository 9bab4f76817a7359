"""One entry point a stage: what each stage's Ray job runs. All are idempotent and do only what is
missing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

import ray

from jobs.plan import (
    answers,
    dataset_of,
    layout_of,
    make_plan,
    stage_key,
    stale_caches,
    synthesis_key,
)
from pipeline import storage
from pipeline.cache_index import publish, quarantined
from pipeline.config import Config, TeacherConfig
from pipeline.datasets import read_dataset, write_dataset
from pipeline.errors import ConfigError, TeacherError
from pipeline.fingerprint import digest_json
from pipeline.layout import Layout
from pipeline.loading import dump_config
from pipeline.prepared import Prepared, load_prepared
from pipeline.prompts import load_prompts
from pipeline.recipes import DATASET_GENERATOR
from pipeline.synthesis_index import build_dataset, read_records
from pipeline.training import training_jobs
from teachers.engine import EngineSpec
from teachers.pool import PoolJob, PoolReport, run_pools
from teachers.scoring import ScoredShard, plan_scoring
from teachers.synthesis import SynthesisTask, plan_synthesis

logger = logging.getLogger(__name__)

Outcome = dict[str, Any]


def run_stage(stage: str, config: Config) -> None:
    """Runs one stage and keeps its record: what it did, how long it took, what that cost.

    Raises:
        DistillationError: what went wrong; everything finished before stays.
    """
    layout = layout_of(config)
    plan = {plan.stage: plan for plan in make_plan(config)}[stage]
    if plan.todo == 0:
        print(f"up to date ({plan.summary})", flush=True)
        return
    storage.write_bytes(layout.resolved_config, dump_config(config).encode())
    started = time.time()
    if stage != "prepare":
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    outcome = STAGES[stage](config, layout)
    seconds = time.time() - started
    storage.write_json(
        layout.stage_record(stage), {"seconds": seconds, "started": started, **outcome}
    )
    print(outcome["summary"], flush=True)


def _prepare(config: Config, layout: Layout) -> Outcome:
    from jobs.prepare import prepare  # brings in vLLM, which takes seconds, to check its options

    prepared = prepare(config)
    for line in stale_caches(layout, prepared):
        print(line, flush=True)
    return {"summary": f"prompts: {json.dumps(prepared.prompt_counts)}; vocabularies agree"}


def _synthesize(config: Config, layout: Layout) -> Outcome:
    prepared = _prepared(config, layout)
    prompts = load_prompts(layout, prepared.prompts)
    tasks: dict[str, list[SynthesisTask]] = {}
    for generator, digest in prepared.synthesis_digests.items():
        template = _synthesis_template(config, layout, generator, digest)
        wanted = [p for p in prompts if answers(config, generator, p.domain)]
        tasks[generator] = plan_synthesis(template, wanted, config.synthesis.prompts_per_shard)
    started = time.monotonic()
    if DATASET_GENERATOR in tasks:
        for task in tasks[DATASET_GENERATOR]:
            task.from_references()
        reports: dict[str, PoolReport] = {}
    else:
        need = prepared.longest_request(config, config.synthesis.sampling)
        reports = run_pools(
            [
                pool_job(config, name, prepared, need, 0, tasks[name], _progress("prompts", name))
                for name in tasks
            ]
        )
    seconds = time.monotonic() - started
    entries = build_dataset(layout, prompts, list(prepared.synthesis_digests.values()))
    _check_splits({entry.split for entry in entries}, layout, prepared)
    counts = synthesis_counts(layout, prepared)
    kept = ", ".join(f"{name} {count['kept']}/{count['answers']}" for name, count in counts.items())
    return {
        "key": synthesis_key(prepared),
        "dataset": write_dataset(layout, entries),
        "counts": counts,
        "cost": engine_cost(config, reports, seconds),
        "summary": f"{len(entries)} sequences (answers kept: {kept})",
    }


def _score(config: Config, layout: Layout) -> Outcome:
    prepared = _prepared(config, layout)
    entries = read_dataset(layout, _dataset(layout, prepared))
    caches = prepared.caches(layout)
    need = max(entry.num_tokens for entry in entries) + 1
    pools = []
    for name, cache in caches.items():
        fingerprint = digest_json(prepared.scoring_recipes[name])
        tasks = plan_scoring(layout.root, entries, cache, fingerprint, config.scoring.selection)
        progress = _progress("sequences", name)
        pools.append(
            pool_job(config, name, prepared, need, config.scoring.num_logprobs, tasks, progress)
        )
    started = time.monotonic()
    reports = run_pools(pools)
    seconds = time.monotonic() - started
    for name, cache in caches.items():
        provenance = {
            "engines": reports[name].engines,
            "teacher": name,
            "model": config.teachers[name].model,
        }
        publish(cache, prepared.scoring_recipes[name], provenance)
    refused = {name: quarantined(cache) for name, cache in caches.items()}
    return {
        "engines": {name: report.engines for name, report in reports.items()},
        "quarantined": {name: len(errors) for name, errors in refused.items()},
        "cost": engine_cost(config, reports, seconds),
        "summary": "; ".join(
            _scored_line(name, report, refused[name]) for name, report in reports.items()
        ),
    }


def _scored_line(name: str, report: PoolReport, refused: dict[str, str]) -> str:
    done: list[ScoredShard] = report.results
    positions = sum(shard.entry.num_positions for shard in done)
    size = sum(shard.entry.num_bytes for shard in done)
    line = (
        f"{name}: {positions} positions in {len(done)} new shards, "
        f"{size / max(positions, 1):.1f} bytes each"
    )
    return f"{line}, {len(refused)} sequences quarantined" if refused else line


def _train(config: Config, layout: Layout) -> Outcome:
    from students.launch import train_student

    prepared = _prepared(config, layout)
    figures = {}
    for job in training_jobs(config, layout, prepared, _dataset(layout, prepared)):
        figures[job.student] = train_student(job)
    hours = sum(found["seconds"] for found in figures.values()) / 3600
    return {
        "key": stage_key(config, layout, prepared, "train"),
        "figures": figures,
        "cost": hours * config.training.workers * config.training.cost_per_hour,
        "summary": "; ".join(
            f"{label}: {found['steps']} steps, {found['tokens'] / found['seconds']:.0f} tokens/s"
            for label, found in figures.items()
        ),
    }


def _export(config: Config, layout: Layout) -> Outcome:
    from students.export import export_student

    prepared = _prepared(config, layout)
    jobs = training_jobs(config, layout, prepared, _dataset(layout, prepared))
    figures = {job.student: export_student(job, layout.export_folder(job.student)) for job in jobs}
    return {
        "key": stage_key(config, layout, prepared, "export"),
        "figures": figures,
        "cost": 0.0,
        "summary": "; ".join(
            f"{found['folder']} (at most {found['largest_difference_nats']:.1e} nats from training)"
            for found in figures.values()
        ),
    }


def _evaluate(config: Config, layout: Layout) -> Outcome:
    from jobs.evaluate import evaluate

    prepared = _prepared(config, layout)
    outcome = evaluate(config, layout, prepared, _dataset(layout, prepared))
    return {"key": stage_key(config, layout, prepared, "evaluate"), **outcome}


STAGES: dict[str, Callable[[Config, Layout], Outcome]] = {
    "prepare": _prepare,
    "synthesize": _synthesize,
    "score": _score,
    "train": _train,
    "export": _export,
    "evaluate": _evaluate,
}


def pool_job(
    config: Config,
    name: str,
    prepared: Prepared,
    min_model_len: int,
    num_logprobs: int,
    tasks: list,
    progress: Callable[[int, int, Any], None],
) -> PoolJob:
    """The work of one teacher, with the engine that it needs."""
    teacher: TeacherConfig = config.teachers[name]
    spec = EngineSpec(
        model=teacher.model,
        revision=teacher.revision,
        trust_remote_code=teacher.trust_remote_code,
        vllm=teacher.vllm,
        num_logprobs=num_logprobs,
        min_model_len=min_model_len,
        seed=config.seed,
        eos_token_ids=(prepared.eos_token_id,),
    )
    return PoolJob(
        name, spec, teacher.resources, teacher.replicas, tasks, config.cluster.env_vars, progress
    )


def engine_cost(config: Config, reports: dict[str, PoolReport], seconds: float) -> float:
    """Price of the engines that ran, each as long as the whole stage: an upper bound."""
    hours = seconds / 3600
    return sum(
        config.teachers[name].cost_per_hour * config.teachers[name].replicas * hours
        for name, report in reports.items()
        if report.engines
    )


def synthesis_counts(layout: Layout, prepared: Prepared) -> dict[str, dict[str, float]]:
    """By generator: answers by what became of them, generated tokens, and seconds summed over
    prompt shards.
    """
    totals: dict[str, dict[str, float]] = {}
    for generator, digest in prepared.synthesis_digests.items():
        counts: dict[str, float] = {"answers": 0, "kept": 0, "generated_tokens": 0, "seconds": 0.0}
        for record in read_records(layout, digest):
            found = record["counts"] | {key: record[key] for key in ("generated_tokens", "seconds")}
            for key, value in found.items():
                counts[key] = counts.get(key, 0) + value
        totals[generator] = counts
    return totals


def _synthesis_template(
    config: Config, layout: Layout, generator: str, digest: str
) -> SynthesisTask:
    return SynthesisTask(
        layout=layout,
        generator=generator,
        recipe_digest=digest,
        prompts=(),
        student=config.student,
        sampling=config.synthesis.sampling,
        samples_per_prompt=config.synthesis.samples_per_prompt,
        max_sequence_tokens=config.synthesis.max_sequence_tokens,
        checker=config.prompts.checker,
        seed=config.seed,
    )


def _check_splits(splits: set[str], layout: Layout, prepared: Prepared) -> None:
    for split in ("train", "holdout"):
        if split not in splits:
            counts = json.dumps(synthesis_counts(layout, prepared))
            raise TeacherError(
                f"no answer of the {split} split was kept; what became of the answers: {counts}. "
                "Check the sampling "
                "(max_tokens), the checker and the references; what was finished is kept"
            )


def _prepared(config: Config, layout: Layout) -> Prepared:
    prepared = load_prepared(config, layout)
    if prepared is None:
        raise ConfigError(
            f"run {config.name} is not prepared for this config: submit the stage `prepare` first"
        )
    return prepared


def _dataset(layout: Layout, prepared: Prepared) -> str:
    digest = dataset_of(layout, prepared)
    if digest is None:
        raise ConfigError(f"run {layout.run} has no dataset: submit the stage `synthesize` first")
    return digest


def _progress(unit: str, name: str) -> Callable[[int, int, Any], None]:
    started = time.monotonic()

    def say(done: int, total: int, _: Any) -> None:
        print(f"{name}: {done}/{total} {unit}, {time.monotonic() - started:.0f} s", flush=True)

    return say
