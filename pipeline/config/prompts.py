"""Configuration of the prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Count, Fraction, Name, Section


class PromptSource(Section):
    """One file or folder of prompts."""

    path: str
    """JSONL or Parquet file, or a Hugging Face dataset folder (`save_to_disk`)."""
    domain: Name | None = None
    """Domain of rows without a `domain` field."""
    split: Literal["train", "validation", "holdout"] | None = None
    """Split of all its rows; without it rows are split by the hash of their id."""
    fields: dict[Literal["messages", "text", "id", "domain", "reference"], str] = Field(
        default_factory=dict
    )
    """Names of the columns, where they differ from ours, e.g. `{text: question}`."""
    template: str | None = None
    """A text with `{text}` in it that wraps the prompt, e.g. `"Question: {text}\\nAnswer:"`."""
    limit: Count | None = None
    """Only the first rows."""

    @model_validator(mode="after")
    def _template_names_text(self) -> PromptSource:
        if self.template is not None and "{text}" not in self.template:
            raise ValueError(f"template must hold {{text}}, got {self.template!r}")
        return self


class PromptsConfig(Section):
    """The prompts and how their answers are judged."""

    sources: Annotated[list[PromptSource], Field(min_length=1)]
    """Read in order; exact duplicates are dropped and counted."""
    validation_fraction: Fraction = 0.0
    """Share of the prompts, by id hash, put into the validation split (sources without a split)."""
    holdout_fraction: Fraction = 0.0
    """Share of the prompts, by id hash, kept for the final report (sources without a split)."""
    checker: str | None = None
    """How an answer is compared with its reference: `exact` text, final `number`, or the dotted
    path of a function `(answer, reference) -> bool` of an installed package.
    """

    @model_validator(mode="after")
    def _fractions_are_of_something(self) -> PromptsConfig:
        is_split = all(source.split is not None for source in self.sources)
        if is_split and (self.validation_fraction or self.holdout_fraction):
            raise ValueError(
                "every source has a `split`, so validation_fraction and holdout_fraction would do "
                "nothing: leave them out, or take the `split` from a source"
            )
        return self
