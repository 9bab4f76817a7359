"""`synthesis.filters`: one model for each filter that decides which answers are trained on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Count, Name, Positive, Section

Script = Literal[
    "arabic", "armenian", "bengali", "cyrillic", "devanagari", "ethiopic", "georgian", "greek",
    "gujarati", "han", "hangul", "hebrew", "hiragana", "katakana", "khmer", "latin", "tamil",
    "telugu", "thai",
]  # fmt: skip
Compared = Literal["prompt", "answer", "both"]


class FilterSection(Section):
    """What all filters share."""

    spares: list[Name] = Field(default_factory=list)
    """Generators whose answers pass unseen: a student on its own policy trains on its mistakes."""


class Length(FilterSection):
    """Drops answers that are too short or too long."""

    type: Literal["length"]
    min_tokens: Count | None = None
    """Fewest tokens of an answer, its end of sequence among them."""
    max_tokens: Count | None = None
    """Most tokens of an answer."""

    @model_validator(mode="after")
    def _bounds_leave_something(self) -> Length:
        _check_bounds("min_tokens", self.min_tokens, "max_tokens", self.max_tokens)
        return self


class Alphabet(FilterSection):
    """Drops answers in another alphabet than the expected ones."""

    type: Literal["alphabet"]
    scripts: Annotated[list[Script], Field(min_length=1)]
    """Alphabets that an answer may use; digits, marks and spaces belong to every one."""
    min_share: Annotated[float, Field(gt=0, le=1)]
    """Smallest share of an answer's letters that belong to them."""


class Repetition(FilterSection):
    """Drops answers that go round in a loop."""

    type: Literal["repetition"]
    ngram: Annotated[int, Field(ge=1)]
    """Tokens of the n-grams that are looked at."""
    max_share: Annotated[float, Field(ge=0, lt=1)]
    """Largest share of an answer's n-grams that stood in it before."""


class ExactDuplicate(FilterSection):
    """Drops sequences of the train split that repeat an earlier one but for case and spaces."""

    type: Literal["exact_duplicate"]
    of: Compared
    """What is compared; answers to one prompt are no duplicates in their `prompt`."""


class NearDuplicate(FilterSection):
    """Drops sequences of the train split that are nearly an earlier one (MinHash, exact check).

    Broder, On the resemblance and containment of documents, 1997.
    """

    type: Literal["near_duplicate"]
    of: Compared
    """What is compared; answers to one prompt are no duplicates in their `prompt`."""
    min_similarity: Annotated[float, Field(gt=0, le=0.99)]
    """Jaccard similarity of the sets of shingles from which on a sequence is dropped."""
    shingle: Count
    """Characters of a shingle; 5 suits short texts, 9 or more long ones."""


class EvaluationFile(Section):
    """Texts that must not be trained on."""

    path: str
    """JSONL or Parquet file, or a Hugging Face dataset folder."""
    fields: Annotated[list[str], Field(min_length=1)]
    """Columns whose texts are compared."""


class Contamination(FilterSection):
    """Drops what shares n-grams with the hold-out prompts or with evaluation files.

    Hold-out sequences are left alone. Words are compared without case and marks (n-grams of 13
    words as in Brown et al., arXiv 2005.14165), in scripts without spaces by character; a shorter
    text is met only as a whole prompt.
    """

    type: Literal["contamination"]
    ngram: Annotated[int, Field(ge=2)]
    """Words in a row that must agree."""
    files: list[EvaluationFile] = Field(default_factory=list)
    """Beside the run's own hold-out prompts."""


class Checker(FilterSection):
    """Drops answers that `prompts.checker` finds wrong; those without a reference pass."""

    type: Literal["checker"]


class Judge(FilterSection):
    """Drops answers that a teacher grades low by a rubric; it can write nothing but a grade."""

    type: Literal["judge"]
    teacher: Name
    """Who grades; answers that are too long for it are dropped."""
    min_grade: Annotated[int, Field(ge=2, le=5)]
    """Lowest grade that is kept, of 1 to 5."""
    rubric: str | None = None
    """Text file with `{prompt}` and `{answer}` in it; without one, the shipped judge.txt."""


class Agreement(FilterSection):
    """Keeps the answers to a prompt that most samples of all generators agree on."""

    type: Literal["agreement"]
    by: Literal["exact", "number"]
    """Answers are the same by their text, or by their final number."""
    min_share: Annotated[float, Field(gt=0, le=1)]
    """Smallest share of a prompt's samples that the winner needs; a tie has no winner."""


class BestOf(FilterSection):
    """Keeps the best answers to each prompt."""

    type: Literal["best_of"]
    keep: Count
    """Answers kept of each prompt."""
    by: Literal["shortest", "longest", "samples", "likelihood"]
    """Tokens; how often the answer was sampled; mean log-likelihood under `teacher`."""
    teacher: Name | None = None
    """Whose likelihood."""

    @model_validator(mode="after")
    def _likelihood_is_some_teachers(self) -> BestOf:
        if (self.teacher is None) == (self.by == "likelihood"):
            raise ValueError(f"`teacher` goes with by: likelihood, got by: {self.by}")
        return self


class Balance(FilterSection):
    """Drops sequences of the train split by chance until the domains have the given shares."""

    type: Literal["balance"]
    shares: Annotated[dict[Name, Positive], Field(min_length=1)]
    """Relative size of every domain with train prompts; as much is kept as the scarcest allows."""


class Perplexity(FilterSection):
    """Drops answers that a teacher finds too likely or too unlikely, from its cached rows.

    Runs after scoring, and so do all filters behind it.
    """

    type: Literal["perplexity"]
    teacher: Name
    """Whose log-likelihood of the answer's tokens; answers it could not score are dropped."""
    min: Positive | None = None
    """Lowest exp(-mean log-likelihood)."""
    max: Positive | None = None
    """Highest exp(-mean log-likelihood)."""

    @model_validator(mode="after")
    def _bounds_leave_something(self) -> Perplexity:
        _check_bounds("min", self.min, "max", self.max)
        return self


Filter = Annotated[
    Length
    | Alphabet
    | Repetition
    | ExactDuplicate
    | NearDuplicate
    | Contamination
    | Checker
    | Judge
    | Agreement
    | BestOf
    | Balance
    | Perplexity,
    Field(discriminator="type"),
]


def scoring_teacher(rule: Filter) -> str | None:
    """The teacher whose cached rows a filter needs."""
    return rule.teacher if isinstance(rule, Perplexity | BestOf) else None


def _check_bounds(low: str, minimum: float | None, high: str, maximum: float | None) -> None:
    if minimum is None and maximum is None:
        raise ValueError(f"a bound is missing: {low}, {high}, or both")
    if minimum is not None and maximum is not None and minimum > maximum:
        raise ValueError(f"{low} ({minimum}) exceeds {high} ({maximum}): nothing would be kept")
