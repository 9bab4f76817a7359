"""Rules of the configuration that concern several sections at once.

Each check takes the sections that it compares, and raises a `ValueError` with a message for users.
`Config` calls all of them. Rules within one section are validators of that section.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from pipeline.config.base import Resources
from pipeline.config.combine import LINEAR_METHODS, CombineConfig
from pipeline.config.filters import BestOf, Checker, Filter
from pipeline.config.losses import TeacherLoss
from pipeline.config.prompts import PromptsConfig
from pipeline.config.scoring import HiddenStatesStorage, ScoringConfig
from pipeline.config.student import StudentConfig
from pipeline.config.synthesis import (
    DATASET_AUTHOR,
    STUDENT,
    Answer,
    Answering,
    GivenAnswers,
    SynthesisConfig,
    Writing,
    authors_of,
    is_asked,
    is_by_student,
)
from pipeline.config.teachers import (
    AnyTeacher,
    EndpointTeacherConfig,
    TeacherConfig,
    scoring_teachers,
)
from pipeline.config.training import TrainingConfig
from pipeline.messages import closest

Teachers = Mapping[str, AnyTeacher]
PARALLEL_SIZES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "prefill_context_parallel_size",
)
"""Engine arguments whose product is the number of an engine's processes, one on each GPU."""


def check_teacher_names(teachers: Teachers) -> None:
    """Refuses teachers whose names mean another model."""
    for name in (STUDENT, "twin", DATASET_AUTHOR):
        if name in teachers:
            raise ValueError(
                f"a teacher cannot be named {name!r}, since that name means another model: rename "
                "the teacher"
            )


def check_rounds(
    number: int, rounds: int, twin: bool, synthesis: SynthesisConfig, student: StudentConfig
) -> None:
    """Checks that every round has sequences of its own to train on, and an author for them.

    Args:
        number: the config's own round.
        twin: whether a twin is trained.
    """
    if number > rounds:
        raise ValueError(f"round ({number}) is above rounds ({rounds}): lower it, or raise rounds")
    if rounds > 1 and twin:
        raise ValueError(
            f"with rounds: {rounds} the twin would learn by cross-entropy from the student's own "
            "text, which compares nothing: set evaluation.twin: false"
        )
    recipes = [r for r in synthesis.recipes if isinstance(r, Answering | GivenAnswers)]
    if all(is_by_student(recipe) for recipe in recipes):
        raise ValueError(
            "synthesis.recipes: nobody answers the hold-out prompts, since the student answers "
            "train prompts only: add a recipe by teachers or of type `dataset`, with train_rounds: "
            "none if it shall answer nothing else"
        )
    for each_round in range(1, rounds + 1):
        if not any(is_asked(recipe, "train", each_round) for recipe in recipes):
            raise ValueError(
                f"no recipe answers train prompts in round {each_round} of {rounds}: change the "
                "train_rounds of a recipe"
            )
    if rounds > 1 and all(
        recipe.train_rounds == "all" and not is_by_student(recipe) for recipe in recipes
    ):
        raise ValueError(
            f"with rounds: {rounds} every round would train on the same sequences: let the student "
            "write (`by: student`), or give recipes other train_rounds"
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
            "student is never asked: raise rounds, or remove the recipe"
        )
    is_random = student.initialization == "random" and student.initial_weights is None
    if is_random and is_asked(recipe, "train", 1):
        raise ValueError(
            f"{place}: in round 1 the student has random weights and can write nothing useful: set "
            "train_rounds: later, and let teachers answer in round 1"
        )


def check_weights(combine: CombineConfig, teachers: Teachers) -> None:
    """Checks that fixed weights name teachers that score, and that their sum is above 0."""
    for place, table in combine.weights.fixed_tables.items():
        if unknown := sorted(table.keys() - teachers.keys()):
            raise ValueError(f"{place} names {unknown}, but the teachers are {sorted(teachers)}")
        if without_rows := sorted(table.keys() - set(scoring_teachers(teachers))):
            raise ValueError(
                f"{place} gives a weight to {without_rows}, which do not score and have no cache: "
                "leave them out"
            )
        if sum(table.values()) <= 0:
            raise ValueError(f"{place} must give at least one teacher a weight above 0")


def check_hidden_states(
    scoring: ScoringConfig, training: TrainingConfig, teachers: Teachers
) -> None:
    """Checks that teachers can give the hidden states that losses need, and that some loss does."""
    if not training.teacher_layers and scoring.features != HiddenStatesStorage():
        raise ValueError(
            "scoring.features sets the storage of hidden states, but no loss needs any: leave it "
            "out, or add a loss on hidden states to training.losses"
        )
    for name in training.teacher_layers:
        if name not in teachers:
            raise ValueError(
                f"training.losses names the teacher {name!r}; {closest(name, teachers)}"
            )
        if isinstance(teachers[name], EndpointTeacherConfig):
            raise ValueError(
                f"training.losses needs hidden states of teacher {name!r}, which an endpoint does "
                "not give: serve that teacher by `model`, or remove the loss"
            )


