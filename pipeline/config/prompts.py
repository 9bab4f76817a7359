"""`prompts`: the sources of the prompts, their splits, and the check of their answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Count, Fraction, Given, Name, Section

FIELDS = ("messages", "text", "id", "domain", "reference")
"""Fields of a row."""
# Doubled braces stand for themselves, and so do the arguments of a LaTeX command (`\\boxed{x}`).
_IN_BRACES = re.compile(
    r"\{\{|\}\}|\\[A-Za-z]{2,}(?:\{[^{}]*\})+|\{(?P<column>[^\W\d][\w .-]*)\}|(?P<lone>[{}])"
)
_BLANK_LINES = re.compile(r"(\n(?:[ \t]*\n)+)")


class PromptSource(Section):
    """One file or folder of prompts."""

    path: Given
    """File whose name ends in `.jsonl` (or `.ndjson`), `.json`, `.csv`, `.tsv` or `.parquet`, the
    texts also compressed (`.jsonl.gz`), or folder of a Hugging Face dataset (`save_to_disk`); a
    local path or a URI such as `s3://…`. Each row holds one prompt: chat `messages` or raw `text`,
    and optionally `id`, `domain` and `reference`, the correct answer."""
    domain: Name | None = None
    """Domain of rows that have no `domain` field. Domains connect prompts with teachers
    (`by: domain_teacher`), weights (`by_domain`) and the tables of the report."""
    split: Literal["train", "validation", "holdout"] | None = None
    """Split of all rows of the source: `train`, `validation` (for learned weights), or `holdout`
    (for the report). Without it, each row is put into a split by the hash of its id, in the shares
    `prompts.validation_fraction` and `prompts.holdout_fraction`."""
    fields: dict[Literal["messages", "text", "id", "domain", "reference"], str] = Field(
        default_factory=dict
    )
    """Names of the source's columns where they differ from the expected ones, such as
    `{text: question, reference: solution}`."""
    template: str | None = None
    """Text that is wrapped around the `text` of every row, such as
    `"Question: {text}\\nAnswer:"`, or filled with several columns, such as
    `"{instruction}\\n\\n{input}"`. In a template of columns a paragraph, or a line, all of whose
    columns are empty is left out, and braces that are meant as such are doubled."""
    chat: Annotated[bool, Field(exclude_if=lambda chat: not chat)] = False
    """Makes every `text` a chat whose only message is the user's."""
    answered: Annotated[bool, Field(exclude_if=lambda answered: not answered)] = False
    """Takes the last message of a conversation, where it is the assistant's, off the prompt as its
    `reference`. Without it, such a row is refused."""
    limit: Count | None = None
    """Largest number of rows that are read, from the beginning; without it all are read. Use it for
    a quick trial."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns with which the template is filled; none if it is wrapped around `text` alone."""
        names = _columns_in(self.template or "")
        return names if set(names) - {"text"} else ()

    @property
    def wording(self) -> list[str]:
        """Pieces of the template between its columns, which all prompts of the source share."""
        if not self.columns:
            return (self.template or "").split("{text}")
        between = "\0"
        return _filled(self.template or "", dict.fromkeys(self.columns, between)).split(between)

    def fill(self, cells: Mapping[str, str]) -> str:
        """The template of several columns with their texts.

        A paragraph all of whose columns are empty is left out, and so is such a line.
        """
        # Paragraphs stand at even places, and the blank lines before each of them at odd places.
        parts = ["", *_BLANK_LINES.split(self.template or "")]
        kept = []
        for gap, paragraph in zip(parts[::2], parts[1::2], strict=True):
            if _has_text(paragraph, cells):
                lines = [_filled(x, cells) for x in paragraph.split("\n") if _has_text(x, cells)]
                kept += [gap if kept else "", "\n".join(lines)]
        return "".join(kept)

    @model_validator(mode="after")
    def _template_can_be_filled(self) -> PromptSource:
        if self.template is None:
            return self
        if not self.columns and "{text}" not in self.template:
            raise ValueError(
                "template must hold {text}, the place of the row's text, or the names of columns "
                f"in braces, found {self.template!r}"
            )
        if self.columns and any(match["lone"] for match in _IN_BRACES.finditer(self.template)):
            raise ValueError(
                "template has a brace that belongs to no column: double braces that are meant as "
                f"such ({{{{ and }}}}), found {self.template!r}"
            )
        if (answer := self.fields.get("reference", "reference")) in self.columns:
            raise ValueError(
                f"template shows the column {answer!r}, which is the reference, to the models: "
                "remove it, or double the braces if they are meant as such"
            )
        if self.columns and "text" in self.fields and "text" not in self.columns:
            raise ValueError(
                "fields.text has no effect, since the template names other columns: remove it, or "
                "put {text} into the template"
            )
        return self


class PromptsConfig(Section):
    """The prompts, their splits, and the check of their answers."""

    sources: Annotated[list[PromptSource], Field(min_length=1)]
    """Sources, read in this order. Exact duplicates are dropped and counted: a hold-out prompt
    stays before one of the validation split, and that before a train prompt, whatever their order;
    of equal prompts in one split the first stays."""
    validation_fraction: Fraction = 0.0
    """Share of the prompts, from 0 to 1, that goes into the validation split; the hash of a
    prompt's id decides, so a prompt never changes its split. It concerns sources without a
    `split`. `combine.weights: {type: learned}` needs a validation split."""
    holdout_fraction: Fraction = 0.0
    """Share of the prompts, from 0 to 1, that is kept out of training for the report; the hash of a
    prompt's id decides. It concerns sources without a `split`."""
    checker: Given | None = None
    """Function that says whether an answer is right, given the prompt's reference: `exact` (the
    same text), `number` (the same number or formula, behind `####`, in `\\boxed{}` or at the end),
    `math` (the same in mathematics; needs the extra `polystill[math]`), or the dotted path of your
    own function `(answer, reference) -> bool` in a package that is installed on every node. It sees
    the text behind the answer's thoughts, and may return `None` for a reference that it cannot
    read. The filter `checker` and the report's accuracy need it."""

    @property
    def wording(self) -> list[str]:
        """Pieces of all templates that hold more than spaces."""
        pieces = (piece for source in self.sources for piece in source.wording)
        return list(dict.fromkeys(piece for piece in pieces if piece.strip()))

    @model_validator(mode="after")
    def _fractions_have_an_effect(self) -> PromptsConfig:
        is_split = all(source.split is not None for source in self.sources)
        if is_split and (self.validation_fraction or self.holdout_fraction):
            raise ValueError(
                "every source has a `split`, so validation_fraction and holdout_fraction have no "
                "effect: leave both out, or remove the `split` of a source"
            )
        return self


def _columns_in(template: str) -> tuple[str, ...]:
    names = (match["column"] for match in _IN_BRACES.finditer(template))
    return tuple(dict.fromkeys(name for name in names if name))


def _has_text(part: str, cells: Mapping[str, str]) -> bool:
    """Whether a part of a template names no column, or one that is not empty."""
    names = _columns_in(part)
    return not names or any(cells[name] for name in names)


def _filled(line: str, cells: Mapping[str, str]) -> str:
    """A line of a template of several columns."""

    def text_of(match: re.Match[str]) -> str:
        if match["column"]:
            return cells[match["column"]]
        return match[0][0] if match[0] in ("{{", "}}") else match[0]

    filled = _IN_BRACES.sub(text_of, line)
    return filled if all(cells[name] for name in _columns_in(line)) else filled.rstrip()
