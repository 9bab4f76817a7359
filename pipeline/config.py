"""The configuration: YAML in, frozen pydantic models out, everything checked before hardware is
asked for.

The docstring under each field is its help. What changes results has no hidden default. Paths that
begin with `.` are relative to the config file and become absolute when it is loaded; a model that
begins with `.` or `/` is a folder, anything else a Hugging Face hub id.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_ENTRIES = 255
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys are errors, docstrings are the help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Resources(Section):
    """What one Ray actor, worker or job asks the cluster for."""

    num_cpus: Annotated[float, Field(ge=0)] = 1
    """Logical CPUs."""
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs."""
    custom: dict[str, float] = {}
    """Custom Ray resources; they place work on a node group, see cluster.yaml."""


class StorageConfig(Section):
    """Where everything is kept."""

    root: str
    """Folder or URI (`s3://`, `gs://`) of all outputs; its runs share the caches."""
    models_root: str | None = None
    """Folder that all nodes mount, for checkpoints and exported students; needed if root is a URI.
    """
    shared_roots: list[str] = []
    """Local folders that every node of a remote cluster mounts; it sees no other local path."""

    @model_validator(mode="after")
    def _models_need_a_file_system(self) -> StorageConfig:
        if "://" in (self.models_root or self.root):
            raise ValueError(
                f"models_root must be a folder that all nodes mount, got {self.models_root!r} "
                f"(root {self.root!r}): DeepSpeed and vLLM read and write models on a file system"
            )
        return self


class PromptSource(Section):
    """One file or folder of prompts."""

    path: str
    """JSONL or Parquet file, or a Hugging Face dataset folder (`save_to_disk`)."""
    domain: Name | None = None
    """Domain of rows without a `domain` field."""
    split: Literal["train", "validation", "holdout"] | None = None
    """Split of all its rows; without it rows are split by the hash of their id."""
    fields: dict[Literal["messages", "text", "id", "domain", "reference"], str] = {}
    """Names of the columns, where they differ from ours, e.g. `{text: question, reference:
    answer}`.
    """
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
    checker: Literal["exact", "number"] | None = None
    """How an answer is compared with its reference: same text, or same final number."""


class TeacherConfig(Section):
    """One teacher: a Hugging Face causal language model served by vLLM in Ray actors."""

    model: str
    """Folder or hub id."""
    revision: str | None = None
    """Hub revision; resolved to a commit hash that enters the fingerprint."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you say so by name."""
    domains: list[Name] = []
    """Domains whose prompts it answers when the generator is `domain_teacher`."""
    vllm: dict[str, Any] = {}
    """Engine arguments of vLLM, verbatim."""
    replicas: Count = 1
    """Number of engines."""
    resources: Resources = Resources()
    """Of one engine. With `tensor_parallel_size: N` ask for `num_gpus: N`."""
    allow_chat_template_difference: bool = False
    """Accept that its own chat template renders prompts differently; the student's rendering is
    used.
    """
    cost_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """Price of one engine's hardware."""


class SynthesisConfig(Section):
    """Who writes the answers, and how."""

    generator: Literal["domain_teacher", "every_teacher", "dataset"]
    """The teacher of the prompt's domain, each teacher, or the given references as answers."""
    samples_per_prompt: Count = 1
    """Answers asked of each teacher for each prompt."""
    sampling: dict[str, Any] = {}
    """vLLM SamplingParams, verbatim."""
    max_sequence_tokens: Count | None = None
    """Bound on prompt and answer together; longer ones are dropped and counted, never cut."""
    prompts_per_shard: Count = 1024
    """Prompts of one unit of work and resume."""


class TopK(Section):
    """Keeps the most probable entries of every position."""

    type: Literal["top_k"]
    max_entries: Annotated[int, Field(ge=1, le=MAX_ENTRIES)]
    """Entries kept."""


class TopP(Section):
    """Keeps the smallest set of entries that reaches a mass; most positions of text need few."""

    type: Literal["top_p"]
    mass: Annotated[float, Field(gt=0, le=1)]
    """Probability that the kept entries reach."""
    max_entries: Annotated[int, Field(ge=1, le=MAX_ENTRIES)]
    """Bound on the entries kept."""


