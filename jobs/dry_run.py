"""What a run would do: each stage's plan, the resources it asks for, the bytes its caches take."""

from __future__ import annotations

from jobs.bookkeeping.plan import length_cautions, plan_rounds
from jobs.bookkeeping.stage_records import scored_dataset
from jobs.cluster.placement import check_local_head
from pipeline.cache_care.status import stale_caches
from pipeline.config.base import Resources
from pipeline.config.load import check_shared_paths
from pipeline.config.rounds import layout_of, rounds_of
from pipeline.config.run import Config
from pipeline.config.synthesis import Writing, is_by_student
from pipeline.config.teachers import EndpointTeacherConfig
from pipeline.run.preparation import load_prepared
from pipeline.run.training_spec import training_specs


def describe(config: Config, address: str | None = None) -> str:
    """The plan as lines for people; starts nothing.

    Args:
        address: of the cluster that would run it; None for a head of its own.

    Raises:
        ConfigError, PromptError: the prompts are bad, an option is none of upstream's, or a path is
            not seen by the cluster.
        ClusterError: a head of its own would not hold a stage.
        TrainingError: the run holds another training.
    """
    if address is not None:
        check_shared_paths(config)
    lines, rounds = ["# plan"], plan_rounds(config)
    if address is None:
        check_local_head(config, {p.stage for plans in rounds for p in plans if p.todo})
    for each, plans in zip(rounds_of(config), rounds, strict=True):
        lines += [f"round {each.round} of {each.rounds}"] if each.rounds > 1 else []
        for plan in plans:
            state = "cached" if plan.todo == 0 else "to do"
            lines.append(f"{plan.stage:11} {state:7} {plan.summary}")
    layout = layout_of(config)
    prepared = load_prepared(config, layout)
    if prepared is not None:
        lines += [f"stale       {line}" for line in stale_caches(layout, prepared)]
    for each in rounds_of(config):
        _check(each)
    longest = 0 if prepared is None else prepared.longest_prompt
    lines += [f"caution     {line}" for line in length_cautions(config, longest)]
    lines += ["# resources", *_resources(config)]
    return "\n".join(lines)


def _check(config: Config) -> None:
    """What a stage would refuse and can be told without a model. Engines are slow to import."""
    layout = layout_of(config)
    prepared = load_prepared(config, layout)
    if prepared is None and config.round > 1:
        return  # its inputs were those of the round before
    if prepared is None:
        from jobs.stages.prepare import check_inputs

        check_inputs(config)
    elif dataset := scored_dataset(config, layout, prepared):
        from students.launch import check_training

        for job in training_specs(config, layout, prepared, dataset):
            check_training(job)


def _resources(config: Config) -> list[str]:
    lines = []
    for name, teacher in config.teachers.items():
        line = f"teacher {name}: {teacher.replicas} x {_text(teacher.resources)}"
        if isinstance(teacher, EndpointTeacherConfig):
            line += f", {teacher.endpoint.max_concurrency} requests at once to "
            line += teacher.endpoint.url + ("" if teacher.scores else ", which only writes")
        lines.append(line)
    recipes = config.synthesis.recipes
    if any(not isinstance(recipe, Writing) and is_by_student(recipe) for recipe in recipes):
        engines = _text(config.evaluation.resources)
        lines.append(f"student, writing: {config.student.replicas} x {engines}")
    lines.append(f"student: {config.training.workers} x {_text(config.training.resources)}")
    lines.append(f"evaluation: {_text(config.evaluation.resources)}")
    lines.append(f"each stage's job: {_text(config.cluster.job_resources)}")
    return lines


def _text(resources: Resources) -> str:
    parts = [f"{resources.num_cpus:g} CPU"]
    if resources.num_gpus:
        parts.append(f"{resources.num_gpus:g} GPU")
    parts += [f"{amount:g} {name}" for name, amount in resources.custom.items()]
    return " + ".join(parts)
