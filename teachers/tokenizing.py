"""Tokenizer of a run, which is the student's: turns prompts into ids and answers into text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.config.base import ModelFiles
from pipeline.errors import ConfigError
from pipeline.final_text import is_thought_tag, opens_thought
from pipeline.fingerprint import digest_bytes, digest_json
from pipeline.records import Prompt
from pipeline.run.shared_storage import check_folder_here
from pipeline.synthesis.rewriting import read_template
from teachers.reading import reading
from teachers.rendering import ids_of, last_control, masked, render, template_of

ANSWERS_TRIED = ("Yes.", "42", "Two lines:\n\n- it's the 2nd one!")
"""Answers behind which the end of a message is looked for."""
LAST_TOKENS = 16
"""Tokens at the end of a prompt in which a thought may be opened."""
_MARKUP = re.compile(r"<\S+>|\[\S+\]")


def load_tokenizer(model: ModelFiles) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model folder or hub id.

    Raises:
        ConfigError: the model has no tokenizer, it cannot be loaded, or it lacks the token that
            shall end sequences.
        StorageError: the model is a folder that is missing on this node.
    """
    check_folder_here(model.model)
    with reading("tokenizer.json", model.model):
        # Mistral's own format has no chat template, so `tokenizer.json` beside it is read.
        tokenizer = AutoTokenizer.from_pretrained(
            model.model,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            mistral_format=False,
        )
    if model.chat_template is not None:
        tokenizer.chat_template = read_template(model.chat_template)
    if model.template_prelude and (template := template_of(tokenizer)) is not None:
        tokenizer.chat_template = model.template_prelude + template
    if model.eos_token is not None:
        if model.eos_token not in tokenizer.get_vocab():
            special = ", ".join(map(repr, tokenizer.all_special_tokens))
            raise ConfigError(
                f"student.eos_token {model.eos_token!r} is no token of {model.model}: name a token "
                f"of its vocabulary; its special tokens are {special}"
            )
        tokenizer.eos_token = model.eos_token
    return tokenizer


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex hash of all that makes a text's ids: vocabulary, rules, template, end of sequence."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        rules = tokenizer.backend_tokenizer.to_str()
    else:
        rules = digest_json(tokenizer.get_vocab())
    return digest_bytes(
        rules.encode(), str(tokenizer.chat_template).encode(), str(tokenizer.eos_token_id).encode()
    )


@lru_cache(maxsize=1)
def student_tokenizer(files: ModelFiles) -> tuple[PreTrainedTokenizerBase, str]:
    """Tokenizer of a run, which is the student's, and its hash; loaded once per process."""
    tokenizer = load_tokenizer(files)
    return tokenizer, tokenizer_hash(tokenizer)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: messages go through the chat template up to the start of the answer,
    text is tokenized unchanged. A text that already begins with the token that the tokenizer puts
    before it keeps one of the two. Special tokens that a message spells stay text; raw text has no
    other structure than the tokens that it spells.

    Raises:
        ConfigError: the prompt has messages, but the tokenizer has no chat template or its template
            refuses them; or the prompt has no tokens.
    """
    ids = _ids(tokenizer, prompt, prompt_text(tokenizer, prompt))
    if not ids:
        raise ConfigError(f"prompt {prompt.prompt_id} has no tokens: remove it from its dataset")
    return ids


def prompt_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Text whose tokens a prompt becomes, with placeholders for special tokens in its messages.

    Raises:
        ConfigError: see `prompt_ids`.
    """
    if prompt.messages is None:
        return str(prompt.text)
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"prompt {prompt.prompt_id} has chat messages, but the student's tokenizer has no chat "
            "template: name a file with one in student.chat_template, such as a teacher's "
            "chat_template.jinja, or give prompts as `text`"
        )
    messages = [
        {"role": message["role"], "content": masked(tokenizer, message["content"])}
        for message in prompt.messages
    ]
    try:
        return render(tokenizer, messages)
    except TemplateError as error:
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path} refuses prompt "
            f"{prompt.prompt_id}: {error}; change its messages, among them the system_prompt "
            "of a recipe or of the evaluation, or leave the prompt out"
        ) from error


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, asked: Sequence[int], answer: str
) -> list[int]:
    """Token ids of an answer that is given as text, as they follow those of its prompt.

    They are cut out of the tokens of prompt and answer together, since some tokenizers put a space
    before a text. Where the prompt's own tokens change by what follows them, the answer is
    tokenized behind a line break. Special tokens that it spells stay text.

    Args:
        asked: token ids of the prompt.
        answer: text as it follows the prompt. A space that the template writes before an answer may
            be left out.
    """
    text, before = _behind(tokenizer, prompt, answer), prompt_text(tokenizer, prompt)
    if start := last_control(tokenizer, before):  # what stands before it changes nothing behind it
        before = before[start:]
        own, together = ids_of(tokenizer, before), ids_of(tokenizer, before + text)
    else:
        own, together = list(asked), _ids(tokenizer, prompt, before + text)
    if together[: len(own)] == own and len(together) > len(own):
        return together[len(own) :]
    line_break, behind = ids_of(tokenizer, "\n"), ids_of(tokenizer, "\n" + text)
    if behind[: len(line_break)] == line_break and len(behind) > len(line_break):
        return behind[len(line_break) :]
    return ids_of(tokenizer, text)


