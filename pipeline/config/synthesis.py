"""`synthesis`: the recipes, steps that write prompts or answers, and the filters behind them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Count, Given, Handful, Name, Section, Verbatim, Whole
from pipeline.config.filters import Agreement, BestOf, Filter
from pipeline.config.teachers import AnyTeacher

STUDENT, DATASET_AUTHOR = "student", "dataset"
"""Authors that are no teachers: the student, and the data set whose references are answers."""

TrainRounds = Literal["all", "first", "later", "none"]
EvolveWay = Literal["deeper", "broader", "constraints"]


class Answering(Section):
    """Fields that all recipes share in which models answer prompts."""

    type: str
    by: Name
    """Author of the answers. The name of a teacher: that teacher answers every prompt.
    `domain_teacher`: each prompt is answered by the teacher whose `domains` name the prompt's
    domain. `every_teacher`: every prompt is answered by each teacher. `student`: the model that
    the round's training starts from; it answers train prompts only, so that validation and
    hold-out sequences are the same in every round."""
    train_rounds: TrainRounds = "all"
    """Rounds in which train prompts are answered, for runs with several `rounds`: `all`, only the
    `first`, only the `later` ones, or `none`. Validation and hold-out prompts are answered in
    every round. Choose `first` for teachers and `later` for the student to train on the student's
    own text after one round of the teachers' text."""
    samples_per_prompt: Handful = 1
    """Number of answers that each author writes to each prompt. Equal answers become one sequence.
    Raise it for the filters `agreement` and `best_of`, which compare the answers to a prompt."""
    sampling: Verbatim
    """Sampling parameters, passed to vLLM's `SamplingParams` as they are, such as
    `{temperature: 0.7, max_tokens: 512}`. `max_tokens` is required."""
    sampling_of: dict[Name, Verbatim] = Field(default_factory=dict)
    """Sampling parameters of single authors by their names; they override `sampling` key by key,
    such as `{large: {temperature: 0.3}}`."""

    @property
    def num_samples(self) -> int:
        """Number of replies to the same request."""
        return self.samples_per_prompt


class Answer(Answering):
    """Lets teachers or the student answer the prompts."""

    type: Literal["answer"]
    system_prompt: str | None = None
    """System message put before chat prompts that have none. It becomes part of the sequences that
    are trained on, so the student learns to answer under it; `evaluation.system_prompt` must then
    say whether the hold-out prompts get one, too."""
    keep_truncated: bool = False
    """Also keep answers that were cut at `max_tokens`; they have no end of sequence. By default
    such answers are dropped and counted as `truncated`. Set it for a student on its own policy,
    whose long answers are part of what it must unlearn."""


class Complete(Answering):
    """Lets teachers or the student continue raw `text` prompts; a continuation may be cut at
    `max_tokens`.
    """

    type: Literal["complete"]


class GivenAnswers(Section):
    """Takes the references of the prompts as their answers."""

    type: Literal["dataset"]
    train_rounds: TrainRounds = "all"
    """Rounds in which references of train prompts are taken, for runs with several `rounds`:
    `all`, only the `first`, only the `later` ones, or `none`. References of validation and
    hold-out prompts are taken in every round."""


@dataclass(frozen=True)
class TemplateFile:
    """One prompt template of a recipe that writes prompts.

    Attributes:
        name: key of the template in the recipe's identity.
        key: dotted key of the recipe under which a user gives another file.
        shipped: name of the file in `pipeline/synthesis/templates/`.
        own: the user's file; None if the shipped template is used.
    """

    name: str
    key: str
    shipped: str
    own: str | None


