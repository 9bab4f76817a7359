"""Configuration of the synthesis recipes: the steps in which prompts and answers are written."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.config_base import Count, Name, Section

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
    """Text file with `{prompt}` in it; pipeline/templates/paraphrase.txt without one."""
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
    """Text files with `{prompt}` in them; pipeline/templates/evolve_<way>.txt for other ways."""
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
    """Text file with `{examples}` in it; pipeline/templates/self_instruct.txt without one."""
    keep_input: bool = True
    """Hand on the prompts that it reads, beside those that it writes."""


Answering = Answer | Complete
Writing = Paraphrase | Evolve | SelfInstruct
Recipe = Annotated[
    Answer | Complete | GivenAnswers | Paraphrase | Evolve | SelfInstruct,
    Field(discriminator="type"),
]
