"""Serves each model alone on its hardware, and makes its figures from its answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.stages.holdout import HoldoutFigures
from jobs.stages.teacher_pools import endpoint_spec
from pipeline import storage
from pipeline.config.base import Resources
from pipeline.config.run import Config
from pipeline.config.synthesis import STUDENT
from pipeline.config.teachers import EndpointTeacherConfig
from pipeline.layout import Layout
from pipeline.records import DatasetEntry, Prompt, TokenSequence
from pipeline.report.models import DomainFigures, ModelFigures
from pipeline.report.rounding import Agreement
from pipeline.run.prepared_run import Run
from pipeline.run.shared_storage import marks_of
from pipeline.sequences import read_sequences
from teachers.pool.pool import TeacherWork, run_pools
from teachers.protocol import EndpointSpec, EngineSpec
from teachers.tasks.holdout import AnsweredPrompts, HoldoutTask
from teachers.tokenizing import prompt_ids, student_tokenizer

logger = logging.getLogger(__name__)

SEQUENCES_COMPARED = 16


@dataclass(frozen=True)
class ServedModel:
    """One model after it was served.

    Attributes:
        seconds: time with its engine, start included.
        num_too_long: prompts that were too long to ask.
        num_unread: answers whose reference the checker cannot read.
        agreement: log-probabilities of a student's engine against those of its exported weights;
            None for a teacher.
    """

    figures: ModelFigures
    seconds: float
    num_too_long: int
    num_unread: int
    agreement: Agreement | None


def measure_model(
    run: Run,
    name: str,
    prompts: tuple[Prompt, ...],
    compared: tuple[TokenSequence, ...],
    holdout: HoldoutFigures,
) -> ServedModel:
    """Serves one model, adds its answers to its likelihoods, and logs a line about them.

    Args:
        holdout: likelihoods of all models.

    Raises:
        TeacherError: the model cannot be served.
    """
    begun = time.monotonic()
    answered, engine = serve_model(run, name, prompts, compared)
    seconds = time.monotonic() - begun
    figures = model_figures(run.config, name, answered, engine, holdout.models[name])
    line = answers_line(figures.domains, answered, run.layout.answers(name))
    logger.info("%s: %s", name, line)
    exported = holdout.gold_logprobs.get(name)
    agreement = None if exported is None else exported.agreement(answered.gold_logprobs)
    counts = answered.num_too_long, answered.num_unread
    return ServedModel(figures, seconds, *counts, agreement)


def measure_former_student(
    run: Run, prompts: tuple[Prompt, ...], likelihoods: Mapping[str, DomainFigures]
) -> dict[str, DomainFigures]:
    """Figures by domain of a former round's student."""
    answered, _ = serve_model(run, STUDENT, prompts, compared=())
    domains = domain_figures(answered, likelihoods)
    words = ", ".join(exact_match_words(domains))
    logger.info("%s: %s", run.layout.export_folder(STUDENT), words)
    return domains


def serve_model(
    run: Run, name: str, prompts: tuple[Prompt, ...], compared: tuple[TokenSequence, ...]
) -> tuple[AnsweredPrompts, dict[str, Any]]:
    """Answers of one model, alone on its hardware, and the description of its engine.

    Args:
        name: name of a teacher, or `student` or `twin`.
        compared: sequences whose log-probabilities an exported student must give.

    Raises:
        TeacherError: the model cannot be served.
    """
    config = run.config
    teacher = config.teachers.get(name)
    resources: Resources = teacher.resources if teacher else config.evaluation.resources
    need = max([_longest_request(config, prompts), *(len(s.input_ids) + 1 for s in compared)])
    task = HoldoutTask(
        model=name,
        prompts=prompts,
        student=config.student,
        sampling=config.evaluation.sampling,
        max_sequence_tokens=config.synthesis.max_sequence_tokens,
        checker=config.prompts.checker,
        answers_path=run.layout.answers(name),
        compared=() if teacher else compared,
        seed=config.seed,
        returns_text=teacher is not None and teacher.returns_text,
    )
    work = TeacherWork(
        name,
        _spec(run, name, need),
        resources,
        replicas=1,
        tasks=[task],
        env_vars=config.cluster.env_vars,
        autoscaling=config.cluster.autoscaling,
        marks=marks_of(run.layout),
    )
    report = run_pools([work])[name]
    return report.results[0], report.engines[-1]