class Writing(Section):
    """Fields that all recipes share in which a teacher writes new prompts from train prompts."""

    placeholder: ClassVar[str] = "prompt"
    """Placeholder that every template of the recipe must hold, in braces."""

    type: str
    teacher: Name
    """Name of the teacher that writes the new prompts."""
    sampling: Verbatim
    """Sampling parameters, passed to vLLM's `SamplingParams` as they are, such as
    `{temperature: 0.8, max_tokens: 1024}`. `max_tokens` is required; a reply that reaches it is
    dropped as `over_long`."""
    keep_input: bool = True
    """Hand on the train prompts that the recipe reads beside the prompts that it writes. With
    `false` only the new prompts reach the recipes behind it, so the original ones are not
    answered. Validation and hold-out prompts are always handed on."""

    @property
    def num_samples(self) -> int:
        """Number of replies to the same request."""
        return 1

    @property
    @abstractmethod
    def template_files(self) -> list[TemplateFile]:
        """Templates from which the requests of the recipe are filled."""
        ...


class Paraphrase(Writing):
    """Lets a teacher say train prompts in other words."""

    type: Literal["paraphrase"]
    versions: Handful = 1
    """Number of requests for a new prompt that are made for each prompt."""
    template: Given | None = None
    """Text file of yours with `{prompt}` in it, shown to the teacher in place of the shipped
    `paraphrase.txt`. The teacher must put the new prompt between `<prompt>` and `</prompt>`."""

    @property
    def num_samples(self) -> int:
        return self.versions

    @property
    def template_files(self) -> list[TemplateFile]:
        return [TemplateFile("paraphrase", "template", "paraphrase.txt", self.template)]


class Evolve(Writing):
    """Lets a teacher turn train prompts into others (Xu et al., WizardLM, arXiv 2304.12244)."""

    type: Literal["evolve"]
    ways: Annotated[list[EvolveWay], Field(min_length=1)]
    """Directions of change; each prompt gives one new prompt for each of them. `deeper`: harder,
    with more steps or knowledge. `broader`: about something rarer in the same field.
    `constraints`: with further demands on the answer."""
    templates: dict[EvolveWay, Given] = Field(default_factory=dict)
    """Text files of yours with `{prompt}` in them, by way, in place of the shipped
    `evolve_<way>.txt`. The teacher must put the new prompt between `<prompt>` and `</prompt>`."""

    @property
    def template_files(self) -> list[TemplateFile]:
        return [
            TemplateFile(way, f"templates.{way}", f"evolve_{way}.txt", self.templates.get(way))
            for way in self.ways
        ]

    @model_validator(mode="after")
    def _templates_are_used(self) -> Evolve:
        if unused := sorted(self.templates.keys() - set(self.ways)):
            raise ValueError(
                f"templates has {unused}, which are not among its ways {self.ways}: add them to "
                "ways, or leave these templates out"
            )
        return self


class SelfInstruct(Writing):
    """Lets a teacher write prompts like sampled train prompts (Wang et al., arXiv 2212.10560)."""

    placeholder: ClassVar[str] = "examples"

    type: Literal["self_instruct"]
    requests_per_domain: Annotated[Whole, Field(ge=1, le=100_000)]
    """Number of requests for new prompts in each domain; a reply may hold several new prompts."""
    seeds_per_request: Count
    """Number of train prompts of one domain that each request shows as examples. They are drawn
    with the config's `seed`, so a run draws the same examples again."""
    template: Given | None = None
    """Text file of yours with `{examples}` in it, shown to the teacher in place of the shipped
    `self_instruct.txt`. The teacher must put each new prompt between `<prompt>` and
    `</prompt>`."""

    @property
    def template_files(self) -> list[TemplateFile]:
        return [TemplateFile("self_instruct", "template", "self_instruct.txt", self.template)]


Recipe = Annotated[
    Answer | Complete | GivenAnswers | Paraphrase | Evolve | SelfInstruct,
    Field(discriminator="type"),
]