def check_draws(scoring: ScoringConfig, training: TrainingConfig, combine: CombineConfig) -> None:
    """Checks that draws, if the selection keeps any, are only used linearly.

    A loss or combination that does not say that it is linear is refused, also one added later.
    """
    selection = scoring.selection
    if not selection.is_drawn:
        return
    beginning = f"scoring.selection {selection.type!r} keeps draws, which are"
    for loss in training.losses:
        if not loss.takes_draws:
            raise ValueError(
                f"{beginning} unbiased only in losses that are linear in the teachers' "
                f"probabilities, such as forward_kl; {loss.type!r} needs the probabilities "
                "themselves: choose the selection top_k or top_p, or another loss"
            )
        if isinstance(loss, TeacherLoss) and loss.temperature != 1:
            raise ValueError(
                f"{beginning} taken at temperature 1; {loss.type!r} at temperature "
                f"{loss.temperature:g} would apply the temperature to single draws: set "
                "temperature: 1, or choose the selection top_k or top_p"
            )
    if combine.method not in LINEAR_METHODS:
        raise ValueError(
            f"{beginning} unbiased only in sums of the teachers' probabilities; combine.method "
            f"{combine.method!r} is no sum: choose {' or '.join(sorted(LINEAR_METHODS))}, or the "
            "selection top_k or top_p"
        )


def check_recipe_authors(synthesis: SynthesisConfig, teachers: Teachers) -> None:
    """Checks that recipes name teachers, and that each domain has one teacher where that counts."""
    choices = {*teachers, "domain_teacher", "every_teacher", STUDENT}
    if any(isinstance(r, Answering) and r.by == "domain_teacher" for r in synthesis.recipes):
        _check_domains(teachers)
    for i, recipe in enumerate(synthesis.recipes):
        place = f"synthesis.recipes.{i} ({recipe.type})"
        if isinstance(recipe, Writing):
            _check_teacher(place, recipe.teacher, teachers)
        if not isinstance(recipe, Answering):
            continue
        if recipe.by not in choices:
            raise ValueError(
                f"{place}: `by: {recipe.by}` is neither a teacher nor `student`, `domain_teacher` "
                f"or `every_teacher`; {closest(recipe.by, choices)}"
            )
        for name in recipe.sampling_of:
            _check_teacher(f"{place}, sampling_of", name, teachers)
            if name not in authors_of(recipe, teachers):
                raise ValueError(
                    f"{place} has sampling_of for {name!r}, which does not write there, since the "
                    f"recipe is by {recipe.by}: remove that entry"
                )


def _check_teacher(place: str, name: str, teachers: Teachers) -> None:
    if name not in teachers:
        raise ValueError(f"{place} names the teacher {name!r}; {closest(name, teachers)}")


def _check_domains(teachers: Teachers) -> None:
    owner: dict[str, str] = {}
    for name, teacher in teachers.items():
        for domain in teacher.domains:
            if domain in owner:
                raise ValueError(
                    f"domain {domain!r} is claimed by teachers {owner[domain]!r} and {name!r}, but "
                    "a recipe by domain_teacher needs one teacher for each domain: remove it from "
                    "the `domains` of one of them"
                )
            owner[domain] = name


def check_sequence_length(synthesis: SynthesisConfig, training: TrainingConfig) -> None:
    """Checks that a micro-batch holds the longest sequence that synthesis may keep."""
    longest, budget = synthesis.max_sequence_tokens, training.tokens_per_micro_batch
    if longest is not None and longest > budget:
        raise ValueError(
            f"synthesis.max_sequence_tokens ({longest}) exceeds training.tokens_per_micro_batch "
            f"({budget}), and training cuts no sequence: lower the first, or raise the second"
        )


def check_system_prompts(synthesis: SynthesisConfig, evaluation_has_one: bool) -> None:
    """Checks that the evaluation says how prompts are asked if answers have a system prompt.

    Args:
        evaluation_has_one: whether `evaluation.system_prompt` is given, be it null.
    """
    prompts = {r.system_prompt for r in synthesis.recipes if isinstance(r, Answer)} - {None}
    if prompts and not evaluation_has_one:
        raise ValueError(
            f"synthesis.recipes answer under a system_prompt ({', '.join(map(repr, prompts))}), "
            "and the student learns to answer under it: set evaluation.system_prompt to the same "
            "text or `null`, to say how the hold-out prompts are asked"
        )


def check_filter_needs(
    synthesis: SynthesisConfig, prompts: PromptsConfig, teachers: Teachers
) -> None:
    """Checks that filters have the checker, teachers and answers that they need."""
    authors = {*teachers, STUDENT, DATASET_AUTHOR}
    for i, rule in enumerate(synthesis.filters):
        place = f"synthesis.filters.{i} ({rule.type})"
        if isinstance(rule, Checker) and prompts.checker is None:
            raise ValueError(
                f"{place} needs prompts.checker, the function that compares an answer with its "
                "reference: set it, or remove the filter"
            )
        _check_filter_teacher(place, rule, teachers)
        most = synthesis.most_answers(len(teachers))
        if isinstance(rule, BestOf) and rule.keep >= most:
            raise ValueError(
                f"{place} keeps {rule.keep} answers to a prompt, but there are at most {most}: "
                "lower keep, or remove the filter"
            )
        for name in rule.spares:
            if name not in authors:
                raise ValueError(f"{place} spares {name!r}; {closest(name, authors)}")