Selection = Annotated[TopK | TopP, Field(discriminator="type")]


class ScoringConfig(Section):
    """What is captured of the teachers' distributions, and what is kept."""

    num_logprobs: Annotated[int, Field(ge=1)]
    """Capture width: entries that the engine returns for every position."""
    selection: Selection
    """What of them is kept on disk."""

    @model_validator(mode="after")
    def _capture_covers_selection(self) -> ScoringConfig:
        if self.selection.max_entries > self.num_logprobs:
            raise ValueError(
                f"selection.max_entries ({self.selection.max_entries}) exceeds num_logprobs "
                f"({self.num_logprobs}): what is not captured cannot be kept"
            )
        return self


class StaticWeights(Section):
    """The same weights everywhere."""

    type: Literal["static"]
    teachers: dict[Name, Annotated[float, Field(ge=0)]]
    """Weight of each teacher; scaled to sum to 1."""


class ByDomainWeights(Section):
    """Fixed weights for each domain."""

    type: Literal["by_domain"]
    domains: dict[Name, dict[Name, Annotated[float, Field(ge=0)]]]
    """For each domain the weight of each teacher; a teacher left out weighs 0."""


class GoldLikelihoodWeights(Section):
    """Teachers that find the text likely weigh more: softmax over teachers of gold log-likelihood /
    temperature.
    """

    type: Literal["gold_likelihood"]
    temperature: Positive
    """In nats; small values pick one teacher, large ones weigh all alike."""
    per: Literal["token", "sequence"]
    """One weight per token, or one per sequence from its mean."""


Weights = Annotated[
    StaticWeights | ByDomainWeights | GoldLikelihoodWeights, Field(discriminator="type")
]


class CombineConfig(Section):
    """How the teachers' distributions become one target."""

    method: Literal["mixture"]
    """`mixture`: p = sum over teachers of weight times p."""
    weights: Weights
    """The weight of each teacher at each position."""


class StudentConfig(Section):
    """The student: a Hugging Face causal language model, trained with DeepSpeed."""

    model: str
    """Folder or hub id; its tokenizer and chat template are those of the whole run."""
    initialization: Literal["pretrained", "random"]
    """Load weights, or start from the config alone."""
    revision: str | None = None
    """Hub revision."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights while training; `bfloat16` turns on DeepSpeed's bf16."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention of transformers."""
    cost_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """Price of the hardware of one serving engine."""
    vllm: dict[str, Any] = {}
    """Engine arguments of vLLM when the exported student is evaluated, verbatim."""


class ForwardKL(Section):
    """KL(teacher || student) on the kept entries and one bucket for the tail."""

    type: Literal["forward_kl"]
    weight: Positive
    """Factor in the sum of losses."""


class CrossEntropy(Section):
    """Cross-entropy with the tokens of the text."""

    type: Literal["cross_entropy"]
    weight: Positive
    """Factor in the sum of losses."""


Loss = Annotated[ForwardKL | CrossEntropy, Field(discriminator="type")]

OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "training.sequences_per_step sets the batch",
    "train_micro_batch_size_per_gpu": "training.tokens_per_micro_batch sets the micro-batch",
    "gradient_accumulation_steps": (
        "micro-batches are formed by a token budget, so accumulation is done here"
    ),
    "managed_gradient_accumulation": (
        "micro-batches are formed by a token budget, so accumulation is done here"
    ),
    "scheduler": "training.warmup_steps and training.min_learning_rate_ratio set the schedule",
    "optimizer": "training.learning_rate, betas and weight_decay set AdamW",
    "gradient_clipping": "training.gradient_clipping sets it",
    "bf16": "student.dtype sets it",
    "fp16": "student.dtype is float32 or bfloat16",
}


