"""Preflight before any engine starts: do all teachers and the student mean the same by a token id?

Sequences are tokenised once with the student's tokenizer and chat template, and every teacher is
fed those ids. So each id must stand for the same string everywhere, the end-of-sequence token must
agree, and every teacher's own tokenizer and template must turn the prompts into the same ids, or
the config must allow the difference by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.config import Config
from pipeline.config_base import ModelFiles
from pipeline.errors import ConfigError, VocabularyMismatchError
from pipeline.fingerprint import digest_bytes, digest_json
from pipeline.records import Prompt

ENTRIES_LISTED = 8
PROMPTS_COMPARED = 1000


def load_tokenizer(model: ModelFiles) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(
            model.model, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load a tokenizer from {model.model}: {error}") from error


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex hash of all that decides a text's ids: vocabulary, rules, template, end of sequence."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        rules = tokenizer.backend_tokenizer.to_str()
    else:
        rules = digest_json(tokenizer.get_vocab())
    return digest_bytes(
        rules.encode(), str(tokenizer.chat_template).encode(), str(tokenizer.eos_token_id).encode()
    )


@lru_cache(maxsize=1)
def student_tokenizer(files: ModelFiles) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer of a run, which is the student's, and its hash; loaded once per process."""
    tokenizer = load_tokenizer(files)
    return tokenizer, tokenizer_hash(tokenizer)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The token ids of a prompt: messages by the chat template, ready for an answer; text as it is.

    Raises:
        ConfigError: messages, but the tokenizer has no chat template or its template refuses them;
            or the prompt has no tokens.
    """
    ids: Any  # upstream's stubs name what the other options return as well
    if prompt.messages is None:
        ids = tokenizer(prompt.text)["input_ids"]
    elif tokenizer.chat_template is None:
        raise ConfigError(
            f"prompt {prompt.prompt_id} has chat messages, but the student's tokenizer has no chat "
            "template; add one to its folder or give prompts as `text`"
        )
    else:
        try:
            ids = tokenizer.apply_chat_template(
                list(prompt.messages), add_generation_prompt=True, return_dict=False
            )
        except TemplateError as error:
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path} refuses prompt "
                f"{prompt.prompt_id}: {error}; change its messages or leave it out (a recipe's or "
                "the evaluation's system_prompt is one of them)"
            ) from error
    if not ids:
        raise ConfigError(f"prompt {prompt.prompt_id} has no tokens")
    return list(ids)


def answer_text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """The text of an answer, without special tokens."""
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert isinstance(text, str), "one sequence of ids is one text"
    return text


def check_vocabularies(config: Config, prompts: Sequence[Prompt]) -> str:
    """Compares every teacher's tokenizer with the student's; returns the student's tokenizer hash.

    Ids that no tokenizer uses (the padding of an embedding matrix) are left aside, and so are
    teachers that exchange text alone.

    Raises:
        ConfigError: a tokenizer cannot be loaded, or the student's has no end-of-sequence token.
        VocabularyMismatchError: the differing entries, listed.
    """
    student = load_tokenizer(config.student.files)
    if student.eos_token_id is None:
        raise ConfigError(f"the tokenizer of {config.student.model} has no end-of-sequence token")
    step = max(1, len(prompts) // PROMPTS_COMPARED)
    sample = prompts[::step][:PROMPTS_COMPARED]
    problems = []
    for name, teacher in config.teachers.items():
        if teacher.files is None:
            continue  # its answers are text, tokenized with the student's
        tokenizer = load_tokenizer(teacher.files)
        lines = _differences(student, tokenizer)
        if not lines and not teacher.allow_chat_template_difference:
            lines = _rendering_differences(student, tokenizer, sample)
        problems += [f"teacher {name!r}: {line}" for line in lines]
    if problems:
        raise VocabularyMismatchError(
            "teachers and student must share one vocabulary and prompt format:\n  "
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
            f"… {len(differing)} ids differ in all, of {len(ours)} (student) and {len(theirs)} "
            "(teacher)"
        )
    if student.eos_token_id != teacher.eos_token_id:
        lines.append(
            f"end of sequence is {teacher.eos_token!r} ({teacher.eos_token_id}), "
            f"the student's is {student.eos_token!r} ({student.eos_token_id})"
        )
    return lines


def _rendering_differences(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, prompts: Sequence[Prompt]
) -> list[str]:
    for prompt in prompts:
        if prompt.messages is not None and teacher.chat_template is None:
            return [
                "it has no chat template; set allow_chat_template_difference to feed it the "
                "student's rendering"
            ]
        ours, theirs = prompt_ids(student, prompt), prompt_ids(teacher, prompt)
        if ours != theirs:
            return [
                f"prompt {prompt.prompt_id} renders as {teacher.decode(theirs)!r}, "
                f"the student's rendering is {student.decode(ours)!r}; "
                "set allow_chat_template_difference to feed it the student's rendering"
            ]
    return []
