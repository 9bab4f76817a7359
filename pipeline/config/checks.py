"""Rules of the configuration that concern several sections at once."""

from __future__ import annotations

from pipeline.config.student import StudentConfig
from pipeline.config.synthesis import (
    Answering,
    GivenAnswers,
    SynthesisConfig,
    is_asked,
    is_by_student,
)


def check_rounds(
    number: int, rounds: int, twin: bool, synthesis: SynthesisConfig, student: StudentConfig
) -> None:
    """Checks that every round has something of its own to train on, written by somebody.

    Args:
        number: the config's own round.
        twin: whether a twin is trained.

    Raises:
        ValueError: a round has nothing of its own; a twin is trained, whose rounds would compare
            nothing; or `number` is none of the rounds.
    """
    if number > rounds:
        raise ValueError(f"round ({number}) is above rounds ({rounds})")
    if rounds > 1 and twin:
        raise ValueError(
            f"with rounds: {rounds} the twin would learn by cross-entropy from what the student "
            "writes, which compares nothing: set evaluation.twin: false"
        )
    recipes = [r for r in synthesis.recipes if isinstance(r, Answering | GivenAnswers)]
    if all(is_by_student(recipe) for recipe in recipes):
        raise ValueError(
            "synthesis.recipes: the student answers train prompts alone, so nobody answers those "
            "of the hold-out split: add a recipe of teachers or `dataset`, with train_rounds: none "
            "if only that is wanted of it"
        )
    for each in range(1, rounds + 1):
        if not any(is_asked(recipe, "train", each) for recipe in recipes):
            raise ValueError(
                f"no recipe answers train prompts in round {each} of {rounds}: see their "
                "train_rounds"
            )
    if rounds > 1 and all(
        recipe.train_rounds == "all" and not is_by_student(recipe) for recipe in recipes
    ):
        raise ValueError(
            f"rounds: {rounds}, and every round would train on the same sequences: let the "
            "student write (`by: student`), or give recipes other train_rounds"
        )
    for i, recipe in enumerate(synthesis.recipes):
        if isinstance(recipe, Answering) and is_by_student(recipe):
            place = f"synthesis.recipes.{i} ({recipe.type} by student)"
            _check_student_writes(place, recipe, rounds, student)


def _check_student_writes(
    place: str, recipe: Answering, rounds: int, student: StudentConfig
) -> None:
    if not any(is_asked(recipe, "train", number) for number in range(1, rounds + 1)):
        raise ValueError(
            f"{place} has train_rounds: {recipe.train_rounds} and rounds is {rounds}, so the "
            "student is never asked: raise rounds, or leave the recipe out"
        )
    is_random = student.initialization == "random" and student.initial_weights is None
    if is_random and is_asked(recipe, "train", 1):
        raise ValueError(
            f"{place}: in round 1 the student has random weights and nothing to say; set "
            "train_rounds: later, and let teachers answer in round 1"
        )
