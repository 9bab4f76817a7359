"""The configuration: YAML in, frozen pydantic models out, checked before hardware is asked for.

The docstring under each field is its help. What changes results has no hidden default. Paths are
relative to the config file and become absolute when it is loaded; a model that begins with `.`, `~`
or `/` is a folder, anything else a Hugging Face hub id.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.config.base import Count, Name, Resources, Section
from pipeline.config.checks import check_rounds
from pipeline.config.combine import ByDomainWeights, CombineConfig, StaticWeights
from pipeline.config.filters import BestOf, Checker, Judge, scoring_teacher
from pipeline.config.losses import StateLoss
from pipeline.config.prompts import PromptsConfig
from pipeline.config.scoring import HeadAndSampled, HiddenStatesStorage, Sampled, ScoringConfig
from pipeline.config.student import StudentConfig
from pipeline.config.synthesis import (
    DATASET_GENERATOR,
    STUDENT,
    Answer,
    Answering,
    Complete,
    SynthesisConfig,
    Writing,
)
from pipeline.config.teachers import (
    AnyTeacher,
    EndpointTeacherConfig,
    TeacherConfig,
    check_endpoints,
)
from pipeline.config.training import TrainingConfig
from pipeline.messages import closest

LINEAR_LOSSES = frozenset({"forward_kl", "cross_entropy"})
LINEAR_COMBINATIONS = frozenset({"mixture", "route"})
"""What takes targets that are drawn; everything else, also what is added later, is refused."""


class StorageConfig(Section):
    """Where everything is kept."""

    root: str
    """Folder or URI (`s3://`, `gs://`) of all outputs; its runs share the caches."""
    models_root: str | None = None
    """Folder that all nodes mount, for checkpoints and exports; needed if root is a URI."""
    shared_roots: list[str] = Field(default_factory=list)
    """Local folders that every node of a remote cluster mounts; it sees no other local path."""

    @model_validator(mode="after")
    def _models_need_a_file_system(self) -> StorageConfig:
        if "://" in (self.models_root or self.root):
            raise ValueError(
                f"models_root must be a folder that all nodes mount, got {self.models_root!r} "
                f"(root {self.root!r}): DeepSpeed and vLLM read and write models on a file system"
            )
        return self


class EvaluationConfig(Section):
    """What the report measures on the hold-out prompts."""

    sampling: dict[str, Any]
    """vLLM SamplingParams of the answers that are checked, verbatim."""
    system_prompt: str | None = None
    """Put before chat prompts without one; to be given, `null` if so, where recipes have one."""
    max_prompts_per_domain: Count | None = None
    """Bound on the hold-out prompts answered by each model."""
    twin: bool = True
    """Also train a twin on the same sequences by cross-entropy alone, to show the difference."""
    resources: Resources = Resources()
    """Of an engine that serves the student, and of the tasks that export it and compute its
    hold-out losses."""


class ClusterConfig(Section):
    """Ray: the local head, and how stage jobs run."""

    local_num_cpus: Count = 4
    """Logical CPUs of the head started without an address; may exceed the cores."""
    local_num_gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs of that head; found by Ray when not given."""
    autoscaling: bool = False
    """The cluster adds nodes on demand: what no present node can hold waits instead of failing."""
    job_resources: Resources = Resources(num_cpus=0)
    """Of the driver of each stage."""
    env_vars: dict[str, str] = Field(default_factory=dict)
    """Environment of all stages, for what upstream reads from nowhere else."""