class SynthesisConfig(Section):
    """Authors of prompts and answers, and the filters that choose what is trained on."""

    recipes: Annotated[list[Recipe], Field(min_length=1)]
    """Steps, run in this order. A recipe that writes prompts hands them on to the recipes behind
    it; a recipe that answers reads the prompts that have reached its place. The last recipe must
    answer."""
    max_sequence_tokens: Count | None = None
    """Largest number of tokens of a prompt and its answer together. Longer sequences are dropped
    and counted as `too_long`, never cut. Engines and `training.tokens_per_micro_batch` must hold
    this many tokens; without a bound they must hold the longest prompt with `max_tokens`."""
    prompts_per_shard: Count = 1024
    """Number of prompts that are answered, written to storage and resumed as one unit. Lower it to
    lose less work in an interruption; raise it for fewer, larger files."""
    filters: list[Filter] = Field(default_factory=list)
    """Rules that choose the answers to train on, applied in this order; each sees what the one
    before it left. Answers themselves stay stored, so another list of filters asks no teacher
    again."""

    @property
    def filters_before_scoring(self) -> list[Filter]:
        """Filters up to the first one that needs cached rows."""
        return self.filters[: self._num_before_scoring]

    @property
    def filters_after_scoring(self) -> list[Filter]:
        """First filter that needs cached rows, and all filters behind it."""
        return self.filters[self._num_before_scoring :]

    @property
    def _num_before_scoring(self) -> int:
        needing = (i for i, rule in enumerate(self.filters) if rule.scoring_teacher is not None)
        return next(needing, len(self.filters))

    @model_validator(mode="after")
    def _recipes_end_in_answers(self) -> SynthesisConfig:
        for i, recipe in enumerate(self.recipes):
            if recipe in self.recipes[:i]:
                raise ValueError(f"recipes.{i} ({recipe.type}) stands twice in the list: remove it")
        last = self.recipes[-1]
        if isinstance(last, Writing):
            raise ValueError(
                f"the last recipe, {last.type}, writes prompts that nobody answers: put `answer`, "
                "`complete` or `dataset` behind it"
            )
        return self

    @model_validator(mode="after")
    def _filters_do_something(self) -> SynthesisConfig:
        for i, rule in enumerate(self.filters):
            if rule in self.filters[:i]:
                raise ValueError(f"filters.{i} ({rule.type}) stands twice in the list: remove it")
            if isinstance(rule, Agreement | BestOf) and self.most_answers(2) < 2:
                raise ValueError(
                    f"filters.{i} ({rule.type}) compares the answers to a prompt, but every prompt "
                    "has only one: raise samples_per_prompt, set by: every_teacher, or remove the "
                    "filter"
                )
        return self

    def most_answers(self, num_teachers: int) -> int:
        """Largest number of answers that a prompt can have in a run with that many teachers."""
        total = 0
        for recipe in self.recipes:
            if isinstance(recipe, Answering):
                authors = num_teachers if recipe.by == "every_teacher" else 1
                total += recipe.samples_per_prompt * authors
            elif isinstance(recipe, GivenAnswers):
                total += 1
        return total


def is_by_student(recipe: Answering | GivenAnswers) -> bool:
    """Whether the student is the author of a recipe's answers."""
    return isinstance(recipe, Answering) and recipe.by == STUDENT


def is_asked(recipe: Answering | GivenAnswers, split: str, number: int) -> bool:
    """Whether a recipe answers the prompts of a split in round `number`.

    The student answers train prompts only, so that the losses of all rounds on validation and
    hold-out sequences are losses on the same sequences.
    """
    if split != "train":
        return not is_by_student(recipe)
    in_round = {"all": True, "first": number == 1, "later": number > 1, "none": False}
    return in_round[recipe.train_rounds]


def authors_of(recipe: Recipe, teachers: Mapping[str, AnyTeacher]) -> list[str]:
    """Names of the models that work on a recipe; `dataset` if none does."""
    if isinstance(recipe, GivenAnswers):
        return [DATASET_AUTHOR]
    if isinstance(recipe, Writing):
        return [recipe.teacher]
    if recipe.by == "every_teacher":
        return list(teachers)
    if recipe.by == "domain_teacher":
        return [name for name, teacher in teachers.items() if teacher.domains]
    return [recipe.by]
