"""Recipes of a config as steps: one author's part in one recipe, with the prompts that it is asked.

Recipes run in the config's order. A recipe that writes prompts hands on a larger pool of prompts; a
recipe that answers reads the pool at its place. Everything follows from the answered shards written
so far; nothing here asks a teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.rounds import rounds_of
from pipeline.config.run import Config
from pipeline.config.synthesis import (
    Answer,
    Answering,
    Complete,
    GivenAnswers,
    Recipe,
    Writing,
    authors_of,
    is_asked,
    is_by_student,
)
from pipeline.fingerprint import digest_json
from pipeline.layout import Layout
from pipeline.records import Prompt
from pipeline.synthesis.index import written_prompts
from pipeline.synthesis.rewriting import PromptRequest, make_requests


@dataclass(frozen=True)
class Step:
    """One recipe for one author.

    Attributes:
        label: name of the step in counts and messages; the author's name if that is unique.
        author: name of a teacher, `student`, or `dataset`.
    """

    label: str
    recipe: Recipe
    author: str


@dataclass(frozen=True)
class StepWork:
    """Prompts of one step.

    Attributes:
        digest: digest of the step's identity, which names its folder of answered shards.
        prompts: prompts in the form in which the step asks them.
        pool: all prompts that have reached the step's place.
        requests: the requests of a step that writes prompts, one for each of `prompts`.
    """

    step: Step
    digest: str
    prompts: list[Prompt]
    pool: list[Prompt]
    requests: list[PromptRequest]


def steps_of(config: Config) -> list[Step]:
    """Steps of the config's round, in the order of the recipes and of the teachers."""
    steps: list[Step] = []
    for recipe in config.synthesis.recipes:
        if not isinstance(recipe, Writing) and not _is_in_round(config, recipe):
            continue
        for author in authors_of(recipe, config.teachers):
            kind = "" if isinstance(recipe, Answer | GivenAnswers) else f"{recipe.type} by "
            label = base = f"{kind}{author}"
            others, number = {step.label for step in steps}, 1
            while label in others:
                number += 1
                label = f"{base} ({number})"
            steps.append(Step(label, recipe, author))
    return steps


def walk(
    config: Config, layout: Layout, digests: Mapping[str, str], prompts: Sequence[Prompt]
) -> Iterator[StepWork]:
    """Yields the work of each step in order.

    The prompts that a step writes exist once its work is done: do it before taking the next step
    from the iterator.

    Args:
        digests: digest of each step's identity by the step's label.
        prompts: the given prompts.

    Raises:
        ConfigError: a template cannot be used.
    """
    pool = list(prompts)
    for step in steps_of(config):
        digest = digests[step.label]
        if not isinstance(step.recipe, Writing):
            yield StepWork(step, digest, prompts_to_answer(config, step, pool), pool, [])
            continue
        requests = make_requests(step.recipe, pool, config.seed)
        request_prompts = [request.prompt for request in requests]
        yield StepWork(step, digest, request_prompts, pool, requests)
        written = written_prompts(layout, digest, request_prompts)
        known = {digest_json([prompt.messages, prompt.text]) for prompt in pool}
        new = {p.prompt_id: p for p in written if p.prompt_id not in known}
        pool = [*handed_on(step.recipe, pool), *new.values()]


def prompts_to_answer(config: Config, step: Step, pool: Sequence[Prompt]) -> list[Prompt]:
    """Prompts of a pool that a step answers, with the step's system prompt."""
    system = _system_prompt(step.recipe)
    return [prompt.under(system) for prompt in pool if _answers(config, step, prompt)]


def planned_answers(
    config: Config, prompts: Sequence[Prompt]
) -> Iterator[tuple[Config, Step, list[Prompt]]]:
    """Yields every step of every round that answers, with the config of its round and the given
    prompts that the step will be asked.
    """
    for of_round in rounds_of(config):
        pool = list(prompts)
        for step in steps_of(of_round):
            if isinstance(step.recipe, Writing):
                pool = handed_on(step.recipe, pool)
            else:
                yield of_round, step, prompts_to_answer(of_round, step, pool)


def handed_on(recipe: Writing, pool: Sequence[Prompt]) -> list[Prompt]:
    """Prompts that a recipe reads and hands on to the recipes behind it."""
    return [prompt for prompt in pool if recipe.keep_input or prompt.split != "train"]


def all_prompts(steps: Sequence[StepWork], prompts: Sequence[Prompt]) -> list[Prompt]:
    """Given and written prompts, each once."""
    by_id = {prompt.prompt_id: prompt for prompt in prompts}
    for work in steps:
        for prompt in work.pool:
            by_id.setdefault(prompt.prompt_id, prompt)
    return list(by_id.values())


def with_system_prompts(config: Config, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts in every form that recipes or the evaluation ask: one for each system prompt."""
    recipes = [recipe for recipe in config.synthesis.recipes if not isinstance(recipe, Writing)]
    systems = dict.fromkeys([*map(_system_prompt, recipes), config.evaluation.system_prompt])
    return [prompt.under(system) for system in systems for prompt in prompts]


def _is_in_round(config: Config, recipe: Answering | GivenAnswers) -> bool:
    """Whether a recipe has a step in the config's round.

    A student that writes nothing in a round has none: it may not have weights yet to serve.
    """
    return not is_by_student(recipe) or is_asked(recipe, "train", config.round)


def _answers(config: Config, step: Step, prompt: Prompt) -> bool:
    recipe = step.recipe
    assert not isinstance(recipe, Writing), "prompts are written in reply to requests"
    if not is_asked(recipe, prompt.split, config.round):
        return False
    if isinstance(recipe, GivenAnswers):
        return prompt.reference is not None
    if isinstance(recipe, Complete) and prompt.text is None:
        return False
    return recipe.by != "domain_teacher" or prompt.domain in config.teachers[step.author].domains


def _system_prompt(recipe: Recipe) -> str | None:
    return recipe.system_prompt if isinstance(recipe, Answer) else None
