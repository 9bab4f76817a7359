"""`synthesis`: the recipes, steps in which prompts and answers are written."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config.base import Count, Name, Section
from pipeline.config.filters import Agreement, BestOf, Filter, scoring_teacher

STUDENT, DATASET_GENERATOR = "student", "dataset"
By = Name
"""`domain_teacher` (the one that names the prompt's domain), `every_teacher`, a teacher, or
`student`: the model that the round's training starts from."""
TrainRounds = Literal["all", "first", "later", "none"]


class Answer(Section):
    """Has teachers answer the prompts."""

    type: Literal["answer"]
    by: By
    """`domain_teacher`, `every_teacher`, the name of a teacher, or `student`, who answers train
    prompts alone: validation and hold-out stay the same in every round."""
    train_rounds: TrainRounds = "all"
    """In which rounds train prompts are answered; all other prompts are in every round."""
    samples_per_prompt: Count = 1
    """Answers asked of each teacher for each prompt."""
    sampling: dict[str, Any]
    """vLLM SamplingParams, verbatim."""
    sampling_of: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    """SamplingParams of single teachers, laid over `sampling`."""
    system_prompt: str | None = None
    """Put before chat prompts without one; it is part of the sequence that is trained on."""
    keep_truncated: bool = False
    """Also keep answers that were cut at `max_tokens`; they have no end of sequence."""


class Complete(Section):
    """Has teachers continue raw text prompts; a continuation may be cut at `max_tokens`."""

    type: Literal["complete"]
    by: By
    """`domain_teacher`, `every_teacher`, the name of a teacher, or `student`, as in `answer`."""
    train_rounds: TrainRounds = "all"
    """In which rounds train prompts are continued; all other prompts are in every round."""
    samples_per_prompt: Count = 1
    """Continuations asked of each teacher for each prompt."""
    sampling: dict[str, Any]
    """vLLM SamplingParams, verbatim."""
    sampling_of: dict[Name, dict[str, Any]] = Field(default_factory=dict)
    """SamplingParams of single teachers, laid over `sampling`."""


class GivenAnswers(Section):
    """Takes the references of the prompts as answers."""

    type: Literal["dataset"]
    train_rounds: TrainRounds = "all"
    """In which rounds those of train prompts are taken; all others are in every round."""


class Paraphrase(Section):
    """Has a teacher say train prompts in other words."""

    type: Literal["paraphrase"]
    teacher: Name
    """Who writes."""
    versions: Count = 1
    """New prompts asked for each prompt."""
    sampling: dict[str, Any]
    """vLLM SamplingParams, verbatim."""
    template: str | None = None
    """Text file with `{prompt}` in it; without one, the shipped paraphrase.txt."""
    keep_input: bool = True
    """Hand on the prompts that it reads, beside those that it writes."""


class Evolve(Section):
    """Has a teacher make other prompts of train prompts (Xu et al., WizardLM, arXiv 2304.12244)."""

    type: Literal["evolve"]
    teacher: Name
    """Who writes."""
    ways: Annotated[list[Literal["deeper", "broader", "constraints"]], Field(min_length=1)]
    """One new prompt for each prompt and way: harder, rarer, or with further demands."""
    sampling: dict[str, Any]
    """vLLM SamplingParams, verbatim."""
    templates: dict[Literal["deeper", "broader", "constraints"], str] = Field(default_factory=dict)
    """Text files with `{prompt}` in them; without one, the shipped evolve_<way>.txt."""
    keep_input: bool = True
    """Hand on the prompts that it reads, beside those that it writes."""

    @model_validator(mode="after")
    def _templates_are_of_its_ways(self) -> Evolve:
        if unused := sorted(self.templates.keys() - set(self.ways)):
            raise ValueError(f"templates of {unused}, which are not among its ways {self.ways}")
        return self


class SelfInstruct(Section):
    """Has a teacher write prompts after sampled train prompts (Wang et al., arXiv 2212.10560)."""

    type: Literal["self_instruct"]
    teacher: Name
    """Who writes."""
    requests_per_domain: Count
    """How often the teacher is asked; a reply may hold several prompts."""
    seeds_per_request: Count
    """Train prompts of one domain shown in each request, drawn by the config's seed."""
    sampling: dict[str, Any]
    """vLLM SamplingParams, verbatim."""
    template: str | None = None
    """Text file with `{examples}` in it; without one, the shipped self_instruct.txt."""
    keep_input: bool = True
    """Hand on the prompts that it reads, beside those that it writes."""


Answering = Answer | Complete
Writing = Paraphrase | Evolve | SelfInstruct
Recipe = Annotated[
    Answer | Complete | GivenAnswers | Paraphrase | Evolve | SelfInstruct,
    Field(discriminator="type"),
]


class SynthesisConfig(Section):
    """Who writes prompts and answers, how, and which answers are kept."""

    recipes: Annotated[list[Recipe], Field(min_length=1)]
    """Steps, in this order: those that write prompts hand them on, those that answer read them."""
    max_sequence_tokens: Count | None = None
    """Bound on prompt and answer together; longer ones are dropped and counted, never cut."""
    prompts_per_shard: Count = 1024
    """Prompts of one unit of work and resume."""
    filters: list[Filter] = Field(default_factory=list)
    """Which answers are trained on, in this order; answers stay as they are written."""

    @property
    def filters_before_scoring(self) -> list[Filter]:
        """The filters up to the first that needs cached rows."""
        return self.filters[: self._num_before_scoring]

    @property
    def filters_after_scoring(self) -> list[Filter]:
        """The first filter that needs cached rows, and all behind it."""
        return self.filters[self._num_before_scoring :]

    @property
    def _num_before_scoring(self) -> int:
        needing = (i for i, rule in enumerate(self.filters) if scoring_teacher(rule) is not None)
        return next(needing, len(self.filters))

    @model_validator(mode="after")
    def _recipes_end_in_answers(self) -> SynthesisConfig:
        for i, recipe in enumerate(self.recipes):
            if recipe in self.recipes[:i]:
                raise ValueError(f"recipes.{i} ({recipe.type}) stands there twice; leave one out")
        if isinstance(self.recipes[-1], Writing):
            raise ValueError(
                f"the last recipe, {self.recipes[-1].type}, writes prompts that nobody answers: "
                "put `answer`, `complete` or `dataset` behind it"
            )
        return self

    @model_validator(mode="after")
    def _filters_do_something(self) -> SynthesisConfig:
        for i, rule in enumerate(self.filters):
            if rule in self.filters[:i]:
                raise ValueError(f"filters.{i} ({rule.type}) stands there twice; leave one out")
            if isinstance(rule, Agreement | BestOf) and self.most_answers(2) < 2:
                raise ValueError(
                    f"filters.{i} ({rule.type}) compares the answers to a prompt, and there is "
                    "one each: raise samples_per_prompt, let every_teacher answer, or leave the "
                    "filter out"
                )
        return self

    def most_answers(self, num_teachers: int) -> int:
        """How many answers a prompt can have."""
        answering = [recipe for recipe in self.recipes if not isinstance(recipe, Writing)]
        asking = [recipe for recipe in answering if isinstance(recipe, Answering)]
        asked = (
            recipe.samples_per_prompt * (num_teachers if recipe.by == "every_teacher" else 1)
            for recipe in asking
        )
        return sum(asked) + len(answering) - len(asking)


def is_asked(recipe: Answering | GivenAnswers, split: str, number: int) -> bool:
    """Whether a recipe has prompts of a split answered in a round.

    The student answers train prompts alone: losses on validation and hold-out sequences are those
    of the same sequences in every round.
    """
    if split != "train":
        return not is_by_student(recipe)
    trained = {"all": True, "first": number == 1, "later": number > 1, "none": False}
    return trained[recipe.train_rounds]


def is_by_student(recipe: Answering | GivenAnswers) -> bool:
    """Whether the student is the one who writes."""
    return isinstance(recipe, Answering) and recipe.by == STUDENT
