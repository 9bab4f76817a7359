"""Preflight of the chat template's settings, and the answers that the template has to suit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from pipeline.config.base import ModelFiles
from pipeline.config.run import Config
from pipeline.config.synthesis import GivenAnswers
from pipeline.config.teachers import EndpointTeacherConfig
from pipeline.errors import ConfigError
from pipeline.records import Prompt
from pipeline.synthesis.steps import planned_answers
from pipeline.templating import DEFAULT_DATE, reads
from teachers.rendering import template_of
from teachers.tokenizing import load_tokenizer

logger = logging.getLogger(__name__)

_DATE_FUNCTION = "strftime_now"


def check_template(config: Config) -> str | None:
    """Checks that the student's chat template reads what the config gives it.

    Servers that render chats themselves are not told the student's arguments, which is logged.

    Returns:
        The day that the template writes as today, in ISO form; None if it writes none.

    Raises:
        ConfigError: the template reads no such variable.
    """
    student, template = config.student, _template(config.student.files) or ""
    unread = [name for name in student.template_arguments if not reads(template, name)]
    if unread:
        raise ConfigError(
            f"student.template_arguments: the chat template of {student.model} reads no variable "
            f"{', '.join(unread)}: correct the name, or leave it out"
        )
    untold = [
        name
        for name, teacher in config.teachers.items()
        if isinstance(teacher, EndpointTeacherConfig)
        and teacher.returns_text
        and teacher.endpoint.template_arguments is None
    ]
    if untold and student.template_arguments:
        logger.warning(
            "%s: the server renders chats itself and is not told student.template_arguments: give "
            "its template's own in endpoint.template_arguments, or {} if it takes none",
            ", ".join(untold),
        )
    writes_date = reads(template, _DATE_FUNCTION)
    if student.template_date is not None and not writes_date:
        raise ConfigError(
            f"student.template_date: the chat template of {student.model} does not write the day "
            f"of today ({_DATE_FUNCTION}): leave it out, or name the template's own variable in "
            "student.template_arguments"
        )
    if not writes_date:
        return None
    day = (student.template_date or DEFAULT_DATE).isoformat()
    logger.info("the chat template writes the day: it is %s (student.template_date)", day)
    return day


def answered_by_text(config: Config, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts whose answers are text that is tokenized: references, or replies of text APIs.

    Replies are not known: their prompts have no reference here, or one that closes thoughts.
    """
    answered: list[Prompt] = []
    for of_round, step, asked in planned_answers(config, prompts):
        if isinstance(step.recipe, GivenAnswers):
            answered += asked
            continue
        teacher = of_round.author(step.author)
        if isinstance(teacher, EndpointTeacherConfig) and teacher.returns_text:
            # With kept reasoning the replies close the thoughts that a template opens.
            written = "</think>" if teacher.endpoint.reasoning == "keep" else None
            answered += [replace(prompt, reference=written) for prompt in asked]
    return answered


def is_of_no_model(config: Config) -> bool:
    """Whether the chat template is a file that is not the template of a teacher either."""
    if config.student.chat_template is None:
        return False
    named = _template(config.student.files)
    files = [teacher.files for teacher in config.teachers.values() if teacher.files is not None]
    return all(_template(of_teacher) != named for of_teacher in files)


def _template(files: ModelFiles) -> str | None:
    """A model's chat template without the arguments that the config gives it."""
    return template_of(load_tokenizer(replace(files, template_prelude="")))
