"""Text of a chat as the template writes it, and ids of text that keep data apart from structure.

A message or an answer may spell a control token, such as `<|im_end|>`. A placeholder replaces every
spelling before the template renders the message, and becomes the spelling again behind the point at
which a tokenizer looks for control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, pass_context
from jinja2.runtime import Context
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.templating import DEFAULT_DATE, TEMPLATE_DATE

_THOUGHT = r"[|_:\w]*?(?:think|thought|reason)\w*[|:_]*[>\]▷]"
THOUGHT_MARK = re.compile(
    rf"(?P<close>[<\[◁]\|?(?:/|end_){_THOUGHT})|(?P<open>[<\[◁]{_THOUGHT})", re.IGNORECASE
)
"""Beginning or end of a model's thoughts, such as `<think>`, `[/THINK]` or `<|END_THINKING|>`."""
_FIRST_PLACEHOLDER = 0x10F000
"""First of the code points that stand for control tokens: the end of the last private plane, which
no font or encoding is known to use."""
_CHAT = ({"role": "user", "content": "Go on"}, {"role": "assistant", "content": "Yes"})


@pass_context
def _pinned_strftime(context: Context, pattern: str) -> str:
    """`strftime_now` of chat templates, at the start of the run's day and not of today."""
    day = context.get(TEMPLATE_DATE, DEFAULT_DATE.isoformat())
    return datetime.fromisoformat(day).strftime(pattern)


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Text of the chat template that renders plain chats; None if there is none."""
    return None if tokenizer.chat_template is None else tokenizer.get_chat_template()


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, Any]],
    *,
    opens_answer: bool = True,
) -> str:
    """Text of a chat as the template writes it.

    Args:
        messages: messages of the chat.
        opens_answer: ask for the beginning of the next answer behind them.

    Raises:
        TemplateError: the template refuses the messages.
    """
    return str(
        tokenizer.apply_chat_template(
            list(messages),  # type: ignore[arg-type]
            tokenize=False,
            add_generation_prompt=opens_answer,
            strftime_now=_pinned_strftime,
        )
    )


def has_open_thought(text: str) -> bool:
    """Whether a text ends inside a model's thoughts."""
    marks = list(THOUGHT_MARK.finditer(text))
    return bool(marks) and marks[-1]["open"] is not None


@lru_cache(maxsize=8)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Tokens that structure a text: the special ones, and those that the chat template writes.

    Marks of thoughts are none, since answers hold them.
    """
    added = tokenizer.added_tokens_decoder.values()
    try:
        written = render(tokenizer, _CHAT) if tokenizer.chat_template is not None else ""
    except TemplateError:
        written = ""
    named = {*tokenizer.all_special_tokens}
    found = [t.content for t in added if t.special or t.content in named or t.content in written]
    return tuple(t for t in found if t and THOUGHT_MARK.fullmatch(t) is None)


def masked(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Text with placeholders for the control tokens that it spells."""
    pattern, placeholders = _spellings(tokenizer)
    return pattern.sub(lambda found: placeholders[found[0]], text)


def spelled_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The control tokens that a text spells, each once."""
    return list(dict.fromkeys(_spellings(tokenizer)[0].findall(text)))


def ids_of(
    tokenizer: PreTrainedTokenizerBase, text: str, *, adds_special: bool = False
) -> list[int]:
    """Token ids of a text, in which placeholders stand for spellings that stay text.

    Args:
        text: text from `masked`, or with parts from it.
        adds_special: let the tokenizer put its own tokens around the text, such as BOS.
    """
    if not _holds_placeholder(text):
        ids: Any = tokenizer(text, add_special_tokens=adds_special)["input_ids"]
        return ids
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        return _literal_tokenizer(tokenizer).encode(text, add_special_tokens=adds_special).ids
    return _ids_of_parts(tokenizer, text)


@lru_cache(maxsize=8)
def _spellings(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern[str], dict[str, str]]:
    tokens = control_tokens(tokenizer)
    placeholders = {token: chr(_FIRST_PLACEHOLDER + i) for i, token in enumerate(tokens)}
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)"), placeholders


def _holds_placeholder(text: str) -> bool:
    return not text.isascii() and max(text) >= chr(_FIRST_PLACEHOLDER)


def _ids_of_parts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The same from a tokenizer without a fast form, which takes what stands between control tokens
    as texts of their own.
    """
    pattern, placeholders = _spellings(tokenizer)
    spelling = str.maketrans({mark: token for token, mark in placeholders.items()})
    ids: list[int] = []
    for part in filter(None, re.split(f"({pattern.pattern})", text)):
        is_text = pattern.fullmatch(part) is None
        options: Any = {"add_special_tokens": False, "split_special_tokens": is_text}
        ids += tokenizer(part.translate(spelling), **options)["input_ids"]
    return ids


@lru_cache(maxsize=2)
def _literal_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Copy of a tokenizer that reads placeholders as text.

    Added tokens are looked for before the normalizer runs, which writes the spellings.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["normalized"] = False
    copy = Tokenizer.from_str(json.dumps(settings))
    _, placeholders = _spellings(tokenizer)
    spelling = [normalizers.Replace(mark, token) for token, mark in placeholders.items()]
    own = [] if copy.normalizer is None else [copy.normalizer]
    copy.normalizer = normalizers.Sequence([*spelling, *own])
    return copy