def _check_filter_teacher(place: str, rule: Filter, teachers: Teachers) -> None:
    if rule.named_teacher is not None:
        _check_teacher(place, rule.named_teacher, teachers)
    scoring = scoring_teachers(teachers)
    if rule.scoring_teacher is not None and rule.scoring_teacher not in scoring:
        raise ValueError(
            f"{place} needs cached rows of {rule.scoring_teacher!r}, which does not score: name "
            f"one of {scoring}"
        )


def check_judge(judge: str, against: Sequence[str], twin: bool, teachers: Teachers) -> None:
    """Checks that a judge is a teacher, and that what it compares is served in the evaluation.

    Args:
        judge: name of the teacher that judges.
        against: models whose answers are compared with the student's; none means the twin.
        twin: whether a twin is trained.
    """
    _check_teacher("evaluation.judge.teacher", judge, teachers)
    if not against and not twin:
        raise ValueError(
            "evaluation.judge compares the student with the twin, and there is none: name teachers "
            "in evaluation.judge.against, or set evaluation.twin: true"
        )
    served = [*scoring_teachers(teachers), *(["twin"] if twin else [])]
    for name in against:
        if name not in served:
            raise ValueError(
                f"evaluation.judge.against names {name!r}, which the evaluation does not serve; "
                f"{closest(name, served)}"
            )


def check_endpoints(teachers: Teachers, num_logprobs: int, env_vars: Container[str]) -> None:
    """Checks that some teacher scores, and that endpoints can do what the config asks of them.

    Args:
        num_logprobs: capture width of the run.
        env_vars: names in `cluster.env_vars`, which must not hold the key of an endpoint.
    """
    if not scoring_teachers(teachers):
        raise ValueError("no teacher scores, so there is nothing to distil: add one that scores")
    for name, teacher in teachers.items():
        if not isinstance(teacher, EndpointTeacherConfig):
            continue
        endpoint, place = teacher.endpoint, f"teachers.{name}.endpoint"
        if endpoint.scores and num_logprobs > endpoint.max_logprobs:
            raise ValueError(
                f"scoring.num_logprobs is {num_logprobs}, but {place} returns at most "
                f"{endpoint.max_logprobs}: start the server with `--max-logprobs {num_logprobs}` "
                f"and set {place}.max_logprobs, or lower num_logprobs"
            )
        if endpoint.api_key_env is not None and endpoint.api_key_env in env_vars:
            raise ValueError(
                f"cluster.env_vars holds {endpoint.api_key_env}, the key of teacher {name!r}, so "
                "the config and Ray's job list would show it: remove it there, and export it "
                "before Ray is started"
            )


def check_engine_devices(teachers: Teachers, student: StudentConfig, evaluation: Resources) -> None:
    """Checks that each engine asks Ray for as many GPUs as its parallel sizes take.

    On CPUs every process of an engine needs at least one CPU. Engines that Ray itself spreads over
    nodes reserve their GPUs outside the actor and are left alone.

    Args:
        evaluation: resources of the engines that serve the student.
    """
    for name, teacher in teachers.items():
        if isinstance(teacher, TeacherConfig):
            place = f"teachers.{name}"
            _check_devices(f"{place}.vllm", teacher.vllm, f"{place}.resources", teacher.resources)
    _check_devices("student.vllm", student.vllm, "evaluation.resources", evaluation)


def _check_devices(
    place: str, block: Mapping[str, Any], resources_place: str, resources: Resources
) -> None:
    backends = ("distributed_executor_backend", "data_parallel_backend")
    sizes = {key: block[key] for key in PARALLEL_SIZES if key in block}
    is_known = all(isinstance(size, int) and size > 0 for size in sizes.values())
    if any(block.get(key) == "ray" for key in backends) or not is_known:
        return
    processes, gpus = math.prod(sizes.values()), resources.num_gpus
    said = ", ".join(f"{key}: {size}" for key, size in sizes.items()) or "no parallel size"
    if gpus == 0 and resources.num_cpus < processes > 1:
        raise ValueError(
            f"{place} with {said} runs {processes} processes, but {resources_place} reserves no "
            f"GPU and {resources.num_cpus:g} CPUs: set num_gpus: {processes} there, or num_cpus: "
            f"{processes} or more for an engine on CPUs"
        )
    number = "1 process, on a GPU of its own"
    if processes > 1:
        number = f"{processes} processes, each on a GPU of its own"
    if gpus > 0 and math.ceil(gpus) != processes:
        raise ValueError(
            f"{place} with {said} runs {number}, but "
            f"{resources_place}.num_gpus is {gpus:g}: set num_gpus: {processes} there, or change "
            "the parallel sizes"
        )