class TrainingConfig(Section):
    """How the student is trained."""

    losses: Annotated[list[Loss], Field(min_length=1)]
    """Summed with their weights; each is logged apart."""
    steps: Count
    """Optimizer steps."""
    sequences_per_step: Count
    """Global batch; the order of data does not depend on the number of workers."""
    tokens_per_micro_batch: Count
    """Token budget of one packed micro-batch on one worker; a longer sequence is refused."""
    learning_rate: Positive
    """Peak of the schedule."""
    warmup_steps: Annotated[int, Field(ge=0)]
    """Linear warm-up, then cosine."""
    min_learning_rate_ratio: Fraction = 0.1
    """Last learning rate as a fraction of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of AdamW, on matrices only."""
    gradient_clipping: Positive = 1.0
    """Bound on the global gradient norm."""
    workers: Count = 1
    """Ray Train workers, one per GPU or CPU slot."""
    resources: Resources = Resources()
    """Of one worker."""
    deepspeed: dict[str, Any] = {}
    """DeepSpeed's own configuration, verbatim."""
    log_every_steps: Count = 10
    """Metrics to JSON lines and TensorBoard."""
    evaluate_every_steps: Count
    """Losses on the hold-out sequences."""
    checkpoint_every_steps: Count
    """Complete checkpoints for resume."""
    keep_checkpoints: Count = 2
    """Newest complete checkpoints kept."""
    max_failures: Annotated[int, Field(ge=-1)] = 2
    """Restarts by Ray Train from the newest checkpoint after a worker died; -1 for no limit."""
    cost_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """Price of the hardware of one worker."""

    @model_validator(mode="after")
    def _owned_keys(self) -> TrainingConfig:
        for key in self.deepspeed:
            if key in OWNED_DEEPSPEED_KEYS:
                raise ValueError(f"deepspeed.{key} is not accepted: {OWNED_DEEPSPEED_KEYS[key]}")
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be less than steps ({self.steps})"
            )
        return self


class EvaluationConfig(Section):
    """What the report measures on the hold-out prompts."""

    sampling: dict[str, Any]
    """vLLM SamplingParams of the answers that are checked, verbatim."""
    max_prompts_per_domain: Count | None = None
    """Bound on the hold-out prompts answered by each model."""
    twin: bool = True
    """Also train a twin student on the same sequences with cross-entropy alone, to show what
    distillation gives.
    """
    resources: Resources = Resources()
    """Of the engine that serves the student, and of the task that computes its hold-out losses."""


class ClusterConfig(Section):
    """Ray: the local head, and how stage jobs run."""

    local_num_cpus: Count = 4
    """Logical CPUs of the head started without an address; may exceed the cores."""
    local_num_gpus: Annotated[int, Field(ge=0)] | None = None
    """GPUs of that head; found by Ray when not given."""
    job_resources: Resources = Resources(num_cpus=0)
    """Of the driver of each stage."""
    env_vars: dict[str, str] = {}
    """Environment of all stages, for what upstream reads from nowhere else."""


class Config(Section):
    """A whole run."""

    name: Name
    """Name of the run; its outputs lie in `<storage.root>/runs/<name>`."""
    seed: int
    """Of sampling, initialisation and data order."""
    storage: StorageConfig
    prompts: PromptsConfig
    teachers: Annotated[dict[Name, TeacherConfig], Field(min_length=1)]
    synthesis: SynthesisConfig
    scoring: ScoringConfig
    combine: CombineConfig
    student: StudentConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    cluster: ClusterConfig = ClusterConfig()

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
            if sum(table.values()) <= 0:
                raise ValueError(f"{place} must give at least one teacher a weight above 0")
        return self

    @model_validator(mode="after")
    def _domain_teachers_are_unique(self) -> Config:
        if self.synthesis.generator != "domain_teacher":
            return self
        owner: dict[str, str] = {}
        for name, teacher in self.teachers.items():
            for domain in teacher.domains:
                if domain in owner:
                    raise ValueError(
                        f"domain {domain!r} is claimed by teachers {owner[domain]!r} and {name!r}; "
                        "generator domain_teacher needs one teacher per domain"
                    )
                owner[domain] = name
        return self
