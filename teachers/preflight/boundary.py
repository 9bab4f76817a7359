"""Preflight of the place at which prompt and answer meet: is it as the chat template writes it?

A run trains on the ids of a prompt and of an answer, one behind the other. Each form of prompt is
compared with the template's own text of the same chat with an answer, and raw text with the tokens
of one text. What an engine writes follows its prompt by nature; answers that are given as text,
references and replies of text APIs, are judged more strictly.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from pipeline.errors import ConfigError
from pipeline.records import Prompt
from teachers.preflight.forms import (
    PROBE,
    closes_thoughts,
    end_of,
    first_of_forms,
    form_problems,
    lost_contents,
    lost_message,
    render_form,
    thoughts_remedy,
)
from teachers.rendering import THOUGHT_MARK, spelled_tokens
from teachers.tokenizing import answer_ids, ids_together, prompt_ids

logger = logging.getLogger(__name__)

PROMPTS_TRIED = 1000
PROBLEMS_LISTED = 8
END_CHARACTERS = 2000
"""Text at both ends of a raw prompt that is looked at."""


def check_boundaries(
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[Prompt],
    given: Sequence[Prompt],
    *,
    needs_bos: bool = False,
) -> None:
    """Checks that prompts and answers meet as the chat template, or one text, has them.

    Args:
        asked: all prompts, in the forms in which they are asked.
        given: those among them whose answers are given as text: their references, or a text that is
            not known yet where they have none.
        needs_bos: refuse a chat template without the BOS that the tokenizer puts before plain text.
            A model's own template shows that the model was trained without.

    Raises:
        ConfigError: a form of prompt loses a message, opens no answer, or opens thoughts before a
            given answer; or a prompt has two BOS, or an EOS of its tokenizer before the answer.
    """
    chats = [prompt for prompt in asked if prompt.messages is not None]
    texts = [prompt for prompt in asked if prompt.messages is None]
    problems = _chat_problems(tokenizer, chats, given, needs_bos)
    tried = [_shortened(prompt) for prompt in _spread(texts)]
    problems += [line for prompt in tried for line in _text_problems(tokenizer, prompt)]
    if problems:
        listed = problems[:PROBLEMS_LISTED]
        if len(problems) > PROBLEMS_LISTED:
            listed.append(f"… {len(problems)} problems in all")
        raise ConfigError(
            f"prompts and answers do not meet as {tokenizer.name_or_path} writes them:\n  "
            + "\n  ".join(listed)
        )
    _warn_of_merging(tokenizer, [*first_of_forms(chats).values(), *tried])
    _warn_of_spellings(tokenizer, texts)


def check_bound_judges(tokenizer: PreTrainedTokenizerBase, judges: Iterable[str]) -> None:
    """Checks that a judge that may write nothing but a digit does not write it as a thought.

    Args:
        judges: names of the judges that are bound.

    Raises:
        ConfigError: the chat template opens thoughts.
    """
    names = sorted(judges)
    form = render_form(tokenizer, ("user",)) if names and tokenizer.chat_template else None
    if form is not None and form.opens_thoughts:
        raise ConfigError(
            f"judge {', '.join(names)} may write one digit and nothing else, and the chat template "
            f"opens thoughts before it: {end_of(form.opened)}: {thoughts_remedy(tokenizer)}"
        )


def _chat_problems(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[Prompt],
    given: Sequence[Prompt],
    needs_bos: bool,
) -> list[str]:
    given_of = first_of_forms(given)
    given_outside = first_of_forms(prompt for prompt in given if not closes_thoughts(prompt))
    thoughtless = [p for p in given if not THOUGHT_MARK.search(p.reference or "")]
    given_thoughtless = first_of_forms(thoughtless)
    problems: dict[str, str] = {}  # by the sentence behind the prompt's name, each once
    unwritten: dict[str, str] = {}
    headers: dict[tuple[str, str], str] = {}
    for roles, prompt in first_of_forms(chats).items():
        form = render_form(tokenizer, roles)
        if form is None:  # refused by the name of the prompt where it is tokenized
            continue
        lines = [lost_message(tokenizer, prompt, i) for i in form.lost]
        if not lines:
            of_form = given_outside if form.opens_thoughts else given_of
            lines = form_problems(tokenizer, form, prompt, of_form.get(roles))
            lines += _two_beginnings(tokenizer, prompt)
        for line in lines:
            problems.setdefault(line.partition(": ")[2], line)
        if roles in given_thoughtless and form.between and form.between.strip():
            unwritten.setdefault(form.between, given_thoughtless[roles].prompt_id)
        if form.has_another_header:
            headers.setdefault((form.opened, form.written or ""), prompt.prompt_id)
    if problems:
        return list(problems.values())
    for (opened, written), name in headers.items():
        logger.warning(
            "prompt %s ends with %s, and the chat template writes an earlier answer behind %s: the "
            "run follows the prompt",
            name,
            end_of(opened),
            end_of(written),
        )
    for text, name in unwritten.items():
        logger.warning(
            "the chat template writes %r before an answer, which answers given as text lack "
            "(first: prompt %s): %s",
            text,
            name,
            thoughts_remedy(tokenizer),
        )
    if chats and (line := _no_beginning(tokenizer, chats[0])) is not None:
        if needs_bos:
            return [f"{line}: begin the template with {{{{ bos_token }}}}"]
        logger.warning("%s; its model may have been trained so", line)
    return [
        lost_message(tokenizer, prompt, i)
        for prompt in _spread(chats)
        for i in lost_contents(tokenizer, prompt)
    ]


def _text_problems(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[str]:
    """Problems of a raw text: two BOS, or an EOS that the tokenizer puts behind it."""
    ids = prompt_ids(tokenizer, prompt)
    together = ids_together(tokenizer, prompt, _continuation(prompt))
    end = len(ids) - 1
    if ids[end] != tokenizer.eos_token_id or together[end] == ids[end]:
        return _two_beginnings(tokenizer, prompt)
    return [
        f"prompt {prompt.prompt_id}: the tokenizer writes {tokenizer.eos_token} behind the prompt, "
        "and the answer would follow it: the run would train on "
        f"{end_of(f'{tokenizer.decode(ids)}{_continuation(prompt)}')}, and one text is "
        f"{end_of(str(tokenizer.decode(together)))}: set add_eos_token: false in the student's "
        "tokenizer_config.json, or take the token out of its tokenizer.json"
    ]


def _two_beginnings(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[str]:
    ids, bos = prompt_ids(tokenizer, prompt), tokenizer.bos_token_id
    if bos is None or ids[:2] != [bos, bos]:
        return []
    return [
        f"prompt {prompt.prompt_id}: it begins with {tokenizer.bos_token} twice: the run would "
        f"train on {tokenizer.decode(ids[:8])!r}, and one text begins with "
        f"{tokenizer.decode(ids[1:8])!r}: take one out of the prompt, or out of the template in "
        "student.chat_template"
    ]


def _no_beginning(tokenizer: PreTrainedTokenizerBase, chat: Prompt) -> str | None:
    """Sentence about a template without the BOS that the tokenizer puts before plain text."""
    ids, own = prompt_ids(tokenizer, chat), tokenizer("")["input_ids"]
    if own[:1] != [tokenizer.bos_token_id] or ids[:1] == own[:1]:
        return None
    return (
        f"prompt {chat.prompt_id}: the chat template writes no {tokenizer.bos_token}: the run "
        f"would train on {tokenizer.decode(ids[:8])!r}, and the tokenizer begins plain text with "
        f"{tokenizer.decode([*own[:1], *ids[:8]])!r}"
    )


def _warn_of_merging(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> None:
    """Warns of prompts whose last tokens would be others if the answer followed in one text."""
    found: list[tuple[Prompt, list[int], list[int]]] = []
    for prompt in prompts:
        ids, text = prompt_ids(tokenizer, prompt), _continuation(prompt)
        apart = ids + answer_ids(tokenizer, prompt, ids, text)
        together = ids_together(tokenizer, prompt, text)
        if apart[: len(together)] != together:
            found.append((prompt, apart, together))
    if found:
        prompt, apart, together = found[0]
        pairs = zip(apart, together, strict=False)
        same = next((i for i, (ours, one) in enumerate(pairs) if ours != one), len(apart))
        logger.warning(
            "%d prompts end in tokens that one text does not have, as a trailing space makes them "
            "(first: prompt %s): prompt and answer are %s, and one text is %s; take the space at "
            "the end out of the prompt, or out of the template's generation prompt",
            len(found),
            prompt.prompt_id,
            tokenizer.convert_ids_to_tokens(apart[max(0, same - 2) : same + 3]),
            tokenizer.convert_ids_to_tokens(together[max(0, same - 2) : same + 3]),
        )


def _warn_of_spellings(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Prompt]) -> None:
    """Warns of special tokens in raw text, where they are structure and not words."""
    own = str(tokenizer.bos_token)
    found = [
        (prompt.prompt_id, tokens)
        for prompt in texts
        if (tokens := spelled_tokens(tokenizer, str(prompt.text).removeprefix(own)))
    ]
    if found:
        logger.warning(
            "%d text prompts hold special tokens (first: prompt %s with %s), which raw text writes "
            "as such; give prompts as `messages` if their words are meant",
            len(found),
            found[0][0],
            ", ".join(found[0][1]),
        )


def _shortened(prompt: Prompt) -> Prompt:
    """A raw text without its middle, which decides nothing about its ends."""
    text = str(prompt.text)
    return (
        prompt
        if len(text) <= 2 * END_CHARACTERS
        else replace(prompt, text=text[:END_CHARACTERS] + text[-END_CHARACTERS:])
    )


def _spread(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    step = max(1, len(prompts) // PROMPTS_TRIED)
    return prompts[::step][:PROMPTS_TRIED]


def _continuation(prompt: Prompt) -> str:
    """The tried answer as it follows a prompt."""
    follows = prompt.text is None or prompt.text[-1].isspace()
    return PROBE if follows else f" {PROBE}"
