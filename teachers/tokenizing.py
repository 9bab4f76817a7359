"""Tokenizer of a run, which is the student's: turns prompts into ids and answers into text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.config.base import ModelFiles
from pipeline.errors import ConfigError
from pipeline.fingerprint import digest_bytes, digest_json
from pipeline.records import Prompt
from pipeline.synthesis.rewriting import read_template

ANSWERS_TRIED = ("Yes.", "42", "Two lines:\n\n- it's the 2nd one!")
"""Answers behind which the end of a message is looked for."""
_MARKUP = re.compile(r"<\S+>|\[\S+\]")


def load_tokenizer(model: ModelFiles) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model folder or hub id.

    Raises:
        ConfigError: the model has no tokenizer, it cannot be loaded, or it lacks the token that
            shall end sequences.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.model, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load a tokenizer from {model.model}: {error}") from error
    if model.chat_template is not None:
        tokenizer.chat_template = read_template(model.chat_template)
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
    before it keeps one of the two.

    Raises:
        ConfigError: the prompt has messages, but the tokenizer has no chat template or its template
            refuses them; or the prompt has no tokens.
    """
    ids: Any  # upstream's stubs name what the other options return as well
    if prompt.messages is None:
        ids = tokenizer(prompt.text)["input_ids"]
        if repeats_bos(tokenizer, str(prompt.text)):
            ids = ids[1:]
    elif tokenizer.chat_template is None:
        raise ConfigError(
            f"prompt {prompt.prompt_id} has chat messages, but the student's tokenizer has no chat "
            "template: name a file with one in student.chat_template, such as a teacher's "
            "chat_template.jinja, or give prompts as `text`"
        )
    else:
        try:
            ids = tokenizer.apply_chat_template(
                list(prompt.messages), add_generation_prompt=True, return_dict=False
            )
        except TemplateError as error:
            raise ConfigError(
                f"the chat template of {tokenizer.name_or_path} refuses prompt "
                f"{prompt.prompt_id}: {error}; change its messages, among them the system_prompt "
                "of a recipe or of the evaluation, or leave the prompt out"
            ) from error
    if not ids:
        raise ConfigError(f"prompt {prompt.prompt_id} has no tokens: remove it from its dataset")
    return list(ids)


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
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
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
    """Text of an answer, without special tokens and without its end."""
    # The ends need not be special tokens.
    if token_ids and token_ids[-1] in (tokenizer.eos_token_id, chat_end(tokenizer)):
        token_ids = token_ids[:-1]
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    assert isinstance(text, str), "one sequence of ids is one text"
    return text