def _spec(run: Run, name: str, min_model_len: int) -> EngineSpec | EndpointSpec:
    """Specification of the engine, or of the endpoint, that serves a model."""
    config = run.config
    teacher = config.teachers.get(name)
    if isinstance(teacher, EndpointTeacherConfig):
        return endpoint_spec(run, name, min_model_len=min_model_len, num_logprobs=0)
    return EngineSpec(
        model=teacher.model if teacher else run.layout.export_folder(name),
        revision=teacher.revision if teacher else None,
        trust_remote_code=(teacher or config.student).trust_remote_code,
        # Prompts are asked more than once; a cached prefix would flatter the speed.
        vllm={"enable_prefix_caching": False, **(teacher or config.student).vllm},
        # Equal for all models: the first step with log-probabilities is part of peak memory.
        num_logprobs=1,
        min_model_len=min_model_len,
        seed=config.seed,
        eos_token_ids=run.prepared.stop_token_ids(name),
    )


def holdout_prompts(config: Config, prompts: Sequence[Prompt]) -> tuple[Prompt, ...]:
    """The hold-out prompts that every model is asked, under the evaluation's system prompt."""
    most = config.evaluation.max_prompts_per_domain
    by_domain: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        if prompt.split == "holdout":
            by_domain.setdefault(prompt.domain, []).append(prompt)
    system = config.evaluation.system_prompt
    return tuple(prompt.under(system) for group in by_domain.values() for prompt in group[:most])


def compared_sequences(
    layout: Layout, entries: Sequence[DatasetEntry]
) -> tuple[TokenSequence, ...]:
    """Some hold-out sequences, spread evenly, whose log-probabilities an exported student gives."""
    wanted = {
        entry.sequence_id: entry for entry in entries[:: max(1, len(entries) // SEQUENCES_COMPARED)]
    }
    shards = {storage.join(layout.root, entry.shard) for entry in wanted.values()}
    sequences = {
        sequence.sequence_id: sequence
        for shard in sorted(shards)
        for sequence in read_sequences(shard)
        if sequence.sequence_id in wanted
    }
    return tuple(sequences.values())[:SEQUENCES_COMPARED]


def model_figures(
    config: Config,
    name: str,
    answered: AnsweredPrompts,
    engine: dict[str, Any],
    likelihoods: Mapping[str, DomainFigures],
) -> ModelFigures:
    """Figures of one model, from its answers, its engine and its likelihoods by domain."""
    teacher = config.teachers.get(name)
    cost = teacher.cost_per_hour if teacher else config.student.cost_per_hour
    speed = answered.tokens_per_second
    return ModelFigures(
        name=name,
        role="teacher" if teacher else name,
        domains=domain_figures(answered, likelihoods),
        parameters=engine["num_parameters"],
        weight_bytes=engine["weight_bytes"],
        peak_memory_bytes=engine["peak_memory_bytes"],
        tokens_per_second=speed,
        tokens_per_second_range=answered.tokens_per_second_range,
        latency_seconds=answered.latency_seconds,
        cost_per_hour=cost,
        price_per_million_tokens=cost / (speed * 3600) * 1e6 if cost else None,
        engine=engine,
    )


def domain_figures(
    answered: AnsweredPrompts, likelihoods: Mapping[str, DomainFigures]
) -> dict[str, DomainFigures]:
    """Figures of a model by domain: its answers added to its likelihoods.

    A domain without hold-out answers in the dataset has prompts, but no likelihoods.
    """
    unmeasured = dict.fromkeys(answered.num_checked, DomainFigures())
    return {
        domain: figures.model_copy(
            update={
                "prompts": answered.num_checked.get(domain, 0),
                "exact_match": answered.correct.get(domain),
            }
        )
        for domain, figures in {**unmeasured, **likelihoods}.items()
    }


def answers_line(
    domains: Mapping[str, DomainFigures], answered: AnsweredPrompts, answers_path: str
) -> str:
    """Exact match of a model in each domain, its speed, and errors of the checker, for people."""
    parts = [*exact_match_words(domains), f"{answered.tokens_per_second:.0f} tokens/s"]
    if answered.checker_errors:
        parts.append(
            f"the checker raised an error at {answered.checker_errors} answers, which count as "
            f"wrong: {answers_path}"
        )
    if answered.num_unread:
        parts.append(
            f"{answered.num_unread} answers are unchecked, because the checker cannot read their "
            "references"
        )
    return ", ".join(parts)


def exact_match_words(domains: Mapping[str, DomainFigures]) -> list[str]:
    """Domains with the model's exact match in each; domains without a measurement are left out."""
    return [
        f"{domain} {figures.exact_match:.1%}"
        for domain, figures in domains.items()
        if figures.exact_match is not None
    ]


def _longest_request(config: Config, prompts: Sequence[Prompt]) -> int:
    """Tokens that an engine must hold to answer every prompt that is not too long."""
    tokenizer, _ = student_tokenizer(config.student.files)
    longest = max(len(prompt_ids(tokenizer, prompt)) for prompt in prompts)
    need = longest + config.evaluation.sampling["max_tokens"]
    return min(need, config.synthesis.max_sequence_tokens or need)
