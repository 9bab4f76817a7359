"""Preflight of tokenizers: does each token id mean the same to all teachers and to the student?

Sequences are tokenised once with the student's tokenizer and chat template, and every teacher is
given these ids. Each id must therefore stand for the same string everywhere, the end-of-sequence
token must agree, and every teacher's own tokenizer and template must turn the prompts into the same
ids, unless the config allows the difference by name.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from pipeline.config.run import Config
from pipeline.errors import ConfigError, VocabularyMismatchError
from pipeline.records import Prompt
from teachers.tokenizing import load_tokenizer, prompt_ids, tokenizer_hash

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
            f"the tokenizer of {config.student.model} has no end-of-sequence token: set "
            "`eos_token` in its tokenizer_config.json"
        )
    step = max(1, len(prompts) // PROMPTS_COMPARED)
    sample = prompts[::step][:PROMPTS_COMPARED]
    problems = []
    for name, teacher in config.teachers.items():
        if teacher.files is None:
            continue  # its answers are text, which the student's tokenizer turns into ids
        tokenizer = load_tokenizer(teacher.files)
        lines = _differences(student, tokenizer)
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
    if student.eos_token_id != teacher.eos_token_id:
        lines.append(
            f"the end-of-sequence token is {teacher.eos_token!r} ({teacher.eos_token_id}), "
            f"the student's is {student.eos_token!r} ({student.eos_token_id})"
        )
    return lines


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
