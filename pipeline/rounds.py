"""Rounds: the same stages again, each time from the student that the round before has exported.

    runs/<name>/   round 1        runs/<name>/rounds/2/   round 2        …

A round is a run like any other: its folder holds what a run's folder holds, and its config is the
run's with another start of the student. Caches, answers and prompts are shared, so that a round
asks only what no other has asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config_recipes import STUDENT, Answering, GivenAnswers
from pipeline.layout import Layout

if TYPE_CHECKING:
    from pipeline.config import Config


def layout_of(config: Config) -> Layout:
    """The paths of a run, in its round."""
    return round_layouts(config)[-1]


def round_layouts(config: Config) -> list[Layout]:
    """The paths of every round up to the config's own."""
    first = Layout(config.storage.root, config.name, config.storage.models_root)
    return [first.of_round(number) for number in range(1, config.round + 1)]


def rounds_of(config: Config) -> list[Config]:
    """The config of each round, from the one that the config is about to the last."""
    return [of_round(config, number) for number in range(config.round, config.rounds + 1)]


def of_round(config: Config, number: int) -> Config:
    """The config of one round, with absolute paths; not of one before the config's own.

    Beyond the first, the student starts from the one that the round before has exported.
    """
    assert number >= config.round, "the start of a former round is not known any more"
    if number == 1:
        return config
    first, *_ = round_layouts(config)
    start = first.of_round(number - 1).export_folder(STUDENT)
    student = config.student.model_copy(update={"initial_weights": start})
    return config.model_copy(update={"round": number, "student": student})


def is_asked(recipe: Answering | GivenAnswers, split: str, number: int) -> bool:
    """Whether a recipe has prompts of a split answered in a round.

    The student answers train prompts alone: losses on validation and hold-out sequences are those
    of the same sequences in every round.
    """
    if split != "train":
        return not is_by_student(recipe)
    trained = {"all": True, "first": number == 1, "later": number > 1, "none": False}
    return trained[recipe.train_rounds]


def is_by_student(recipe: Answering | GivenAnswers) -> bool:
    """Whether the student is the one who writes."""
    return isinstance(recipe, Answering) and recipe.by == STUDENT


def check_rounds(config: Config) -> None:
    """Checks that every round has something of its own to train on, written by somebody.

    Raises:
        ValueError: it has not; the twin is trained, whose rounds would compare nothing; or `round`
            is none of the rounds.
    """
    if config.round > config.rounds:
        raise ValueError(f"round ({config.round}) is above rounds ({config.rounds})")
    if config.rounds > 1 and config.evaluation.twin:
        raise ValueError(
            f"with rounds: {config.rounds} the twin would learn by cross-entropy from what the "
            "student writes, which compares nothing: set evaluation.twin: false"
        )
    recipes = [r for r in config.synthesis.recipes if isinstance(r, Answering | GivenAnswers)]
    if all(is_by_student(recipe) for recipe in recipes):
        raise ValueError(
            "synthesis.recipes: the student answers train prompts alone, so nobody answers those "
            "of the hold-out split: add a recipe of teachers or `dataset`, with train_rounds: none "
            "if only that is wanted of it"
        )
    for number in range(1, config.rounds + 1):
        if not any(is_asked(recipe, "train", number) for recipe in recipes):
            raise ValueError(
                f"no recipe answers train prompts in round {number} of {config.rounds}: see their "
                "train_rounds"
            )
    if config.rounds > 1 and all(
        recipe.train_rounds == "all" and not is_by_student(recipe) for recipe in recipes
    ):
        raise ValueError(
            f"rounds: {config.rounds}, and every round would train on the same sequences: let the "
            "student write (`by: student`), or give recipes other train_rounds"
        )
    for i, recipe in enumerate(config.synthesis.recipes):
        if isinstance(recipe, Answering) and is_by_student(recipe):
            _check_student(config, f"synthesis.recipes.{i} ({recipe.type} by student)", recipe)


def _check_student(config: Config, place: str, recipe: Answering) -> None:
    if not any(is_asked(recipe, "train", number) for number in range(1, config.rounds + 1)):
        raise ValueError(
            f"{place} has train_rounds: {recipe.train_rounds} and rounds is {config.rounds}, so "
            "the student is never asked: raise rounds, or leave the recipe out"
        )
    start = config.student.initial_weights
    is_random = config.student.initialization == "random" and start is None
    if is_random and is_asked(recipe, "train", 1):
        raise ValueError(
            f"{place}: in round 1 the student has random weights and nothing to say; set "
            "train_rounds: later, and let teachers answer in round 1"
        )
