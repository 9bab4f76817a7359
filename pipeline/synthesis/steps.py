"""The recipes of a config as steps: who does what with which prompts, from what is recorded so far.

Recipes run in the config's order. Those that write prompts hand on a larger pool; those that answer
read the pool as it is at their place. Nothing here asks a teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.config.run import Config
from pipeline.config.synthesis import (
    DATASET_GENERATOR,
    Answer,
    Answering,
    Complete,
    GivenAnswers,
    Recipe,
    Writing,
    is_asked,
    is_by_student,
)
from pipeline.fingerprint import digest_json
from pipeline.layout import Layout
from pipeline.records import Prompt
from pipeline.synthesis.index import written_prompts
from pipeline.synthesis.rewriting import Request, make_requests


@dataclass(frozen=True)
class Step:
    """One recipe for one generator.

    Attributes:
        label: names its recipe and its counts; the generator's name where that is unique.
        generator: a teacher, `student`, or `dataset`.
    """

    label: str
    recipe: Recipe
    generator: str


@dataclass(frozen=True)
class Work:
    """What a step asks.

    Attributes:
        digest: of the step's recipe.
        prompts: as they are asked.
        pool: all prompts that stand at the step's place.
        requests: of a step that writes prompts, one for each of `prompts`.
    """

    step: Step
    digest: str
    prompts: list[Prompt]
    pool: list[Prompt]
    requests: list[Request]


def steps_of(config: Config) -> list[Step]:
    """The steps of the config's round, in the order of the recipes and of the teachers."""
    steps: list[Step] = []
    for recipe in config.synthesis.recipes:
        if not isinstance(recipe, Writing) and not _is_in_round(config, recipe):
            continue
        for generator in generators_of(config, recipe):
            kind = "" if isinstance(recipe, Answer | GivenAnswers) else f"{recipe.type} by "
            label = base = f"{kind}{generator}"
            others, number = {step.label for step in steps}, 1
            while label in others:
                number += 1
                label = f"{base} ({number})"
            steps.append(Step(label, recipe, generator))
    return steps


def generators_of(config: Config, recipe: Recipe) -> list[str]:
    """Who works on a recipe."""
    if isinstance(recipe, GivenAnswers):
        return [DATASET_GENERATOR]
    if isinstance(recipe, Writing):
        return [recipe.teacher]
    return config.generators_of(recipe)


def walk(
    config: Config, layout: Layout, digests: Mapping[str, str], prompts: Sequence[Prompt]
) -> Iterator[Work]:
    """The work of each step, in order.

    The prompts that a step writes exist once its work has been done: run it before asking for the
    next one.

    Args:
        digests: by the label of a step, the digest that names its folder of records.

    Raises:
        ConfigError: a template cannot be used.
    """
    pool = list(prompts)
    for step in steps_of(config):
        digest = digests[step.label]
        if not isinstance(step.recipe, Writing):
            yield Work(step, digest, asked_of(config, step, pool), pool, [])
            continue
        requests = make_requests(step.recipe, pool, config.seed)
        yield Work(step, digest, [request.asked for request in requests], pool, requests)
        written = written_prompts(layout, digest, [request.asked for request in requests])
        kept = handed_on(step.recipe, pool)
        known = {digest_json([prompt.messages, prompt.text]) for prompt in pool}
        new = {p.prompt_id: p for p in written if p.prompt_id not in known}
        pool = [*kept, *new.values()]


def asked_of(config: Config, step: Step, pool: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that a step has answered, as they are asked."""
    system = _system_prompt(step.recipe)
    return [prompt.under(system) for prompt in pool if _answers(config, step, prompt)]


def handed_on(recipe: Writing, pool: Sequence[Prompt]) -> list[Prompt]:
    """The prompts that a recipe read and that stand at the next one's place, too."""
    return [prompt for prompt in pool if recipe.keep_input or prompt.split != "train"]


def all_prompts(work: Sequence[Work], prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those given and those written, each once."""
    found = {prompt.prompt_id: prompt for prompt in prompts}
    for each in work:
        for prompt in each.pool:
            found.setdefault(prompt.prompt_id, prompt)
    return list(found.values())


def _is_in_round(config: Config, recipe: Answering | GivenAnswers) -> bool:
    """A student that writes nothing in a round may have no weights yet that could be served."""
    return not is_by_student(recipe) or is_asked(recipe, "train", config.round)


def _answers(config: Config, step: Step, prompt: Prompt) -> bool:
    recipe = step.recipe
    assert not isinstance(recipe, Writing), "prompts are written from requests"
    if not is_asked(recipe, prompt.split, config.round):
        return False
    if isinstance(recipe, GivenAnswers):
        return prompt.reference is not None
    if isinstance(recipe, Complete) and prompt.text is None:
        return False
    return recipe.by != "domain_teacher" or prompt.domain in config.teachers[step.generator].domains


def as_asked(config: Config, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The given prompts in every form in which recipes or the evaluation have them answered."""
    recipes = [r for r in config.synthesis.recipes if not isinstance(r, Writing)]
    systems = dict.fromkeys([*map(_system_prompt, recipes), config.evaluation.system_prompt])
    return [prompt.under(system) for system in systems for prompt in prompts]


def _system_prompt(recipe: Recipe) -> str | None:
    return recipe.system_prompt if isinstance(recipe, Answer) else None
