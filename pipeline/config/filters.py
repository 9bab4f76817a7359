"""`synthesis.filters`: one model for each filter that chooses the answers to train on.

A new filter needs its model here, in the union `Filter`, its function, and its entry in the
dictionary of `pipeline/filters/run.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Count, Given, Name, Positive, Real, Section, Whole

Script = Literal[
    "arabic", "armenian", "bengali", "cyrillic", "devanagari", "ethiopic", "georgian", "greek",
    "gujarati", "han", "hangul", "hebrew", "hiragana", "katakana", "khmer", "latin", "tamil",
    "telugu", "thai",
]  # fmt: skip
Compared = Literal["prompt", "answer", "both"]


class FilterSection(Section):
    """Fields that all filters share."""

    if TYPE_CHECKING:  # each subclass has its field, behind the shared ones
        type: str

    spares: list[Name] = Field(default_factory=list)
    """Authors whose answers the filter neither looks at nor drops: names of teachers, `student` or
    `dataset`. Use `[student]` for a student on its own policy, which learns from its mistakes."""

    @property
    def scoring_teacher(self) -> str | None:
        """Teacher whose cached rows the filter reads; None if it reads none."""
        return None

    @property
    def named_teacher(self) -> str | None:
        """Teacher that the filter names, to read its rows or to ask it; None if it names none."""
        return self.scoring_teacher


class Length(FilterSection):
    """Drops answers that are too short or too long."""

    type: Literal["length"]
    min_tokens: Count | None = None
    """Fewest tokens of a kept answer, its end of sequence included. Give this, `max_tokens`, or
    both."""
    max_tokens: Count | None = None
    """Most tokens of a kept answer, its end of sequence included."""

    @model_validator(mode="after")
    def _bounds_leave_something(self) -> Length:
        _check_bounds("min_tokens", self.min_tokens, "max_tokens", self.max_tokens)
        return self


class Alphabet(FilterSection):
    """Drops answers that are written in other scripts than the expected ones."""

    type: Literal["alphabet"]
    scripts: Annotated[list[Script], Field(min_length=1)]
    """Scripts that an answer may be written in. Digits, punctuation and spaces belong to all
    scripts, and an answer without letters passes."""
    min_share: Annotated[Real, Field(gt=0, le=1)]
    """Smallest share, from 0 to 1, of a kept answer's letters that belong to `scripts`. Choose it
    below 1, such as 0.9, to allow single foreign words."""


class Repetition(FilterSection):
    """Drops answers that repeat themselves in a loop."""

    type: Literal["repetition"]
    ngram: Annotated[Whole, Field(ge=1)]
    """Length in tokens of the n-grams whose repetition is counted. Longer n-grams find only longer
    repeated passages; answers with fewer tokens pass."""
    max_share: Annotated[Real, Field(ge=0, lt=1)]
    """Largest share, from 0 to 1, of a kept answer's n-grams that occurred in it before. An answer
    that says one sentence over and over has a share near 1."""


class ExactDuplicate(FilterSection):
    """Drops train sequences that look like an earlier one, apart from case and spaces.

    Texts are compared in Unicode's form NFKC without characters that have no shape, so that two
    forms of one accent, digit or letter are the same.
    """

    type: Literal["exact_duplicate"]
    of: Compared
    """Text that is compared: the `prompt`, the `answer`, or `both` together. With `prompt`, several
    answers to one prompt are no duplicates of each other."""


class NearDuplicate(FilterSection):
    """Drops train sequences that are nearly the same as an earlier one.

    Texts are compared in the form that `exact_duplicate` compares, by the Jaccard similarity of
    their shingles (Broder, On the resemblance and containment of documents, 1997).
    """

    type: Literal["near_duplicate"]
    of: Compared
    """Text that is compared: the `prompt`, the `answer`, or `both` together. With `prompt`, several
    answers to one prompt are no duplicates of each other."""
    min_similarity: Annotated[Real, Field(gt=0, le=0.99)]
    """Jaccard similarity of two texts' sets of shingles, from 0 to 0.99, from which on the later
    one is dropped. Lower values drop more; 0.8 drops texts that differ in a few words."""
    shingle: Count
    """Number of characters of a shingle, the unit in which texts are compared. Take about 5 for
    short texts and 9 or more for long ones, where short shingles are common to all texts."""


class EvaluationFile(Section):
    """Texts that must not be trained on."""

    path: Given
    """File or folder in one of the formats of `prompts.sources`."""
    fields: Annotated[list[str], Field(min_length=1)]
    """Columns whose texts must not be trained on, such as `[question, answer]`. A cell holds a
    text, a list of texts, or chat messages; cells without a text are skipped and counted."""


class Contamination(FilterSection):
    """Drops train and validation sequences that share n-grams with what is evaluated.

    Compared are the run's hold-out prompts and evaluation files, without case, punctuation and
    characters that have no shape. An n-gram counts words (13 in Brown et al., arXiv 2005.14165), or
    characters in scripts without spaces. Words that most hold-out prompts of a domain share, or
    that a source's `template` holds, are no evidence. An evaluated text with too few words of its
    own counts as found only if it is a whole prompt.
    """

    type: Literal["contamination"]
    ngram: Annotated[Whole, Field(ge=2)]
    """Number of consecutive words that a sequence must share with an evaluated text to be dropped.
    Small values drop sequences for common phrases; 13 is usual for prose, 6 to 8 for short
    questions."""
    files: list[EvaluationFile] = Field(default_factory=list)
    """Evaluation files whose texts are compared besides the run's own hold-out prompts."""


