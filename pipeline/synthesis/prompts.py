"""Prompt sources: JSONL, Parquet or dataset folders to one checked, split, deduplicated table.

A row has `messages` (chat) or `text` (raw), and optionally `id`, `domain` and `reference`. A bad
row ends the reading with an error that names file, line and reason; nothing is read in part.
"""

from __future__ import annotations

import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.config.base import NAME
from pipeline.config.prompts import PromptsConfig, PromptSource
from pipeline.errors import PromptError
from pipeline.fingerprint import digest_json, unit_interval
from pipeline.layout import Layout
from pipeline.records import Prompt

FIELDS = ("messages", "text", "id", "domain", "reference")
ROLES = ("system", "developer", "user", "assistant", "tool")

PROMPT_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in ("prompt_id", "domain", "split", "messages", "text", "reference")
    ],
    metadata={"polystill.schema_version": "1"},
)


def read_prompts(config: PromptsConfig) -> tuple[list[Prompt], dict[str, int]]:
    """Reads all sources in order and drops exact duplicates; the first of equal prompts stays.

    Returns:
        The prompts, and counts: `read`, `duplicates`, and the number of prompts in each split.

    Raises:
        PromptError: a file is missing or empty, a row is malformed, or one id names two different
            prompts.
    """
    kept: dict[str, Prompt] = {}
    places: dict[str, str] = {}
    contents: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for source in config.sources:
        columns: set[str] = set()
        for place, row in numbered_rows(source.path, source.limit):
            prompt = _parse(place, row, source, config)
            columns |= row.keys()
            content = digest_json([prompt.messages, prompt.text])
            counts["read"] += 1
            if content in contents:
                counts["duplicates"] += 1
                continue
            if prompt.prompt_id in kept:
                raise PromptError(
                    f"{place}: id {prompt.prompt_id!r} already names another prompt at "
                    f"{places[prompt.prompt_id]}; give each prompt an id of its own"
                )
            contents[content] = prompt.prompt_id
            kept[prompt.prompt_id], places[prompt.prompt_id] = prompt, place
        if absent := sorted(set(source.fields.values()) - columns):
            raise PromptError(
                f"{source.path}: `fields` names {absent}, but no row has such a column; the "
                f"columns are {sorted(columns)}"
            )
    counts.update(prompt.split for prompt in kept.values())
    return list(kept.values()), dict(counts)


def write_prompts(layout: Layout, prompts: list[Prompt]) -> str:
    """Writes the prompt table under the digest of its content; returns the digest."""
    rows = [vars(p) | {"messages": json.dumps(p.messages) if p.messages else None} for p in prompts]
    digest = digest_json(rows)
    storage.write_table(layout.prompts(digest), pa.Table.from_pylist(rows, schema=PROMPT_SCHEMA))
    return digest


def load_prompts(layout: Layout, digest: str) -> list[Prompt]:
    """Reads the prompt table of a digest.

    Raises:
        StorageError: the table is missing or corrupt.
    """
    return [
        Prompt(
            **row | {"messages": tuple(json.loads(row["messages"])) if row["messages"] else None}
        )
        for row in storage.read_table(layout.prompts(digest)).to_pylist()
    ]


def numbered_rows(path: str, limit: int | None = None) -> Iterator[tuple[str, Any]]:
    """Reads the rows of a JSONL or Parquet file or a dataset folder.

    Args:
        limit: largest number of rows to read.

    Yields:
        Place of the row, `file:line` or `file row N`, and the row itself.

    Raises:
        PromptError: the source is missing, empty or malformed.
    """
    if not storage.exists(path):
        raise PromptError(f"the prompt source {path} does not exist")
    rows: Iterator[tuple[str, Any]]
    if path.endswith(".jsonl"):
        rows = _jsonl_rows(path)
    elif path.endswith(".parquet"):
        rows = (
            (f"{path} row {i}", row) for i, row in enumerate(storage.read_table(path).to_pylist())
        )
    else:
        rows = _dataset_rows(path)
    num_rows = 0
    for place, row in rows:
        if limit is not None and num_rows >= limit:
            break
        num_rows += 1
        yield place, row
    if num_rows == 0:
        raise PromptError(f"the prompt source {path} has no rows")


def _jsonl_rows(path: str) -> Iterator[tuple[str, Any]]:
    content = storage.read_bytes(path)
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{path}:{line}: not UTF-8 at byte {error.start} of the file") from error
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(
                f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}"
            ) from error


