"""A row of a source to a checked prompt, or an error that names place, value and remedy."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any
from uuid import UUID

from pipeline.config.base import NAME
from pipeline.config.prompts import FIELDS, PromptsConfig, PromptSource
from pipeline.errors import PromptError
from pipeline.fingerprint import digest_json, unit_interval
from pipeline.messages import listed, shown, shown_name
from pipeline.plain_json import NotJSONError, value_in
from pipeline.records import Prompt

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
"""Our names of ShareGPT's roles."""
LIKENESS = 0.8
"""Similarity, from 0 to 1, from which on an unused column is taken for a misspelt one."""
LONGEST_DOMAIN = 100
"""Characters of a domain, which file systems take as the name of a folder."""
_USUAL_TEXTS = ("prompt", "question", "instruction", "problem", "query", "input")


def parse_row(place: str, row: Any, source: PromptSource, config: PromptsConfig) -> Prompt:
    """Makes a prompt of a row.

    Raises:
        PromptError: the row is malformed, or a column seems misspelt.
    """
    if not isinstance(row, dict):
        raise PromptError(f"{place}: a row must be an object, found {type(row).__name__}")
    _refuse_misspelt_columns(place, row, source)
    values = {name: row.get(source.fields.get(name, name)) for name in FIELDS}
    reference = _reference(place, values["reference"])
    messages, text = values["messages"], values["text"]
    if text and not messages:
        messages = None
    elif messages and isinstance(text, str) and not text.strip():
        text = None
    for setting, value in {"template": source.template, "chat": source.chat}.items():
        if messages is not None and value:
            raise PromptError(
                f"{place}: the source has a `{setting}`, which concerns `text`, but the row has "
                f"`messages`: remove the {setting}, or give rows with `text`"
            )
    if source.columns:
        text = _filled(place, row, source)
    elif (messages is None) == (text is None):
        found = "both" if messages is not None else f"neither {_found(row)}"
        raise PromptError(
            f"{place}: a row must have exactly one of `messages` and `text`, found {found}"
        )
    elif text is not None:
        text = _text(place, "text", text)
        text = source.template.replace("{text}", text) if source.template else text
    checked = None if messages is None else _messages(place, messages)
    if checked is not None and checked[-1]["role"] == "assistant":
        checked, reference = _answered(place, checked, reference, source)
    if source.chat and text is not None:
        checked, text = ({"role": "user", "content": text},), None
    identifier = _identifier(place, values["id"]) or digest_json([checked, text])
    return Prompt(
        prompt_id=identifier,
        domain=_domain(place, values["domain"], source),
        split=source.split or _split(identifier, config),
        messages=checked,
        text=text,
        reference=reference,
    )


def columns_of(source: PromptSource) -> dict[str, str]:
    """Columns that a source reads, by the field or the place in its template that names each."""
    named = {name: source.fields.get(name, name) for name in FIELDS}
    if source.columns and "text" not in source.columns:
        del named["text"]
    return named | {f"{{{name}}}": name for name in source.columns if name != "text"}


def _refuse_misspelt_columns(place: str, row: dict[str, Any], source: PromptSource) -> None:
    """Refuses a row whose column is nearly one of ours; other columns are common and no error.

    A column without a value counts as missing: Parquet gives every row the columns of all rows.
    """
    columns = columns_of(source)
    for name, column, found in _misspelt(tuple(row), tuple(columns.items())):
        other = {"text": "messages", "messages": "text"}.get(name)
        has_prompt = other is not None and row.get(columns.get(other, other)) is not None
        if row.get(column) is None and row[found] is not None and not has_prompt:
            way = f"give the source `fields: {{{name}: {shown_name(found)}}}`"
            way = way if name in FIELDS else f"correct {name} in the template"
            raise PromptError(
                f"{place}: the row has no {shown(column)}, but {shown(found)}: rename the "
                f"column, or {way}"
            )


@lru_cache(maxsize=64)
def _misspelt(
    keys: tuple[str, ...], columns: tuple[tuple[str, str], ...]
) -> list[tuple[str, str, str]]:
    """Name, column and unused key of every column that one of a row's unused keys is like."""
    unused = {_folded(key): key for key in keys if key not in dict(columns).values()}
    pairs = []
    for name, column in columns:
        close = difflib.get_close_matches(_folded(column), unused, n=1, cutoff=LIKENESS)
        if close and len(column) > len("id"):
            pairs.append((name, column, unused[close[0]]))
    return pairs


