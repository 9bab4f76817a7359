"""Checks and identities of recipes and filters, for the prepare stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import storage
from pipeline.config.filters import Balance, Filter, Judge
from pipeline.config.load import evaluation_files
from pipeline.config.rounds import rounds_of
from pipeline.config.run import Config
from pipeline.config.synthesis import (
    STUDENT,
    Answer,
    Answering,
    Complete,
    GivenAnswers,
    Writing,
)
from pipeline.config.teachers import EndpointTeacherConfig
from pipeline.errors import ConfigError
from pipeline.filters.answer_checkers import find_checker
from pipeline.filters.run import filter_identity
from pipeline.records import Prompt
from pipeline.run.identities import judging_identity, sampling_of, synthesis_identity
from pipeline.synthesis.rewriting import make_requests, rubric_of
from pipeline.synthesis.steps import handed_on, prompts_to_answer, steps_of
from teachers.engine.options import check_sampling_parameters
from teachers.tasks.judge import grade_tokens
from teachers.tokenizing import load_tokenizer

_NO_PLACE = (
    "system_prompt has no place in raw `text`, and {} prompts are raw `text`: remove it, or give "
    "all prompts as `messages`"
)
Identities = Mapping[str, dict[str, str]]


def check_step_sampling(config: Config) -> None:
    """Checks the SamplingParams of every step of every round.

    Raises:
        ConfigError: vLLM refuses them, or they leave no room for a prompt.
    """
    most = config.synthesis.max_sequence_tokens
    steps = {step.label: step for of_round in rounds_of(config) for step in steps_of(of_round)}
    for step in steps.values():
        if isinstance(step.recipe, GivenAnswers):
            continue
        place = f"synthesis.recipes ({step.label})"
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


def check_lengths(config: Config, prompts: Sequence[Prompt], tokens: Mapping[str, int]) -> None:
    """Checks that every engine that answers holds the longest of its prompts with an answer.

    Args:
        tokens: length of every prompt as it is asked, by its digest.

    Raises:
        ConfigError: an engine is too short, and the config does not let such prompts be dropped.
    """
    for of_round in rounds_of(config):
        pool = list(prompts)
        for step in steps_of(of_round):
            if isinstance(step.recipe, Writing):
                pool = handed_on(step.recipe, pool)
            elif isinstance(step.recipe, Answering):
                lengths = (tokens[p.digest] for p in prompts_to_answer(of_round, step, pool))
                most = sampling_of(step.recipe, step.author)["max_tokens"]
                place = f"synthesis.recipes ({step.label})"
                _check_room(of_round, place, step.author, max(lengths, default=0), most)
    sampling, system = config.evaluation.sampling, config.evaluation.system_prompt
    longest = max(tokens[p.under(system).digest] for p in prompts if p.split == "holdout")
    for name in [*config.scoring_teachers, STUDENT]:
        _check_room(config, "evaluation", name, longest, sampling["max_tokens"])


def _check_room(config: Config, place: str, name: str, prompt: int, answer: int) -> None:
    """Checks that an engine holds `prompt` and `answer` tokens, the most of either.

    A sequence above `synthesis.max_sequence_tokens` is dropped, so the engine need not hold it.
    """
    teacher, bound = config.author(name), config.synthesis.max_sequence_tokens
    need = min(prompt + answer, bound or prompt + answer)
    if not teacher.returns_text and need > (teacher.max_model_len or need):
        raise ConfigError(
            f"{place}: {name} holds max_model_len = {teacher.max_model_len} tokens; the longest "
            f"prompt ({prompt}) and sampling.max_tokens ({answer}) need {need}: raise "
            "max_model_len, lower max_tokens, or set synthesis.max_sequence_tokens to at most "
            f"{teacher.max_model_len}: prompts that leave no room are then dropped and counted"
        )


def check_filters(config: Config, prompts: Sequence[Prompt]) -> None:
    """Checks checkers, files, rubrics, grades and domains that the filters need.

    Raises:
        ConfigError: a checker, file, rubric or domain does not exist, or a grade is no token.
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
    for rule in config.synthesis.filters:
        if isinstance(rule, Balance) and rule.shares.keys() != trained:
            raise ConfigError(
                f"filter balance has shares for {sorted(rule.shares)}, and the domains of train "
                f"prompts are {sorted(trained)}: give one share for each domain"
            )
        if isinstance(rule, Judge):
            rubric_of(rule)
            if not config.teachers[rule.teacher].returns_text:
                grade_tokens(load_tokenizer(config.student.files))


def synthesis_identities(
    config: Config, identities: Identities, tokenizer_hash: str, chat_end: int | None = None
) -> dict[str, dict[str, Any]]:
    """Identities of all steps, by their labels.

    Args:
        identities: identities of the authors' models.
        chat_end: token that ends an answer to a chat, if it is not the end-of-sequence token.
    """
    return {
        step.label: synthesis_identity(
            config,
            step.recipe,
            step.author,
            identities.get(step.author, {}),
            tokenizer_hash,
            chat_end,
        )
        for step in steps_of(config)
    }


def filter_identities(
    config: Config, rules: Sequence[Filter], identities: Identities, tokenizer_hash: str
) -> list[dict[str, Any]]:
    """Identities of filters: everything that decides which answers they keep.

    Args:
        identities: identities of the teachers' models.
    """
    return [
        filter_identity(
            rule,
            config.prompts.checker,
            judging_identity(config, rule, identities[rule.teacher], tokenizer_hash)
            if isinstance(rule, Judge)
            else None,
            config.teachers[rule.teacher].max_model_len if isinstance(rule, Judge) else None,
        )
        for rule in rules
    ]
