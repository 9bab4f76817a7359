"""The whole configuration: YAML in, frozen pydantic models out, checked before hardware is used.

The docstring under each field is its help. A field that came after the first runs is left out of a
dumped config at its default (`exclude_if`), so that keys and digests of finished runs stay. Nothing
that changes results has a hidden default. Paths are relative to the config file and become absolute
when it is loaded. A model that begins with `.`, `~` or `/` is a folder; any other model is a
Hugging Face hub id.
"""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from pipeline.config.base import Count, Given, Name, Resources, Section, Seed, Verbatim, Whole
from pipeline.config.checks import (
    check_draws,
    check_endpoints,
    check_engine_devices,
    check_filter_needs,
    check_hidden_states,
    check_judge,
    check_recipe_authors,
    check_rounds,
    check_sequence_length,
    check_system_prompts,
    check_teacher_names,
    check_weights,
)
from pipeline.config.combine import CombineConfig
from pipeline.config.prompts import PromptsConfig
from pipeline.config.scoring import ScoringConfig
from pipeline.config.student import StudentConfig
from pipeline.config.synthesis import STUDENT, SynthesisConfig
from pipeline.config.teachers import (
    AnyTeacher,
    EndpointTeacherConfig,
    TeacherConfig,
    scoring_teachers,
)
from pipeline.config.training import TrainingConfig
from pipeline.credentials import shown_url
from pipeline.messages import short


class StorageConfig(Section):
    """Places where outputs are kept."""

    root: Given
    """Folder or URI (`s3://…`, `gs://…`) of all outputs: prompts, answers, caches and runs. Runs
    with the same root share answers and caches, so nothing is written or scored twice. A URI has no
    options behind a `?`; the environment names the region and the endpoint of a store."""
    models_root: Given | None = None
    """Folder for checkpoints and exported models that all nodes mount. It is required if `root` is
    a URI, since DeepSpeed and vLLM read and write models on a file system; otherwise `root`
    serves."""
    shared_roots: list[Given] = Field(default_factory=list)
    """Local folders that every node of a remote cluster mounts under the same path. Needed with
    `--address`: any local path of the config outside these folders is refused there, since nodes
    may not see it."""

    @field_validator("root", "models_root")
    @classmethod
    def _is_no_home(cls, folder: str | None) -> str | None:
        if folder is not None and os.path.normpath(folder) in ("~", "/"):
            raise ValueError(
                f"{folder!r} is a folder of many other things: name a folder of its own, such as "
                "~/polystill"
            )
        return folder

    @model_validator(mode="after")
    def _models_need_a_file_system(self) -> StorageConfig:
        if "://" in (self.models_root or self.root):
            raise ValueError(
                "models_root must be a folder that all nodes mount, found "
                f"{shown_url(self.models_root or '')!r} with root {shown_url(self.root)!r}: "
                "DeepSpeed and vLLM read and write models on a file system"
            )
        return self


class JudgeConfig(Section):
    """A teacher that compares answers of the student with those of other models.

    The judge sees two answers to a hold-out prompt in both orders, and replies which one is better,
    or that they are equally good. A preference counts where it is the same in both orders. The
    words are those of `pipeline/synthesis/templates/prefer.txt`.
    """

    teacher: Name
    """Teacher that judges. A large one, best none that the student is compared with: models prefer
    answers like their own."""
    prompts: Count = 50
    """Number of hold-out prompts of each domain that are judged, chosen by the seed."""
    against: list[Name] = Field(default_factory=list)
    """Models whose answers are compared with the student's: `twin`, or teachers that score. Without
    any it is the twin."""


class EvaluationConfig(Section):
    """Measurements of the report on the hold-out prompts."""

    sampling: Verbatim
    """Sampling parameters of the answers to hold-out prompts, passed to vLLM's `SamplingParams` as
    they are, such as `{temperature: 0, max_tokens: 512}`. `max_tokens` is required."""
    system_prompt: str | None = None
    """System message put before hold-out chat prompts that have none. It must be given, `null` if
    there shall be none, when a recipe has a `system_prompt`."""
    max_prompts_per_domain: Count | None = None
    """Largest number of hold-out prompts of a domain that each model answers; without it, all.
    Lower it to shorten the evaluation. The hold-out losses use all prompts in any case."""
    twin: bool = False
    """Also train a twin: a second student on the same sequences by cross-entropy alone. The report
    compares both, to show what the teachers' distributions add. Ask for it where that is the
    question: it doubles the training time, and must be `false` in runs with several `rounds`."""
    shown_prompts: Annotated[Whole, Field(ge=0, exclude_if=lambda number: number == 3)] = 3
    """Number of hold-out prompts of each domain, chosen by the seed, whose answers the report shows
    side by side. It shows as many more where the student is furthest from the teachers."""
    judge: Annotated[JudgeConfig | None, Field(exclude_if=lambda judge: judge is None)] = None
    """Comparison of the student's answers with those of other models by a teacher. Set it where
    answers have no reference, and a teacher is good enough to judge them."""
    resources: Resources = Resources()
    """Resources of each engine that serves the student, and of the tasks that export the student
    and compute its hold-out losses. For GPUs set `{num_gpus: 1}`."""


