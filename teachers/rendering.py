"""Text of a chat as the template writes it, and ids of text that keep data apart from structure.

A message or an answer may spell a control token, such as `<|im_end|>`. A placeholder replaces every
spelling before the template renders the message, and becomes the spelling again behind the point at
which a tokenizer looks for control tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pipeline.child import ChildProcess
from pipeline.errors import ConfigError
from pipeline.messages import foreign
from pipeline.templating import DEFAULT_DATE, TEMPLATE_DATE

SECONDS_TO_RENDER = 10.0
"""Most time for one chat; published templates take less than a millisecond."""

_THOUGHT = r"[|_:\w]*?(?:think|thought|reason)\w*[|:_]*[>\]▷]"
THOUGHT_MARK = re.compile(
    rf"(?P<close>[<\[◁]\|?(?:/|end_){_THOUGHT})|(?P<open>[<\[◁]{_THOUGHT})", re.IGNORECASE
)
"""Beginning or end of a model's thoughts, such as `<think>`, `[/THINK]` or `<|END_THINKING|>`."""
_MARK = re.compile(r"<\S+>|\[\S+\]")
_LAST_PLACEHOLDER = 0x10FFFD
"""Last of the code points that stand for control tokens: the end of Unicode's private planes, which
no font is known to use."""
_CHAT = ({"role": "user", "content": "Go on"}, {"role": "assistant", "content": "Yes"})
_TEMPLATES = ChildProcess(
    "a chat template",
    Path(__file__).with_name("template_worker.py"),
    {"messages": [], "template": "", "values": {}, "date": (TEMPLATE_DATE, "")},
)


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

    Whoever published the model wrote the template, which is a program: it runs in a child process.

    Args:
        messages: messages of the chat.
        opens_answer: ask for the beginning of the next answer behind them.

    Raises:
        TemplateError: the template refuses the messages, or fails on them.
        ConfigError: it does not come to an end, or writes too much.
    """
    question = {
        "messages": list(messages),
        "template": tokenizer.get_chat_template(),
        "values": {**tokenizer.special_tokens_map, "add_generation_prompt": opens_answer},
        "date": (TEMPLATE_DATE, DEFAULT_DATE.isoformat()),
    }
    try:
        outcome, text = _TEMPLATES.ask(question, SECONDS_TO_RENDER)
    except TimeoutError:
        outcome, text = "late", f"more than {SECONDS_TO_RENDER:g} seconds"
    except RuntimeError:
        outcome, text = "ended", "more memory than a process may have"
    if outcome == "text":
        return text
    if outcome == "refused":
        raise TemplateError(foreign(text))
    raise ConfigError(
        f"the chat template of {tokenizer.name_or_path} takes {text} for a chat of "
        f"{len(messages)} messages that begins with {foreign(messages[0]['content'], 70)!r}: "
        "mend its loops, name another template in student.chat_template, or choose another model"
    )


def has_open_thought(text: str) -> bool:
    """Whether a text ends inside a model's thoughts."""
    marks = list(THOUGHT_MARK.finditer(text))
    return bool(marks) and marks[-1]["open"] is not None


@lru_cache(maxsize=8)
def control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Tokens that structure a text: the special ones, and marks that the chat template writes.

    Marks of thoughts are none, since answers hold them, and neither is white space.
    """
    added = tokenizer.added_tokens_decoder.values()
    try:
        written = render(tokenizer, _CHAT) if tokenizer.chat_template is not None else ""
    except TemplateError:
        written = ""
    named = {*tokenizer.all_special_tokens}
    found = [
        token.content
        for token in added
        if token.special
        or token.content in named
        or (token.content in written and _MARK.fullmatch(token.content))
    ]
    return tuple(token for token in found if token.strip() and not THOUGHT_MARK.fullmatch(token))


def masked(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Text with placeholders for the control tokens that it spells."""
    spellings = _spellings(tokenizer)
    return spellings.tokens.sub(lambda found: spellings.placeholders[found[0]], text)