class Checker(FilterSection):
    """Drops answers that `prompts.checker` finds wrong, or at which it raises an error.

    Answers to prompts without a reference, or with one that the checker cannot read, pass.
    """

    type: Literal["checker"]


class Judge(FilterSection):
    """Drops answers that a teacher grades low by a rubric.

    The teacher's engine can write nothing but a grade from 1 to 5. An endpoint that exchanges text
    cannot be bound so; answers whose grade it does not say clearly are dropped.
    """

    type: Literal["judge"]
    teacher: Name
    """Teacher that grades the answers. An answer that does not fit into the teacher's
    `max_model_len` together with the rubric is dropped."""
    min_grade: Annotated[Whole, Field(ge=2, le=5)]
    """Lowest grade, from 2 to 5, of a kept answer; 5 is best. Grades are stored, so another value
    asks the teacher nothing again."""
    rubric: Given | None = None
    """Text file of yours with `{prompt}` and `{answer}` in it, shown to the teacher in place of the
    shipped `judge.txt`. It must ask for one digit from 1 to 5."""

    @property
    def named_teacher(self) -> str | None:
        return self.teacher


class Agreement(FilterSection):
    """Keeps the answer on which most samples for a prompt agree, and drops the others."""

    type: Literal["agreement"]
    by: Literal["exact", "number"]
    """Meaning of agreement: answers have the same text behind their thoughts (`exact`), or the same
    `number`, as the checker of that name reads it. Answers without one vote for none."""
    min_share: Annotated[Real, Field(gt=0, le=1)]
    """Smallest share, from 0 to 1, of a prompt's samples that must agree on the winning answer.
    Without such a winner, and in a tie, all answers to the prompt are dropped."""


class BestOf(FilterSection):
    """Keeps the best answers to each prompt."""

    type: Literal["best_of"]
    keep: Count
    """Number of answers that are kept of each prompt. It must be below the largest number of
    answers that a prompt can have."""
    by: Literal["shortest", "longest", "samples", "likelihood"]
    """Order of the answers to a prompt, best first: fewest tokens (`shortest`), most tokens
    (`longest`), the text behind the thoughts written most often (`samples`), or highest mean
    log-likelihood under `teacher` (`likelihood`). With `likelihood` this filter, and all behind it,
    run after scoring. Answers that were cut in their thoughts are dropped."""
    teacher: Name | None = None
    """Teacher under which the likelihood is taken; needed with `by: likelihood`, and only then."""

    @property
    def scoring_teacher(self) -> str | None:
        return self.teacher

    @model_validator(mode="after")
    def _teacher_goes_with_likelihood(self) -> BestOf:
        if self.by == "likelihood" and self.teacher is None:
            raise ValueError(
                "by: likelihood needs `teacher`, the teacher under which the likelihood is taken"
            )
        if self.by != "likelihood" and self.teacher is not None:
            raise ValueError(
                f"`teacher` has no effect with by: {self.by}: leave it out, or set by: likelihood"
            )
        return self


class Balance(FilterSection):
    """Drops train sequences at random until the domains have the given shares."""

    type: Literal["balance"]
    shares: Annotated[dict[Name, Positive], Field(min_length=1)]
    """Relative number of train sequences of every domain that has train prompts, such as
    `{code: 2, words: 1}`. The scarcest domain is kept whole, and the others are cut to their
    shares relative to it."""


class Perplexity(FilterSection):
    """Drops answers that a teacher finds too likely or too unlikely, by its cached rows.

    This filter, and all filters behind it, run after scoring.
    """

    type: Literal["perplexity"]
    teacher: Name
    """Teacher under which the perplexity of an answer is taken: exp(-mean log-likelihood of the
    answer's tokens). Answers that the teacher could not score are dropped."""
    min: Positive | None = None
    """Lowest perplexity of a kept answer; it drops text that the teacher knows by heart. Give this,
    `max`, or both."""
    max: Positive | None = None
    """Highest perplexity of a kept answer; it drops text that the teacher finds implausible."""

    @property
    def scoring_teacher(self) -> str | None:
        return self.teacher

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


def _check_bounds(low: str, minimum: float | None, high: str, maximum: float | None) -> None:
    if minimum is None and maximum is None:
        raise ValueError(f"neither {low} nor {high} is given: give one of them, or both")
    if minimum is not None and maximum is not None and minimum > maximum:
        raise ValueError(
            f"{low} ({minimum}) is above {high} ({maximum}), so no answer would be kept: lower "
            f"{low}, or raise {high}"
        )
