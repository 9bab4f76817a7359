"""Preflight of tokenizers: does each token id mean the same to all teachers and to the student?

Sequences are tokenised once with the student's tokenizer and chat template, and every teacher is
given these ids. Each id must therefore stand for the same string everywhere, every teacher must end
answers as the student does, and every teacher's own tokenizer and template must turn the prompts
into the same ids, unless the config allows the difference by name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace

from transformers import GenerationConfig, PreTrainedTokenizerBase

from pipeline.config.base import ModelFiles
from pipeline.config.run import Config
from pipeline.errors import ConfigError, VocabularyMismatchError
from pipeline.records import Prompt
from teachers.preflight.models import named
from teachers.tokenizing import chat_end, load_tokenizer, prompt_ids, tokenizer_hash

logger = logging.getLogger(__name__)

ENTRIES_LISTED = 8
PROMPTS_COMPARED = 1000


def check_vocabularies(config: Config, prompts: Sequence[Prompt]) -> str:
    """Compares every teacher's tokenizer with the student's; returns the student's tokenizer hash.

    Ids that no tokenizer uses (the padding of an embedding matrix) are ignored, and so are teachers
    that only exchange text.

    Raises:
        ConfigError: a tokenizer cannot be loaded, or the student's has no end-of-sequence token.
        VocabularyMismatchError: entries differ; the message lists them.
    """
    student = load_tokenizer(config.student.files)
    if student.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {config.student.model} has no end-of-sequence token: name the token "
            "that ends answers in student.eos_token"
        )
    step = max(1, len(prompts) // PROMPTS_COMPARED)
    sample = prompts[::step][:PROMPTS_COMPARED]
    if chat := next((prompt for prompt in sample if prompt.messages is not None), None):
        prompt_ids(student, chat)  # without a template nothing else is worth comparing
    problems = []
    for name, teacher in config.teachers.items():
        if teacher.files is None:
            continue  # its answers are text, which the student's tokenizer turns into ids
        # Its own template is compared under the same arguments.
        files = replace(teacher.files, template_prelude=config.student.files.template_prelude)
        tokenizer = load_tokenizer(files)
        with named(f"teachers.{name}"):
            lines = _differences(student, tokenizer)
            lines += _end_differences(name, student, tokenizer, end_token_ids(files), sample)
            if not lines and not teacher.allow_chat_template_difference:
                lines = _rendering_differences(student, tokenizer, sample)
        problems += [f"teacher {name!r}: {line}" for line in lines]
    if problems:
        raise VocabularyMismatchError(
            "teachers and student must share one vocabulary and one prompt format:\n  "
            + "\n  ".join(problems)
        )
    return tokenizer_hash(student)


def _differences(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> list[str]:
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    differing = [
        index
        for index in sorted(ours.keys() | theirs.keys())
        if ours.get(index) != theirs.get(index)
    ]
    lines = [
        f"id {index} is {theirs.get(index)!r}, the student's is {ours.get(index)!r}"
        for index in differing[:ENTRIES_LISTED]
    ]
    if len(differing) > ENTRIES_LISTED:
        lines.append(
            f"… {len(differing)} ids differ in all, of {len(ours)} of the student and "
            f"{len(theirs)} of the teacher"
        )
    return lines


def further_ends(config: Config, ends: Set[int | None]) -> dict[str, list[int]]:
    """Tokens with which teachers end answers beside those of the run, by teacher.

    An engine knows the tokens of its model's generation config alone.

    Args:
        ends: tokens with which the run's answers end.
    """
    found = {
        name: [token for token in end_token_ids(teacher.files) if token not in ends]
        for name, teacher in config.teachers.items()
        if teacher.files is not None
    }
    return {name: tokens for name, tokens in found.items() if tokens}


def end_token_ids(files: ModelFiles) -> list[int]:
    """Tokens with which a model ends answers: the end that its chat template writes, the
    tokenizer's end of sequence, and those of the generation config.
    """
    tokenizer = load_tokenizer(files)
    try:
        settings = GenerationConfig.from_pretrained(files.model, revision=files.revision or "main")
    except (OSError, ValueError):  # a model without the file
        settings = GenerationConfig()
    listed = settings.eos_token_id
    listed = listed if isinstance(listed, list) else [listed]
    ends = (chat_end(tokenizer), tokenizer.eos_token_id, *listed)
    return list(dict.fromkeys(end for end in ends if isinstance(end, int)))


def _end_differences(
    name: str,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    theirs: Sequence[int],
    prompts: Sequence[Prompt],
) -> list[str]:
    """Refuses a teacher that never writes the token with which the student's answers end.

    Its distribution at that token has next to no mass on it and would teach the student not to
    stop. Where only the templates differ, which the config may allow, a warning says so.
    """
    chat, text = chat_end(student), student.eos_token_id
    assert isinstance(text, int), "a tokenizer without one is refused above"
    chat = text if chat is None else chat
    ours = {text if prompt.messages is None else chat for prompt in prompts}
    if ours <= set(theirs):
        return []
    if teacher.eos_token_id == text:
        logger.warning(
            "teacher %r ends answers by %s and the student by %s: its distributions teach the "
            "student not to stop; name the teacher's template in student.chat_template, or leave "
            "the teacher out",
            name,
            _named(teacher, theirs),
            _named(student, ours),
        )
        return []
    end = teacher.convert_ids_to_tokens(theirs[0]) if theirs else None
    if chat != text and chat in ours - set(theirs):
        remedy = "name the teacher's template in student.chat_template"
    else:
        remedy = f"set student.eos_token: {end!r} to end the student's answers by it, too"
    said = [_named(student, ours), _named(teacher, theirs) or "no token"]
    return [f"it ends answers by {said[1]}, the student by {said[0]}: {remedy}"]


def _named(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    return " or ".join(f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" for i in ids)


def _rendering_differences(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> list[str]:
    for prompt in prompts:
        if prompt.messages is not None and teacher.chat_template is None:
            return [
                "it has no chat template: set allow_chat_template_difference to give it the "
                "student's rendering"
            ]
        ours, theirs = prompt_ids(student, prompt), prompt_ids(teacher, prompt)
        if ours != theirs:
            return [
                f"prompt {prompt.prompt_id} renders as {teacher.decode(theirs)!r}, "
                f"the student's rendering is {student.decode(ours)!r}: "
                "set allow_chat_template_difference to give it the student's rendering"
            ]
    return []