def ids_together(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str) -> list[int]:
    """Token ids of a prompt and an answer as one text."""
    text = prompt_text(tokenizer, prompt) + _behind(tokenizer, prompt, answer)
    return _ids(tokenizer, prompt, text)


def _behind(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, answer: str) -> str:
    """Text of an answer behind its prompt, with placeholders for special tokens."""
    text = masked(tokenizer, answer)
    gap = "" if prompt.messages is None else answer_gap(tokenizer)
    return text if text.startswith(gap) else gap + text


@lru_cache(maxsize=4)
def answer_gap(tokenizer: PreTrainedTokenizerBase) -> str:
    """White space that the chat template writes between the prompt of an answer and the answer, as
    `[/INST] Yes` has it; empty if there is none or if anything else stands there.
    """
    question, answer = {"role": "user", "content": "Go on"}, ANSWERS_TRIED[0]
    try:
        asked = render(tokenizer, [question])
        whole = render(tokenizer, [question, {"role": "assistant", "content": answer}])
    except TemplateError:
        return ""
    gap, found, _ = whole.removeprefix(asked).partition(answer)
    return gap if found and whole.startswith(asked) and gap.isspace() else ""


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str) -> list[int]:
    """Token ids of a text that begins with a prompt's."""
    if prompt.messages is not None:
        return ids_of(tokenizer, text)
    ids = ids_of(tokenizer, text, adds_special=True)
    return ids[1:] if repeats_bos(tokenizer, str(prompt.text)) else ids


@lru_cache(maxsize=4)
def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Number of ids that a tokenizer has; an embedding matrix is often padded to more rows."""
    return max(tokenizer.get_vocab().values()) + 1


@lru_cache(maxsize=4)
def chat_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Token that the chat template writes behind an assistant message, such as `<|im_end|>`.

    It is often another one than the tokenizer's end-of-sequence token. The first special token
    behind the message counts; white space and what follows the token do not.

    Returns:
        None if there is no template, or if it ends messages by no single token.
    """
    if tokenizer.chat_template is None:
        return None
    ends = {_end_behind(tokenizer, text) for text in ANSWERS_TRIED}
    return ends.pop() if len(ends) == 1 else None


def _end_behind(tokenizer: PreTrainedTokenizerBase, answer: str) -> int | None:
    messages = [{"role": "user", "content": "Go on"}, {"role": "assistant", "content": answer}]
    try:
        rendered = render(tokenizer, messages, opens_answer=False)
    except TemplateError:
        return None
    _, found, behind = rendered.rpartition(answer)
    behind = behind.strip()
    if not found or not behind:
        return None
    ids: Any = tokenizer(behind, add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    marked = next((token for token in ids if token in special), None)
    if marked is None and len(ids) == 1 and _MARKUP.fullmatch(behind):
        return ids[0]
    return marked


def repeats_bos(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text begins with the beginning-of-sequence token that its tokenizer adds anyway."""
    bos = tokenizer.bos_token
    if not isinstance(bos, str) or not text.startswith(bos):
        return False
    added: Any = tokenizer("")["input_ids"]
    return added[:1] == [tokenizer.bos_token_id]


def answer_text(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    """Text of an answer, without special tokens and without its end.

    Tags around thoughts stay, also where they are special tokens.
    """
    # The ends need not be special tokens.
    if token_ids and token_ids[-1] in (tokenizer.eos_token_id, chat_end(tokenizer)):
        token_ids = token_ids[:-1]
    tags = _special_thought_tags(tokenizer)
    parts, start = [], 0
    for place in [i for i, token in enumerate(token_ids) if token in tags]:
        parts += [_decoded(tokenizer, token_ids[start:place]), tags[token_ids[place]]]
        start = place + 1
    return "".join([*parts, _decoded(tokenizer, token_ids[start:])])


def begins_in_thought(tokenizer: PreTrainedTokenizerBase, prompt_token_ids: list[int]) -> bool:
    """Whether a rendered prompt ends with a thought that its template has opened."""
    return opens_thought(str(tokenizer.decode(prompt_token_ids[-LAST_TOKENS:])))


def _decoded(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert isinstance(text, str), "one sequence of ids is one text"
    return text


@lru_cache(maxsize=4)
def _special_thought_tags(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Special tokens that open or close a thought, which decoding leaves out like all others."""
    added = {
        i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    return {i: text for i, text in added.items() if is_thought_tag(text)}
