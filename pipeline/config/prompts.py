"""`prompts`: the sources of the prompts, their splits, and the check of their answers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Count, Fraction, Name, Section


class PromptSource(Section):
    """One file or folder of prompts."""

    path: str
    """JSONL file, Parquet file, or folder of a Hugging Face dataset (`save_to_disk`); a local path
    or a URI such as `s3://…`. Each row holds one prompt: chat `messages` or raw `text`, and
    optionally `id`, `domain` and `reference`, the correct answer."""
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
    """Text with `{text}` in it that is wrapped around the `text` of every row, such as
    `"Question: {text}\\nAnswer:"`."""
    limit: Count | None = None
    """Largest number of rows that are read, from the beginning; without it all are read. Use it for
    a quick trial."""

    @model_validator(mode="after")
    def _template_names_text(self) -> PromptSource:
        if self.template is not None and "{text}" not in self.template:
            raise ValueError(
                f"template must hold {{text}}, the place of the row's text, found {self.template!r}"
            )
        return self


class PromptsConfig(Section):
    """The prompts, their splits, and the check of their answers."""

    sources: Annotated[list[PromptSource], Field(min_length=1)]
    """Sources, read in this order. Exact duplicates are dropped and counted; the first stays."""
    validation_fraction: Fraction = 0.0
    """Share of the prompts, from 0 to 1, that goes into the validation split; the hash of a
    prompt's id decides, so a prompt never changes its split. It concerns sources without a
    `split`. `combine.weights: {type: learned}` needs a validation split."""
    holdout_fraction: Fraction = 0.0
    """Share of the prompts, from 0 to 1, that is kept out of training for the report; the hash of a
    prompt's id decides. It concerns sources without a `split`."""
    checker: str | None = None
    """Function that says whether an answer is right, given the prompt's reference: `exact` (the
    same text), `number` (the same final number), or the dotted path of your own function
    `(answer, reference) -> bool` in a package that is installed on every node. The filter `checker`
    and the report's accuracy need it."""

    @model_validator(mode="after")
    def _fractions_have_an_effect(self) -> PromptsConfig:
        is_split = all(source.split is not None for source in self.sources)
        if is_split and (self.validation_fraction or self.holdout_fraction):
            raise ValueError(
                "every source has a `split`, so validation_fraction and holdout_fraction have no "
                "effect: leave both out, or remove the `split` of a source"
            )
        return self