def _folded(column: str) -> str:
    """Name of a column without case, spaces and marks between its words."""
    return re.sub(r"[\s_-]", "", str(column)).casefold()


def _found(row: Mapping[str, Any]) -> str:
    """Columns of a row that has no prompt, with the setting that a usual one of them needs."""
    chats = [name for name, value in row.items() if _is_chat(value)]
    texts = [name for name in _USUAL_TEXTS if isinstance(row.get(name), str)]
    hint = f"; give the source `fields: {{messages: {shown_name(chats[0])}}}`" if chats else ""
    if not chats and texts:
        hint = f"; give the source `fields: {{text: {texts[0]}}}`"
    empty = [name for name in ("messages", "text") if name in row]
    if empty:
        hint = f"; `{empty[0]}` is empty here: remove the row, or fill it in"
    return f"(fields: {listed(row)}){hint}"


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and bool(value[0].keys() & {"role", "from"})
    )


def _text(place: str, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise PromptError(f"{place}: `{name}` must be a non-empty text, found {shown(value)}")
    return _encodable(f"{place}: `{name}`", value)


def _encodable(place: str, value: str) -> str:
    """The text itself.

    Raises:
        PromptError: it holds half of a surrogate pair, which no file in UTF-8 can hold.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise PromptError(
            f"{place} holds {half} at character {error.start}, which is half a character "
            "(a lone surrogate): the text was cut or escaped wrongly; write the whole character, "
            "or leave it out"
        ) from error
    return value


def _identifier(place: str, value: Any) -> str | None:
    """An id as a text; a number stands for itself."""
    is_number = isinstance(value, int | float | Decimal | UUID) and not isinstance(value, bool)
    if value is None or (is_number and value == value and value not in (math.inf, -math.inf)):
        return None if value is None else str(value)
    if not isinstance(value, str) or not value.strip():
        raise PromptError(
            f"{place}: `id` must be a non-empty text or a number, found {shown(value)}: give null, "
            "or leave it out, and the prompt's words name it"
        )
    return _encodable(f"{place}: `id`", value)


def _number_or_text(place: str, name: str, value: Any) -> str:
    """A text; a whole number stands for its digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        raise PromptError(
            f"{place}: `{name}` must be a text or a whole number, found {shown(value)}: write the "
            f"number as a text, such as {f'{value:g}'!r}, since it can be written in several ways"
        )
    return _text(place, name, value)


def _reference(place: str, value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and not value.strip():
        raise PromptError(
            f"{place}: `reference` must be a non-empty text, found {shown(value)}: leave it out, "
            "or give null, if the prompt has none"
        )
    return _number_or_text(place, "reference", value)


def _domain(place: str, value: Any, source: PromptSource) -> str:
    domain = value if value is not None else source.domain
    if domain is None:
        raise PromptError(
            f"{place}: the row has no `domain`; add one, or give the source a `domain`"
        )
    if not isinstance(domain, str) or re.fullmatch(NAME, domain) is None:
        raise PromptError(
            f"{place}: domain {shown(domain)} must consist of letters, digits, '_', '.' and '-' "
            "and begin with a letter or digit"
        )
    if len(domain) > LONGEST_DOMAIN:
        raise PromptError(
            f"{place}: domain {shown(domain)} has {len(domain)} characters, and folders are named "
            f"after domains: shorten it to {LONGEST_DOMAIN}"
        )
    return domain


def _filled(place: str, row: Mapping[str, Any], source: PromptSource) -> str:
    """The template of a source with the columns of a row."""
    cells = {}
    for name in source.columns:
        column = source.fields.get("text", name) if name == "text" else name
        value = row.get(column)
        is_empty = value is None or (isinstance(value, str) and not value.strip())
        cells[name] = "" if is_empty else _number_or_text(place, column, value)
    if not any(cells.values()):
        raise PromptError(
            f"{place}: all columns of the template are empty ({listed(cells)}): remove the row, "
            "or fill one of them in"
        )
    return source.fill(cells)


def _messages(place: str, messages: Any) -> tuple[dict[str, str], ...]:
    if isinstance(messages, str):
        messages = _decoded(place, messages)
    if not isinstance(messages, list) or not messages:
        raise PromptError(f"{place}: `messages` must be a non-empty list, found {shown(messages)}")
    checked = [_message(f"{place}: messages[{i}]", m) for i, m in enumerate(messages)]
    kept = tuple(message for message in checked if message["content"])
    if not kept:
        raise PromptError(f"{place}: `messages` must hold a message beside an empty system message")
    return kept


def _decoded(place: str, text: str) -> Any:
    """Messages that a column holds as JSON in a text."""
    try:
        return value_in(text)
    except NotJSONError as error:
        where = "" if error.position is None else f" at character {error.position}"
        raise PromptError(
            f"{place}: `messages` must be a non-empty list, or such a list as JSON in a text, "
            f"found {shown(text)}: {error.reason}{where}"
        ) from error


def _message(place: str, message: Any) -> dict[str, str]:
    """Role and text of a message; an empty text only of a system message."""
    if not isinstance(message, dict):
        raise PromptError(f"{place} must have exactly `role` and `content`, found {shown(message)}")
    names = {"role": "role", "content": "content"}
    if message.keys() >= {"from", "value"} and not message.keys() & names.keys():
        names = {"from": "role", "value": "content"}  # as ShareGPT calls them
    # Parquet and `datasets` give every message the keys that any message has.
    extra = [k for k, v in message.items() if k not in names and v not in (None, "", [], {})]
    if extra or not message.keys() >= names.keys():
        way = f": remove {listed(map(shown, extra))}, which is not read" if extra else ""
        raise PromptError(
            f"{place} must have exactly `role` and `content`, found {shown(message)}{way}"
        )
    # In the order of the file, since the digest of the prompts knows it.
    values = {names[key]: value for key, value in message.items() if key in names}
    role = values["role"]
    if isinstance(role, str):
        role = values["role"] = SHAREGPT_ROLES.get(role, role)
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(f"{place}.role must be one of {', '.join(ROLES)}, found {shown(role)}")
    return values | {"content": _content(f"{place}.content", role, values["content"])}


def _content(place: str, role: str, content: Any) -> str:
    if isinstance(content, list):
        content = "\n".join(_part(f"{place}[{i}]", part) for i, part in enumerate(content))
    if content is None and role == "system":
        return ""
    if not isinstance(content, str) or not (content.strip() or role == "system"):
        raise PromptError(f"{place} must be a non-empty text, found {shown(content)}")
    return _encodable(place, content) if content.strip() else ""


def _part(place: str, part: Any) -> str:
    """Text of a part of a message."""
    if isinstance(part, str):
        return part
    is_text = isinstance(part, dict) and part.get("type") in ("text", "input_text", None)
    if is_text and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise PromptError(
        f"{place} is of type {shown(kind)}, and models are asked in text alone: remove the part, "
        "or the row"
    )


def _answered(
    place: str, messages: tuple[dict[str, str], ...], reference: str | None, source: PromptSource
) -> tuple[tuple[dict[str, str], ...], str]:
    """Prompt and reference of a conversation that ends with the assistant's answer."""
    *asked, answer = messages
    if not source.answered:
        raise PromptError(
            f"{place}: the last message has the role `assistant`, but a prompt ends before the "
            "answer: remove that message, or give the source `answered: true`, which takes it as "
            "the reference"
        )
    if reference is not None:
        raise PromptError(
            f"{place}: the row has a `reference`, and its last message is the answer, which "
            "`answered: true` takes as the reference: give one of the two"
        )
    if not asked or asked[-1]["role"] == "assistant":
        raise PromptError(
            f"{place}: no message of another role stands before the assistant's answer: add the "
            "question, or remove the row"
        )
    return tuple(asked), answer["content"]


def _split(identifier: str, config: PromptsConfig) -> str:
    position = unit_interval(identifier)
    if position < config.holdout_fraction:
        return "holdout"
    if position < config.holdout_fraction + config.validation_fraction:
        return "validation"
    return "train"
