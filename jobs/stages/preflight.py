"""Checks of a config and its prompts that read no model and import no engine: they take a second.

The dry run ends with them, and the prepare stage begins with them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec

from pipeline import storage
from pipeline.checkers.answer_checkers import find_checker, references_unread
from pipeline.combine.learned import SPLIT as LEARNED_SPLIT
from pipeline.config.combine import ByDomainWeights, LearnedWeights
from pipeline.config.filters import Balance, Judge
from pipeline.config.load import evaluation_files
from pipeline.config.rounds import rounds_of
from pipeline.config.run import Config
from pipeline.config.synthesis import Answer, Answering, Complete, GivenAnswers, Writing
from pipeline.config.teachers import EndpointTeacherConfig, TeacherConfig
from pipeline.errors import ConfigError
from pipeline.filters.evaluated import read_evaluation_file
from pipeline.filters.text import shown_end
from pipeline.records import Prompt
from pipeline.run.identities import sampling_of
from pipeline.synthesis.prompts import read_prompts
from pipeline.synthesis.rewriting import make_requests, rubric_of
from pipeline.synthesis.steps import Step, steps_of
from teachers.engine.arguments import check_request_changes
from teachers.engine.options import check_engine_arguments, check_sampling_parameters

logger = logging.getLogger(__name__)

_NO_PLACE = (
    "system_prompt has no place in raw `text`, and {} prompts are raw `text`: remove it, or give "
    "all prompts as `messages`"
)


def check_inputs(config: Config) -> tuple[list[Prompt], dict[str, int]]:
    """Checks the names of upstream libraries' options, the prompts, the recipes and the filters.

    Returns:
        The prompts and their counts.

    Raises:
        ConfigError, PromptError: an option or a prompt cannot be used.
    """
    check_options(config)
    prompts, counts = read_prompts(config.prompts)
    _check_prompts(config, prompts)
    check_recipes(config, prompts)
    check_filters(config, prompts)
    return prompts, counts


def check_options(config: Config) -> None:
    """Checks the names of upstream libraries' options, and what contradicts other fields.

    Raises:
        ConfigError: an option cannot be used.
    """
    checks = {
        f"teachers.{name}": partial(
            check_engine_arguments,
            teacher.vllm,
            config.scoring.num_logprobs,
            name in config.training.teacher_layers,
        )
        for name, teacher in config.teachers.items()
        if isinstance(teacher, TeacherConfig)
    }
    apis = {
        teacher.endpoint.api
        for teacher in config.teachers.values()
        if isinstance(teacher, EndpointTeacherConfig) and teacher.scores
    }
    checks |= {
        f"teachers.{name}": partial(
            check_request_changes, teacher.endpoint.request, teacher.endpoint.api
        )
        for name, teacher in config.teachers.items()
        if isinstance(teacher, EndpointTeacherConfig)
    }
    checks["student"] = partial(check_engine_arguments, config.student.vllm)
    checks["evaluation"] = partial(
        check_sampling_parameters, config.evaluation.sampling, endpoint_apis=apis
    )
    for place, check in checks.items():
        try:
            check()
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
    most = config.synthesis.max_sequence_tokens
    longest = config.evaluation.sampling["max_tokens"]
    if most is not None and most <= longest:
        raise ConfigError(
            f"evaluation.sampling.max_tokens ({longest}) leaves no room for a prompt in "
            f"synthesis.max_sequence_tokens ({most}): lower the first, or raise the second"
        )
    _check_step_sampling(config)
    _check_attention(config.student.attn_implementation)


def steps_by_place(config: Config) -> dict[str, Step]:
    """Steps of all rounds by their place in the config."""
    steps = [step for of_round in rounds_of(config) for step in steps_of(of_round)]
    return {f"synthesis.recipes ({step.label})": step for step in steps}


def _check_step_sampling(config: Config) -> None:
    """Checks the sampling of every step of every round.

    Raises:
        ConfigError: vLLM does not know a parameter, or an answer leaves no room for its prompt.
    """
    most = config.synthesis.max_sequence_tokens
    for place, step in steps_by_place(config).items():
        if isinstance(step.recipe, GivenAnswers):
            continue
        sampling = sampling_of(step.recipe, step.author)
        answering = isinstance(step.recipe, Answering)
        samples = step.recipe.num_samples
        teacher = config.author(step.author)
        apis = {teacher.endpoint.api} if isinstance(teacher, EndpointTeacherConfig) else set()
        try:
            check_sampling_parameters(sampling, samples, apis)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
        if answering and most is not None and most <= sampling["max_tokens"]:
            raise ConfigError(
                f"{place}: sampling.max_tokens ({sampling['max_tokens']}) leaves no room for a "
                f"prompt in synthesis.max_sequence_tokens ({most})"
            )


def _check_attention(name: str) -> None:
    packages = {
        "flash_attention_2": ("flash_attn", "kernels"),
        "flash_attention_3": ("flash_attn_interface", "kernels"),
    }.get(name)
    if packages and not any(map(find_spec, packages)):
        raise ConfigError(
            f"student.attn_implementation {name} needs the package {' or '.join(packages)}, and "
            "none is installed here: choose sdpa, or add one to every node's environment"
        )


def _check_prompts(config: Config, prompts: Sequence[Prompt]) -> None:
    domains = {prompt.domain for prompt in prompts}
    splits = {prompt.split for prompt in prompts}
    advice = {"train": "lower the other splits' fractions", "holdout": "raise holdout_fraction"}
    for split, change in advice.items():
        if split not in splits:
            raise ConfigError(
                f"none of the {len(prompts)} prompts is in the {split} split: give a source "
                f"`split: {split}`, or in `prompts` {change}"
            )
    weights = config.combine.weights
    if isinstance(weights, ByDomainWeights) and (unnamed := domains - weights.domains.keys()):
        raise ConfigError(f"combine.weights.domains has no weights for {sorted(unnamed)}: add them")
    learnable = {prompt.domain for prompt in prompts if prompt.split == LEARNED_SPLIT}
    if isinstance(weights, LearnedWeights) and (unknown := domains - learnable):
        raise ConfigError(
            f"combine.weights are learned on the {LEARNED_SPLIT} split, which has no prompt of "
            f"{sorted(unknown)}: raise prompts.validation_fraction, or give a source `split: "
            f"{LEARNED_SPLIT}`"
        )


def check_recipes(config: Config, prompts: Sequence[Prompt]) -> None:
    """Checks that every recipe has prompts to work on, and that templates can be used.

    Raises:
        ConfigError: a recipe has no prompt, or a template cannot be used.
    """
    domains = {prompt.domain for prompt in prompts}
    owned = {domain for teacher in config.teachers.values() for domain in teacher.domains}
    raw = [prompt for prompt in prompts if prompt.text is not None]
    if config.evaluation.system_prompt is not None and raw:
        raise ConfigError(f"evaluation.{_NO_PLACE.format(len(raw))}")
    for i, recipe in enumerate(config.synthesis.recipes):
        place = f"synthesis.recipes.{i} ({recipe.type})"
        if isinstance(recipe, Answering) and recipe.by == "domain_teacher" and domains - owned:
            raise ConfigError(
                f"{place} by domain_teacher: no teacher names {sorted(domains - owned)} in its "
                f"`domains`; the teachers name {sorted(owned)}"
            )
        if isinstance(recipe, Complete) and not raw:
            raise ConfigError(
                f"{place} continues raw `text`, and all prompts are chat `messages`: use `answer`"
            )
        if isinstance(recipe, Answer) and recipe.system_prompt is not None and raw:
            raise ConfigError(f"{place}: {_NO_PLACE.format(len(raw))}")
        without = sum(prompt.reference is None for prompt in prompts)
        if isinstance(recipe, GivenAnswers) and without:
            raise ConfigError(
                f"{place} takes references as answers, and {without} of {len(prompts)} prompts "
                "have none: add references, or use another recipe"
            )
        if isinstance(recipe, Writing) and not make_requests(recipe, prompts, config.seed):
            raise ConfigError(
                f"{place} rewrites train prompts of one turn, and there is no such prompt"
            )


def unread_references(config: Config, prompts: Sequence[Prompt]) -> list[str]:
    """Domains with references that the checker cannot read, one line each, for people."""
    checker = config.prompts.checker
    references: dict[str, list[str]] = {}
    for prompt in prompts:
        if prompt.reference is not None:
            references.setdefault(prompt.domain, []).append(prompt.reference)
    lines = []
    for domain, members in references.items() if checker is not None else ():
        if unread := references_unread(str(checker), members):
            lines.append(
                f"prompts.checker {checker} cannot read {len(unread)} of {len(members)} references "
                f"of the domain {domain}, such as {shown_end(unread[0])!r}: answers to them are "
                "not checked"
            )
    return lines


def check_filters(config: Config, prompts: Sequence[Prompt]) -> None:
    """Checks checkers, files, rubrics and domains that the filters need.

    Raises:
        ConfigError: a checker, file, rubric or domain does not exist, or an evaluation file lacks a
            column.
        PromptError: an evaluation file cannot be read.
    """
    checker = config.prompts.checker
    trained = {prompt.domain for prompt in prompts if prompt.split == "train"}
    if checker and all(prompt.reference is None for prompt in prompts):
        raise ConfigError(
            f"prompts.checker is {checker}, but no prompt has a reference: add references, or set "
            "prompts.checker: null"
        )
    if checker:
        find_checker(checker)
    for key, file in evaluation_files(config).items():
        if not storage.exists(file.path):
            raise ConfigError(f"{key}: {file.path} does not exist")
        for name, column in read_evaluation_file(file).items():
            if column.num_empty:
                logger.warning(
                    "caution: %s has no text in the column %r of %d rows, which are skipped",
                    file.path,
                    name,
                    column.num_empty,
                )
    for rule in config.synthesis.filters:
        if isinstance(rule, Balance) and rule.shares.keys() != trained:
            raise ConfigError(
                f"filter balance has shares for {sorted(rule.shares)}, and the domains of train "
                f"prompts are {sorted(trained)}: give one share for each domain"
            )
        if isinstance(rule, Judge):
            rubric_of(rule)
