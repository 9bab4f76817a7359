"""Texts that are evaluated, and the words by which the filter contamination finds them again.

Words that most evaluated texts share, such as an instruction before every question, say nothing
about where a text comes from: they are no evidence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from pipeline.config.filters import EvaluationFile
from pipeline.errors import ConfigError
from pipeline.filters.words import words_of
from pipeline.messages import closest, shown
from pipeline.synthesis.rows import numbered_rows

FEWEST_SHARING = 5
"""Fewest texts of a group, such as the hold-out prompts of a domain, that can share words."""
MOST_COUNTED = 1000
"""Texts of a group among which shared words are looked for, evenly spaced."""

Ngram = tuple[str, ...]


@dataclass
class EvaluatedTexts:
    """N-grams and whole texts by which evaluated texts are found, each with its place.

    Attributes:
        width: words of an n-gram.
        ngrams: n-grams of texts with enough words of their own.
        wholes: words of texts that have too few, which count only as a whole prompt.
    """

    width: int
    ngrams: dict[Ngram, str] = field(default_factory=dict)
    wholes: dict[Ngram, str] = field(default_factory=dict)

    def add(self, texts: Sequence[tuple[str, str]], wording: Iterable[str]) -> None:
        """Adds a group of texts that may share words.

        A phrase of half an n-gram is shared if it stands in more than half of the texts, of which
        there must be `FEWEST_SHARING`, or in `wording`.

        Args:
            texts: places and texts.
            wording: pieces of templates, which are shared however few texts there are.
        """
        length = max(2, self.width // 2)
        worded = [(place, words) for place, text in texts if (words := words_of(text))]
        shared = {gram for piece in wording for gram in ngrams_of(words_of(piece), length)}
        if len(worded) >= FEWEST_SHARING:
            counted = worded[:: -(-len(worded) // MOST_COUNTED)]
            counts = Counter(gram for _, words in counted for gram in set(ngrams_of(words, length)))
            shared |= {gram for gram, count in counts.items() if 2 * count > len(counted)}
        for place, words in worded:
            self._add(place, words, _own(words, shared, length))

    def _add(self, place: str, words: list[str], is_own: list[bool]) -> None:
        """Adds a text, of whose words some are its own.

        The n-grams with the most own words are evidence if half of their words are own.
        """
        counts = [sum(part) for part in _windows(is_own, self.width)]
        most = max(counts, default=0)
        if 2 * most >= self.width:
            for gram, count in zip(ngrams_of(words, self.width), counts, strict=True):
                if count == most:
                    self.ngrams.setdefault(gram, place)
        if most < self.width:
            own = tuple(word for word, is_one in zip(words, is_own, strict=True) if is_one)
            for whole in filter(None, (tuple(words), own)):
                self.wholes.setdefault(whole, place)


def ngrams_of(words: Sequence[str], width: int) -> Iterator[Ngram]:
    """All runs of `width` words."""
    return zip(*(islice(words, i, None) for i in range(width)), strict=False)


def _windows(values: Sequence[bool], width: int) -> Iterator[Sequence[bool]]:
    return (values[i : i + width] for i in range(len(values) - width + 1))


def _own(words: Sequence[str], shared: set[Ngram], length: int) -> list[bool]:
    """Whether each word stands outside all shared phrases."""
    is_own = [True] * len(words)
    if shared:
        for i, gram in enumerate(ngrams_of(words, length)):
            if gram in shared:
                is_own[i : i + length] = [False] * length
    return is_own


@dataclass(frozen=True)
class EvaluationColumn:
    """Texts of one column of an evaluation file.

    Attributes:
        texts: places and texts.
        num_empty: number of rows without a text.
    """

    texts: list[tuple[str, str]] = field(default_factory=list)
    num_empty: int = 0


def read_evaluation_file(file: EvaluationFile) -> dict[str, EvaluationColumn]:
    """Reads the columns of an evaluation file that are compared.

    A cell holds a text, a list of texts, or chat messages; a cell without a value is skipped.

    Raises:
        ConfigError: a column does not exist, holds no text, or holds something else.
        PromptError: the file cannot be read.
    """
    texts: dict[str, list[tuple[str, str]]] = {name: [] for name in file.fields}
    num_rows, columns, empty = 0, set[str](), Counter[str]()
    for place, row in numbered_rows(file.path):
        num_rows += 1
        if not isinstance(row, dict):
            raise ConfigError(f"{place}: a row must be an object, found {type(row).__name__}")
        columns.update(row)
        for name in file.fields:
            cell = [text for text in _texts_in(place, name, row.get(name)) if text.strip()]
            texts[name] += [(place, text) for text in cell]
            empty[name] += not cell
    for name in file.fields:
        if name not in columns:
            raise ConfigError(
                f"{file.path}: the filter contamination needs the column {shown(name)}, and no "
                f"row has it; {closest(name, columns)}: correct `fields` of this file"
            )
        if not texts[name]:
            raise ConfigError(
                f"{file.path}: the filter contamination needs texts in the column {shown(name)}, "
                f"which is empty in all {num_rows} rows: correct `fields` of this file"
            )
    return {name: EvaluationColumn(texts[name], empty[name]) for name in file.fields}


def _texts_in(place: str, name: str, cell: Any) -> list[str]:
    """Texts of a cell; chat messages are one text, without system messages."""
    if cell is None:
        return []
    if isinstance(cell, str):
        return [cell]
    parts: list[Any] = cell if isinstance(cell, list) else [None]
    if all(isinstance(part, str) for part in parts):
        return parts
    if all(isinstance(part, Mapping) for part in parts):
        turns = [part for part in parts if part.get("role", part.get("from")) != "system"]
        contents = [turn.get("content", turn.get("value")) for turn in turns]
        if all(isinstance(content, str) for content in contents):
            return ["\n".join(contents)]
    raise ConfigError(
        f"{place}: the filter contamination needs a text, a list of texts or chat messages in "
        f"{shown(name)}, found {type(cell).__name__}: correct `fields` of this file"
    )