class Config(Section):
    """A whole run."""

    name: Name
    """Name of the run; its outputs lie in `<storage.root>/runs/<name>`."""
    seed: int
    """Of sampling, initialisation and data order."""
    rounds: Count = 1
    """How often answers are written, scored and trained on, each time from the student before."""
    round: Count = 1
    """The round that a stage or a command about caches is about; a run begins with it."""
    storage: StorageConfig
    prompts: PromptsConfig
    teachers: Annotated[dict[Name, AnyTeacher], Field(min_length=1)]
    synthesis: SynthesisConfig
    scoring: ScoringConfig
    combine: CombineConfig
    student: StudentConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    cluster: ClusterConfig = ClusterConfig()

    def generator(self, name: str) -> TeacherConfig | EndpointTeacherConfig:
        """Who writes under a name, as it is served: a teacher, or the student that the round's
        training starts from.
        """
        if name != STUDENT:
            return self.teachers[name]
        student, start = self.student, self.student.initial_weights
        return TeacherConfig(
            model=start or student.model,
            revision=None if start else student.revision,
            trust_remote_code=student.trust_remote_code,
            vllm=student.vllm,
            replicas=student.replicas,
            resources=self.evaluation.resources,
            cost_per_hour=student.cost_per_hour,
        )

    @model_validator(mode="after")
    def _names_are_free(self) -> Config:
        for name in (STUDENT, "twin", DATASET_GENERATOR):
            if name in self.teachers:
                raise ValueError(f"a teacher cannot be named {name!r}, which means another model")
        return self

    @model_validator(mode="after")
    def _rounds_differ(self) -> Config:
        twin = self.evaluation.twin
        check_rounds(self.round, self.rounds, twin, self.synthesis, self.student)
        return self

    @model_validator(mode="after")
    def _weights_name_teachers(self) -> Config:
        weights = self.combine.weights
        named: dict[str, dict[str, float]] = {}
        if isinstance(weights, StaticWeights):
            named = {"combine.weights.teachers": weights.teachers}
        elif isinstance(weights, ByDomainWeights):
            named = {
                f"combine.weights.domains.{domain}": table
                for domain, table in weights.domains.items()
            }
        for place, table in named.items():
            unknown = sorted(table.keys() - self.teachers.keys())
            if unknown:
                raise ValueError(
                    f"{place} names {unknown}; the teachers are {sorted(self.teachers)}"
                )
            if silent := sorted(table.keys() - set(self.scoring_teachers)):
                raise ValueError(f"{place} weighs {silent}, which do not score and have no cache")
            if sum(table.values()) <= 0:
                raise ValueError(f"{place} must give at least one teacher a weight above 0")
        return self

    @model_validator(mode="after")
    def _stored_states_are_used(self) -> Config:
        if not self.training.teacher_layers and self.scoring.features != HiddenStatesStorage():
            raise ValueError(
                "scoring.features says how hidden states are stored, and no loss needs any: leave "
                "it out, or add one to training.losses"
            )
        return self

    @model_validator(mode="after")
    def _losses_name_teachers(self) -> Config:
        for teacher in self.training.teacher_layers:
            if teacher not in self.teachers:
                raise ValueError(
                    f"training.losses names teacher {teacher!r}; the teachers are "
                    f"{sorted(self.teachers)}"
                )
            if isinstance(self.teachers[teacher], EndpointTeacherConfig):
                raise ValueError(
                    f"training.losses needs hidden states of teacher {teacher!r}, which an "
                    "endpoint does not give: serve it by `model`, or leave that loss out"
                )
        return self

    @model_validator(mode="after")
    def draws_are_used_linearly(self) -> Config:
        selection = self.scoring.selection
        if not isinstance(selection, Sampled | HeadAndSampled):
            return self
        beginning = f"scoring.selection {selection.type!r} keeps draws, which are"
        for loss in self.training.losses:
            if isinstance(loss, StateLoss):
                continue  # of hidden states, which nothing is drawn from
            if loss.type not in LINEAR_LOSSES:
                raise ValueError(
                    f"{beginning} unbiased only in losses linear in the teacher's probabilities "
                    f"({', '.join(sorted(LINEAR_LOSSES))}); {loss.type!r} needs the probabilities "
                    "themselves: select top_k or top_p"
                )
            if (temperature := loss.model_dump().get("temperature", 1)) != 1:
                raise ValueError(
                    f"{beginning} of the distribution at temperature 1; {loss.type!r} at "
                    f"temperature {temperature} would temper single draws: select top_k or top_p"
                )
        if self.combine.method not in LINEAR_COMBINATIONS:
            raise ValueError(
                f"{beginning} unbiased only in sums of the teachers' probabilities "
                f"({', '.join(sorted(LINEAR_COMBINATIONS))}); combine.method "
                f"{self.combine.method!r} is none: select top_k or top_p"
            )
        return self

    @model_validator(mode="after")
    def _domain_teachers_are_unique(self) -> Config:
        if not any(r.by == "domain_teacher" for r in self._answering):
            return self
        owner: dict[str, str] = {}
        for name, teacher in self.teachers.items():
            for domain in teacher.domains:
                if domain in owner:
                    raise ValueError(
                        f"domain {domain!r} is claimed by teachers {owner[domain]!r} and {name!r}; "
                        "a recipe by domain_teacher needs one teacher per domain"
                    )
                owner[domain] = name
        return self

    @property
    def _answering(self) -> list[Answer | Complete]:
        return [recipe for recipe in self.synthesis.recipes if isinstance(recipe, Answering)]

    def generators_of(self, recipe: Answer | Complete) -> list[str]:
        """Who answers in a recipe."""
        if recipe.by == "every_teacher":
            return list(self.teachers)
        if recipe.by == "domain_teacher":
            return [name for name, teacher in self.teachers.items() if teacher.domains]
        return [recipe.by]

    @model_validator(mode="after")
    def _recipes_name_teachers(self) -> Config:
        choices = {*self.teachers, "domain_teacher", "every_teacher", STUDENT}
        for i, recipe in enumerate(self.synthesis.recipes):
            place = f"synthesis.recipes.{i} ({recipe.type})"
            named = [recipe.teacher] if isinstance(recipe, Writing) else []
            if isinstance(recipe, Answering):
                named = list(recipe.sampling_of)
                if recipe.by not in choices:
                    hint = closest(recipe.by, choices)
                    raise ValueError(f"{place} is by {recipe.by!r}, who is nobody; {hint}")
            for name in named:
                if name not in self.teachers:
                    hint = closest(name, self.teachers)
                    raise ValueError(f"{place} names the teacher {name!r}; {hint}")
                if isinstance(recipe, Answering) and name not in self.generators_of(recipe):
                    raise ValueError(
                        f"{place} has a sampling_of {name!r}, who does not write in it: it is by "
                        f"{recipe.by}"
                    )
        return self

    @model_validator(mode="after")
    def _sequences_fit_a_micro_batch(self) -> Config:
        most, budget = self.synthesis.max_sequence_tokens, self.training.tokens_per_micro_batch
        if most is not None and most > budget:
            raise ValueError(
                f"synthesis.max_sequence_tokens ({most}) exceeds training.tokens_per_micro_batch "
                f"({budget}), and training cuts no sequence: lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_asks_as_trained(self) -> Config:
        given = {r.system_prompt for r in self.synthesis.recipes if isinstance(r, Answer)} - {None}
        if given and "system_prompt" not in self.evaluation.model_fields_set:
            raise ValueError(
                f"synthesis.recipes answer under a system_prompt ({', '.join(map(repr, given))}), "
                "which the student learns to have before it: give evaluation.system_prompt, the "
                "same or `null`, to say how the hold-out prompts are asked"
            )
        return self

    @model_validator(mode="after")
    def _filters_have_what_they_need(self) -> Config:
        for i, rule in enumerate(self.synthesis.filters):
            place = f"synthesis.filters.{i} ({rule.type})"
            if isinstance(rule, Checker) and self.prompts.checker is None:
                raise ValueError(f"{place} needs prompts.checker, which says how to compare")
            teacher = rule.teacher if isinstance(rule, Judge) else scoring_teacher(rule)
            if teacher is not None and teacher not in self.teachers:
                raise ValueError(
                    f"{place} names the teacher {teacher!r}; {closest(teacher, self.teachers)}"
                )
            if scoring_teacher(rule) not in (None, *self.scoring_teachers):
                raise ValueError(
                    f"{place} needs cached rows of {teacher!r}, which does not score; it can be "
                    f"of {self.scoring_teachers}"
                )
            most = self.synthesis.most_answers(len(self.teachers))
            if isinstance(rule, BestOf) and rule.keep >= most:
                raise ValueError(
                    f"{place} keeps {rule.keep} answers to a prompt, and there are at most {most}: "
                    "lower keep, or leave the filter out"
                )
            generators = {*self.teachers, STUDENT, DATASET_GENERATOR}
            for name in rule.spares:
                if name not in generators:
                    raise ValueError(f"{place} spares {name!r}; {closest(name, generators)}")
        return self

    @property
    def scoring_teachers(self) -> list[str]:
        """The teachers that have a cache, in the config's order; the others only write."""
        return [name for name, teacher in self.teachers.items() if teacher.scores]

    @model_validator(mode="after")
    def _endpoints_can_do_it(self) -> Config:
        if not self.scoring_teachers:
            raise ValueError("no teacher scores, so there is nothing to distil: add one that does")
        check_endpoints(self.teachers, self.scoring.num_logprobs, self.cluster.env_vars)
        return self