def spelled_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The control tokens that a text spells, each once."""
    return list(dict.fromkeys(_spellings(tokenizer).tokens.findall(text)))


def last_control(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Start of the last control token of a text; 0 if there is none."""
    return max((found.start() for found in _spellings(tokenizer).tokens.finditer(text)), default=0)


def ids_of(
    tokenizer: PreTrainedTokenizerBase, text: str, *, adds_special: bool = False
) -> list[int]:
    """Token ids of a text, in which placeholders stand for spellings that stay text.

    Args:
        text: text from `masked`, or with parts from it.
        adds_special: let the tokenizer put its own tokens around the text, such as BOS.
    """
    spellings = _spellings(tokenizer)
    if spellings.masks.search(text) is None:
        ids: Any = tokenizer(text, add_special_tokens=adds_special)["input_ids"]
        return ids
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return _ids_of_parts(tokenizer, text)
    literal, own = _literal_tokenizer(tokenizer)
    spelling = [
        normalizers.Replace(mask, token)
        for token, mask in spellings.placeholders.items()
        if mask in text
    ]
    literal.normalizer = normalizers.Sequence([*spelling, *own])
    return literal.encode(text, add_special_tokens=adds_special).ids


@dataclass(frozen=True)
class _Spellings:
    """Control tokens of a tokenizer with their placeholders.

    Attributes:
        tokens: pattern that finds a control token in a text, the longest at its place.
        placeholders: one character for every control token.
        masks: pattern that finds a placeholder.
    """

    tokens: re.Pattern[str]
    placeholders: dict[str, str]
    masks: re.Pattern[str]


@lru_cache(maxsize=8)
def _spellings(tokenizer: PreTrainedTokenizerBase) -> _Spellings:
    tokens = control_tokens(tokenizer)
    placeholders = {token: chr(_LAST_PLACEHOLDER - i) for i, token in enumerate(tokens)}
    if not tokens:
        never = re.compile("(?!)")
        return _Spellings(never, {}, never)
    masks = re.compile(f"[{chr(_LAST_PLACEHOLDER - len(tokens) + 1)}-{chr(_LAST_PLACEHOLDER)}]")
    return _Spellings(re.compile(_any_of(tokens)), placeholders, masks)


def _any_of(tokens: Iterable[str]) -> str:
    """Pattern of the longest of some texts, as a tree: thousands of them share few beginnings."""
    by_first: dict[str, list[str]] = {}
    for token in filter(None, tokens):
        by_first.setdefault(token[0], []).append(token)
    branches: list[str] = []
    for same in by_first.values():
        least, most = min(same), max(same)
        differs = (i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b)
        begin = least[: next(differs, len(least))]
        rest = [token.removeprefix(begin) for token in same]
        behind = "" if rest == [""] else _any_of(rest) + ("?" if "" in rest else "")
        branches.append(re.escape(begin) + behind)
    return f"(?:{'|'.join(branches)})"


def _ids_of_parts(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The same from a tokenizer without a fast form, which takes what stands between control tokens
    as texts of their own.
    """
    spellings = _spellings(tokenizer)
    spelling = str.maketrans({mask: token for token, mask in spellings.placeholders.items()})
    ids: list[int] = []
    for part in filter(None, re.split(f"({spellings.tokens.pattern})", text)):
        is_text = spellings.tokens.fullmatch(part) is None
        options: Any = {"add_special_tokens": False, "split_special_tokens": is_text}
        ids += tokenizer(part.translate(spelling), **options)["input_ids"]
    return ids


@lru_cache(maxsize=2)
def _literal_tokenizer(
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[Tokenizer, list[normalizers.Normalizer]]:
    """Copy of a tokenizer whose normalizer may write the spellings, since it runs when added tokens
    have been found; and its own normalizer, if it has one.
    """
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in settings["added_tokens"]:
        token["normalized"] = False
    copy = Tokenizer.from_str(json.dumps(settings))
    copy.no_truncation()
    copy.no_padding()
    return copy, [] if copy.normalizer is None else [copy.normalizer]
