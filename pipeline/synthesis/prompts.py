"""Prompt sources to one checked, split, deduplicated table.

A row has `messages` (chat) or `text` (raw), and optionally `id`, `domain` and `reference`. A bad
row ends the reading with an error that names file, line and reason; nothing is read in part.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from pipeline import storage
from pipeline.config.prompts import PromptsConfig, PromptSource
from pipeline.errors import PromptError
from pipeline.fingerprint import digest_json
from pipeline.layout import Layout
from pipeline.messages import closest, shown
from pipeline.records import Prompt
from pipeline.synthesis.parsing import columns_of, parse_row
from pipeline.synthesis.rows import numbered_rows

logger = logging.getLogger(__name__)

PRECEDENCE = ("holdout", "validation", "train")
"""Splits in the order in which they keep a prompt that stands in several of them."""
PLACES_SHOWN = 3
FEW_DISAGREEING = 10
FEW_DISAGREEING_SHARE = 0.01  # of the rows that are read

PROMPT_SCHEMA = pa.schema(
    [
        (name, pa.string())
        for name in ("prompt_id", "domain", "split", "messages", "text", "reference")
    ],
    metadata={"polystill.schema_version": "1"},
)


def read_prompts(config: PromptsConfig, quiet: bool = False) -> tuple[list[Prompt], dict[str, int]]:
    """Reads all sources in order and drops exact duplicates.

    Of equal prompts that of the split that comes first in `PRECEDENCE` stays, and in one split the
    first. Rows with equal prompts and other references or domains are named in the log.

    Args:
        quiet: logs no cautions, for a command that reads the prompts twice.

    Returns:
        The prompts, and counts: `read`, `duplicates`, `disagreeing` if there are any, and the
        number of prompts in each split.

    Raises:
        PromptError: a file is missing or empty, a row is malformed, one id names two different
            prompts, or many rows of one split disagree.
    """
    pool = _Pool()
    cautions = []
    for source in config.sources:
        columns: set[str] = set()
        for place, prompt in _prompts_of(source, config, columns):
            pool.add(place, prompt)
        if "split" in columns and source.split is None:
            cautions.append(
                f"{source.path} has a column 'split', which is not read: give each split a source "
                "of its own with `split`, if it says which rows are held out"
            )
    cautions += pool.check()
    _refuse_alike_domains(pool)
    for caution in [] if quiet else cautions:
        logger.warning("caution: %s", caution)
    prompts = [prompt for prompt, _ in pool.kept.values()]
    return prompts, dict(pool.counts + Counter(prompt.split for prompt in prompts))


@dataclass
class _Pool:
    """Different prompts, each with its place, by the hash of their words.

    Attributes:
        disagreeing: places of two rows with equal prompts and the difference between them, first of
            different splits, then of one.
    """

    kept: dict[str, tuple[Prompt, str]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    disagreeing: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))

    def add(self, place: str, prompt: Prompt) -> None:
        """Takes a prompt into the pool, or drops it or the one that it repeats."""
        content = digest_json([prompt.messages, prompt.text])
        self.counts["read"] += 1
        if content not in self.kept:
            self.kept[content] = prompt, place
            return
        self.counts["duplicates"] += 1
        left, stays = (prompt, place), self.kept[content]
        if PRECEDENCE.index(prompt.split) < PRECEDENCE.index(stays[0].split):
            left, stays = stays, left
            del self.kept[content]  # the prompt stands where its own row does
            self.kept[content] = stays
        if difference := _difference(left[0], stays[0]):
            self.counts["disagreeing"] += 1
            pair = f"{left[1]} beside {stays[1]} ({difference})"
            self.disagreeing[left[0].split == stays[0].split].append(pair)

    def check(self) -> list[str]:
        """Cautions about rows that disagree, for people.

        Raises:
            PromptError: many rows of one split disagree, or one id names two prompts.
        """
        places: dict[str, str] = {}
        for prompt, place in self.kept.values():
            if other := places.get(prompt.prompt_id):
                raise PromptError(
                    f"{place}: id {shown(prompt.prompt_id)} already names another prompt at "
                    f"{other}; give each prompt an id of its own"
                )
            places[prompt.prompt_id] = place
        across, within = self.disagreeing
        if len(within) > max(FEW_DISAGREEING, FEW_DISAGREEING_SHARE * self.counts["read"]):
            raise PromptError(
                f"{len(within)} of {self.counts['read']} rows repeat a prompt of their split with "
                f"another reference or domain, such as {'; '.join(within[:PLACES_SHOWN])}: if a "
                "column tells them apart, put it into the source's `template`; otherwise keep one "
                "row of each prompt"
            )
        if not (pairs := [*within, *across]):
            return []
        return [
            f"{len(pairs)} of {self.counts['read']} rows repeat a prompt with another reference or "
            f"domain and are left out, such as {'; '.join(pairs[:PLACES_SHOWN])}"
        ]


def _refuse_alike_domains(pool: _Pool) -> None:
    """Refuses domains whose folders are one where a disk does not tell large from small letters."""
    places: dict[str, tuple[str, str]] = {}
    for prompt, place in pool.kept.values():
        other, first = places.setdefault(prompt.domain.casefold(), (prompt.domain, place))
        if other != prompt.domain:
            raise PromptError(
                f"{place}: domain {prompt.domain!r} differs from {other!r} at {first} in large and "
                "small letters alone: write both in one way"
            )


def _difference(left: Prompt, stays: Prompt) -> str:
    """Values that are lost with a prompt that is left out for an equal one, for people."""
    values = {
        "reference": (left.reference or stays.reference, stays.reference),
        "domain": (left.domain, stays.domain),
    }
    return ", ".join(
        f"{name} {_short(lost)} against {_short(kept)}"
        for name, (lost, kept) in values.items()
        if lost != kept
    )


def _short(value: str | None) -> str:
    text = "none" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _prompts_of(
    source: PromptSource, config: PromptsConfig, found: set[str]
) -> Iterator[tuple[str, Prompt]]:
    """Yields place and prompt of every row of a source.

    Args:
        found: set to which the columns of all rows are added.

    Raises:
        PromptError: a row is malformed, or a setting of the source concerns no row.
    """
    has_reference = False
    for place, row in numbered_rows(source.path, source.limit):
        prompt = parse_row(place, row, source, config)
        found.update(row)
        has_reference = has_reference or prompt.reference is not None
        yield place, prompt
    columns = columns_of(source)
    for name in (*source.fields, *(f"{{{column}}}" for column in source.columns)):
        if (column := columns.get(name)) not in found and column is not None:
            setting = "`fields`" if name in source.fields else f"{name} in the template"
            raise PromptError(
                f"{source.path}: {setting} names the column {shown(column)}, but no row has it; "
                f"{closest(column, found)}"
            )
    if source.answered and not has_reference:
        raise PromptError(
            f"{source.path}: `answered: true` takes the assistant's last message as the reference, "
            "and no row ends with one: remove the setting, or give conversations with answers"
        )


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