def _dataset_rows(path: str) -> Iterator[tuple[str, Any]]:
    if not storage.exists(storage.join(path, "dataset_info.json")):
        raise PromptError(
            f"{path} is not a .jsonl or .parquet file, nor a dataset folder written by "
            "save_to_disk; if the dataset has several splits, name the folder of one split"
        )
    import datasets  # slow to import, and only this kind of source needs it

    for i, row in enumerate(datasets.load_from_disk(path)):
        yield f"{path} row {i}", row


def _parse(place: str, row: Any, source: PromptSource, config: PromptsConfig) -> Prompt:
    if not isinstance(row, dict):
        raise PromptError(f"{place}: a row must be an object, found {type(row).__name__}")
    _refuse_misspelt_columns(place, row, source)
    values = {name: row.get(source.fields.get(name, name)) for name in FIELDS}
    messages, text = values["messages"], values["text"]
    if (messages is None) == (text is None):
        found = (
            "both"
            if messages is not None
            else f"neither (fields: {', '.join(map(str, row)) or 'none'})"
        )
        raise PromptError(
            f"{place}: a row must have exactly one of `messages` and `text`, found {found}"
        )
    if text is not None:
        text = _text(place, "text", text)
        text = source.template.replace("{text}", text) if source.template else text
    domain = values["domain"] if values["domain"] is not None else source.domain
    if domain is None:
        raise PromptError(
            f"{place}: the row has no `domain`; add one, or give the source a `domain`"
        )
    if not isinstance(domain, str) or not _is_name(domain):
        raise PromptError(
            f"{place}: domain {domain!r} must consist of letters, digits, '_', '.' and '-' and "
            "begin with a letter or digit"
        )
    checked = _messages(place, messages, source) if messages is not None else None
    identifier = str(values["id"]) if values["id"] is not None else digest_json([checked, text])
    reference = values["reference"]
    return Prompt(
        prompt_id=identifier,
        domain=domain,
        split=source.split or _split(identifier, config),
        messages=checked,
        text=text,
        reference=_text(place, "reference", reference) if reference is not None else None,
    )


def _refuse_misspelt_columns(place: str, row: dict[str, Any], source: PromptSource) -> None:
    """Refuses a row whose column is nearly one of ours; other columns are common and no error."""
    columns = {name: source.fields.get(name, name) for name in FIELDS}
    unused = [column for column in row if column not in columns.values()]
    for name, column in columns.items():
        close = difflib.get_close_matches(column, unused, n=1, cutoff=0.8)
        if column not in row and close and len(column) > len("id"):
            raise PromptError(
                f"{place}: the row has no {column!r}, but {close[0]!r}: rename the column, or give "
                f"the source `fields: {{{name}: {close[0]}}}`"
            )


def _text(place: str, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise PromptError(f"{place}: `{name}` must be a non-empty text, found {value!r}")
    return value


def _messages(place: str, messages: Any, source: PromptSource) -> tuple[dict[str, str], ...]:
    if source.template:
        raise PromptError(
            f"{place}: the source has a `template`, which wraps `text`, but the row has "
            "`messages`: remove the template, or give rows with `text`"
        )
    if not isinstance(messages, list) or not messages:
        raise PromptError(f"{place}: `messages` must be a non-empty list, found {messages!r}")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.keys() != {"role", "content"}:
            raise PromptError(
                f"{place}: messages[{i}] must have exactly `role` and `content`, found {message!r}"
            )
        if message["role"] not in ROLES:
            raise PromptError(
                f"{place}: messages[{i}].role must be one of {', '.join(ROLES)}, found "
                f"{message['role']!r}"
            )
        _text(place, f"messages[{i}].content", message["content"])
    if messages[-1]["role"] == "assistant":
        raise PromptError(
            f"{place}: the last message has the role `assistant`, but a prompt ends before the "
            "answer: remove that message"
        )
    return tuple(messages)


def _is_name(text: str) -> bool:
    return re.fullmatch(NAME, text) is not None


def _split(identifier: str, config: PromptsConfig) -> str:
    position = unit_interval(identifier)
    if position < config.holdout_fraction:
        return "holdout"
    if position < config.holdout_fraction + config.validation_fraction:
        return "validation"
    return "train"