class ClusterConfig(Section):
    """Size of the local Ray head, and environment and resources of the stages."""

    local_num_cpus: Annotated[Whole, Field(ge=1, le=100_000)] = 4
    """Logical CPUs of the local Ray head, which is started if no address is given. All engines,
    workers and tasks of a stage must fit into them; the number may exceed the machine's cores."""
    local_num_gpus: Annotated[Whole, Field(ge=0, le=100_000)] | None = None
    """GPUs of the local Ray head; without it Ray uses all GPUs that it finds."""
    autoscaling: bool = False
    """Whether the cluster adds nodes on demand. With `true`, work that no present node can hold
    waits for a new node; with `false` it is refused at once."""
    job_resources: Resources = Resources(num_cpus=0)
    """Resources of the driver of each stage, which only plans and waits. Set a custom resource to
    keep drivers on certain nodes."""
    env_vars: dict[str, str] = Field(default_factory=dict)
    """Environment variables of all stages and their actors, for settings that libraries read from
    nowhere else, such as `{NCCL_SOCKET_IFNAME: eth0}`. Ray's dashboard shows them, so names of
    keys, tokens and passwords are refused: export those before `ray start` on every node, or before
    `polystill run` without an address."""

    @field_validator("env_vars")
    @classmethod
    def _have_names(cls, variables: dict[str, str]) -> dict[str, str]:
        for name in variables:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(
                    f"{short(name)!r} cannot be the name of an environment variable: use letters, "
                    "digits and underscores"
                )
        return variables


class Config(Section):
    """A whole run."""

    name: Name
    """Name of the run; its outputs lie in `<storage.root>/runs/<name>`. Letters, digits, `_`, `.`
    and `-` are allowed."""
    seed: Seed
    """Seed of sampling, of random initialisation and of the order of the data. Another seed writes
    and trains everything anew."""
    rounds: Annotated[Whole, Field(ge=1, le=1000)] = 1
    """Number of rounds. In each round answers are written, scored and trained on, and training
    starts from the student of the round before. Use more than 1 to let the student learn from its
    own text (`by: student`)."""
    round: Count = 1
    """Round that a single stage or a cache command concerns, from 1 to `rounds`; a run begins with
    it. It is usually given on the command line, as `round=2`."""
    storage: StorageConfig
    """Places where outputs are kept."""
    prompts: PromptsConfig
    """Sources and splits of the prompts, and the check of their answers."""
    teachers: Annotated[dict[Name, AnyTeacher], Field(min_length=1)]
    """Teachers by name. Each is either a `model` that engines of this run serve, or an `endpoint`,
    a server that runs elsewhere. The names `student`, `twin` and `dataset` are taken."""
    synthesis: SynthesisConfig
    """Recipes that write prompts and answers, and filters that choose the answers to train on."""
    scoring: ScoringConfig
    """Part of the teachers' distributions and hidden states that is captured and stored."""
    combine: CombineConfig
    """Combination of the teachers' distributions into one target."""
    student: StudentConfig
    """Model that is trained."""
    training: TrainingConfig
    """Losses, schedule, batches and workers of the training."""
    evaluation: EvaluationConfig
    """Measurements of the report on the hold-out prompts."""
    cluster: ClusterConfig = ClusterConfig()
    """Size of the local Ray head, and environment and resources of the stages."""

    @model_validator(mode="after")
    def _sections_agree(self) -> Config:
        teachers, synthesis, training = self.teachers, self.synthesis, self.training
        check_teacher_names(teachers)
        check_rounds(self.round, self.rounds, self.evaluation.twin, synthesis, self.student)
        check_weights(self.combine, teachers)
        check_hidden_states(self.scoring, training, teachers)
        check_draws(self.scoring, training, self.combine)
        check_recipe_authors(synthesis, teachers)
        check_sequence_length(synthesis, training)
        check_system_prompts(synthesis, "system_prompt" in self.evaluation.model_fields_set)
        check_filter_needs(synthesis, self.prompts, teachers)
        if (judge := self.evaluation.judge) is not None:
            check_judge(judge.teacher, judge.against, self.evaluation.twin, teachers)
        check_endpoints(teachers, self.scoring.num_logprobs, self.cluster.env_vars)
        check_engine_devices(teachers, self.student, self.evaluation.resources)
        return self

    @property
    def scoring_teachers(self) -> list[str]:
        """Teachers that score and so have a cache, in the config's order; others only write."""
        return scoring_teachers(self.teachers)

    def author(self, name: str) -> TeacherConfig | EndpointTeacherConfig:
        """Model that writes under a name, as it is served.

        For `student` it is the model that the round's training starts from.
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
