"""Dry run: each stage's plan, the resources that it asks for, the bytes that its caches take.

It imports no engine and no torch, so it takes a second.
"""

from __future__ import annotations

from jobs.bookkeeping.plan import key_cautions, length_cautions, plan_rounds, unseen_inputs
from jobs.bookkeeping.stage_records import scored_dataset
from jobs.cluster.placement import check_local_head
from jobs.stages.preflight import check_inputs, unread_references
from pipeline.cache_care.status import stale_caches
from pipeline.config.base import Resources
from pipeline.config.load import check_shared_paths
from pipeline.config.rounds import rounds_of
from pipeline.config.run import Config
from pipeline.config.synthesis import Writing, is_by_student
from pipeline.config.teachers import EndpointTeacherConfig
from pipeline.records import Prompt
from pipeline.run.prepared_run import Run
from pipeline.run.training_spec import training_specs
from students.checkpoints.resume import check_training


def dry_run_text(config: Config, address: str | None = None) -> str:
    """The plan of a run as lines for people; starts nothing.

    Args:
        address: URL of the cluster's job server; None for a local Ray head.

    Raises:
        ConfigError, PromptError: a prompt or an option cannot be used, or the cluster does not see
            a path.
        ClusterError: the local Ray head would not hold a stage.
        TrainingError: the run's folder holds another training.
    """
    if address is not None:
        check_shared_paths(config)
        if unseen := unseen_inputs(config):
            return "\n".join(["# plan", *_unknown(unseen), "# resources", *_resources(config)])
    lines, rounds = ["# plan"], plan_rounds(config)
    if address is None:
        check_local_head(config, {p.stage for plans in rounds for p in plans if p.todo})
    for of_round, plans in zip(rounds_of(config), rounds, strict=True):
        lines += [f"round {of_round.round} of {of_round.rounds}"] if of_round.rounds > 1 else []
        for plan in plans:
            state = "cached" if plan.todo == 0 else "to do"
            lines.append(f"{plan.stage:11} {state:7} {plan.summary}")
    run = Run.find(config)
    if run is not None:
        lines += [f"stale       {line}" for line in stale_caches(run)]
    prompts: list[Prompt] = []
    for of_round in rounds_of(config):
        prompts = _check(of_round) or prompts
    longest = 0 if run is None else run.prepared.longest_prompt
    unread = unread_references(config, prompts) if run is None else run.prepared.unread_references
    told = [*key_cautions(config), *length_cautions(config, longest), *unread]
    lines += [f"caution     {line}" for line in told]
    lines += ["# resources", *_resources(config)]
    return "\n".join(lines)


def _unknown(unseen: dict[str, str]) -> list[str]:
    """The plan of a run whose inputs only the cluster's nodes see.

    Args:
        unseen: paths that this machine lacks, by the key that holds each.
    """
    return [
        "unknown     this machine lacks files that the run reads, so its first stage checks them:",
        *(f"            {key} {path}" for key, path in unseen.items()),
    ]


def _check(config: Config) -> list[Prompt]:
    """Refuses what a stage would refuse, as far as no model and no engine is needed for it.

    Returns:
        The prompts, if they had to be read.
    """
    run = Run.find(config)
    if run is None and config.round > 1:
        return []  # the first round has the same inputs
    if run is None:
        return check_inputs(config)[0]
    if dataset := scored_dataset(run):
        for spec in training_specs(run, dataset):
            check_training(spec)
    return []


def _resources(config: Config) -> list[str]:
    lines = []
    for name, teacher in config.teachers.items():
        engines = _text(teacher.resources, teacher.cost_per_hour)
        line = f"teacher {name}: {teacher.replicas} x {engines}"
        if isinstance(teacher, EndpointTeacherConfig):
            line += f", {teacher.endpoint.max_concurrency} requests at once to "
            line += teacher.endpoint.url + ("" if teacher.scores else ", which only writes")
        lines.append(line)
    recipes = config.synthesis.recipes
    if any(not isinstance(recipe, Writing) and is_by_student(recipe) for recipe in recipes):
        engines = _text(config.evaluation.resources, config.student.cost_per_hour)
        lines.append(f"student, writing: {config.student.replicas} x {engines}")
    training = config.training
    workers = _text(training.resources, training.cost_per_hour)
    lines.append(f"student: {training.workers} x {workers}")
    engine = _text(config.evaluation.resources, config.student.cost_per_hour)
    lines.append(f"evaluation: {engine}")
    lines.append(f"each stage's job: {_text(config.cluster.job_resources)}")
    return lines


def _text(resources: Resources, cost_per_hour: float = 0.0) -> str:
    parts = [f"{resources.num_cpus:g} CPU"]
    if resources.num_gpus:
        parts.append(f"{resources.num_gpus:g} GPU")
    parts += [f"{amount:g} {name}" for name, amount in resources.custom.items()]
    return " + ".join(parts) + (f" at {cost_per_hour:g} an hour" if cost_per_hour else "")
