"""Configuration of the student and of its training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.config_base import Count, Fraction, ModelFiles, Name, Positive, Resources, Section
from pipeline.config_deepspeed import check_deepspeed


class StudentConfig(Section):
    """The student: a Hugging Face causal language model, trained with DeepSpeed."""

    model: str
    """Folder or hub id; its tokenizer and chat template are those of the whole run."""
    initialization: Literal["pretrained", "random"]
    """Load weights, or start from the config alone."""
    initial_weights: str | None = None
    """Complete training checkpoint or exported folder whose weights a new training starts from, in
    place of those of `initialization`; `polystill train CONFIG --from-checkpoint` sets it."""
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
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Engine arguments of vLLM when the student writes or is evaluated, verbatim."""
    replicas: Count = 1
    """Number of engines when it writes."""

    @property
    def files(self) -> ModelFiles:
        """Where its tokenizer and config are read."""
        return ModelFiles(self.model, self.revision, self.trust_remote_code)


class LossSection(Section):
    """What all losses share."""

    weight: Positive
    """Factor in the sum of losses."""

    @property
    def name(self) -> str:
        """Under which it is logged: its type, and the parameters that are given or have no default.

        Example: `skew_kl_alpha_0.1_direction_reverse_temperature_2`.
        """
        fields = type(self).model_fields
        chosen = {
            key: value
            for key, value in self
            if key not in ("type", "weight") and value != fields[key].default
        }
        parts = [
            f"{key}_{value:g}" if isinstance(value, float) else f"{key}_{value}"
            for key, value in chosen.items()
        ]
        return "_".join([self.model_dump()["type"], *parts])


class TeacherLoss(LossSection):
    """A loss against the teachers' targets."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Of teachers and student; tempers the kept ids and the tail bucket, times its square."""


class ForwardKL(TeacherLoss):
    """KL(teachers || student): the student covers all that the teachers may say."""

    type: Literal["forward_kl"]


class ReverseKL(TeacherLoss):
    """KL(student || teachers): the student keeps to what the teachers find likely."""

    type: Literal["reverse_kl"]
    min_tail: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """A smaller tail of the teachers counts as this: a stored 0 may be rounding, and KL to an
    outcome of probability 0 is infinite. The share of such positions is logged."""


class JensenShannon(TeacherLoss):
    """beta KL(teachers || m) + (1 - beta) KL(student || m), where m is beta parts teachers and
    1 - beta parts student.
    """

    type: Literal["jensen_shannon"]
    beta: float
    """Between 0 and 1."""

    @field_validator("beta")
    @classmethod
    def _inside(cls, beta: float) -> float:
        if not 0 < beta < 1:
            raise ValueError(
                f"beta ({beta:g}) must lie between 0 and 1, both excluded: at either end this "
                "divergence is 0 for every student; forward_kl and reverse_kl are what others call "
                "its ends"
            )
        return beta


class SkewKL(TeacherLoss):
    """KL to a mixture of both: forward KL(teachers || alpha teachers + (1 - alpha) student),
    reverse KL(student || alpha student + (1 - alpha) teachers).
    """

    type: Literal["skew_kl"]
    alpha: float
    """Share of the first distribution in the mixture, between 0 and 1."""
    direction: Literal["forward", "reverse"]
    """`forward` from teachers to student, `reverse` the other way."""

    @field_validator("alpha")
    @classmethod
    def _inside(cls, alpha: float) -> float:
        if not 0 < alpha < 1:
            raise ValueError(
                f"alpha ({alpha:g}) must lie between 0 and 1, both excluded: at 0 this is "
                "forward_kl or reverse_kl, at 1 it is 0 for every student"
            )
        return alpha


class TotalVariation(TeacherLoss):
    """Half the sum of absolute differences of probabilities."""

    type: Literal["total_variation"]


class StateLoss(LossSection):
    """A loss between hidden states of one teacher and of the student, both at the indices whose
    logits are trained. They are captured while the teacher scores.
    """

    teacher: Name
    """Whose states; any teacher, whatever it weighs in the mixture."""
    layers: Annotated[
        dict[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], Field(min_length=1)
    ]
    """Teacher layer: student layer; `l` is transformers' `hidden_states[l]`, but a teacher's last
    layer comes before its final norm. The loss is the mean over these pairs."""

    @property
    def name(self) -> str:
        """Under which it is logged: `hidden_state_cosine_words_8_4`, `relation_angle_words_8_4`."""
        fields = self.model_dump()
        layers = [f"{teachers}_{students}" for teachers, students in self.layers.items()]
        kind = fields["measure"] if "measure" in fields else fields["relation"]
        return "_".join([fields["type"], kind, self.teacher, *layers])


class HiddenState(StateLoss):
    """Distance of the student's hidden state from the teacher's."""

    type: Literal["hidden_state"]
    measure: Literal["mse", "cosine"]
    """Mean square of the differences, or 1 - cosine."""
    projection: Literal["learned", "none"]
    """A matrix from the student's size to the stored one, trained along and not exported; `none`
    needs equal sizes."""


class Relation(StateLoss):
    """Distance of relations: between the sequences of a group, or the tokens of a sequence."""

    type: Literal["relation"]
    relation: Literal["distance", "angle", "token_similarity"]
    """`distance` of pairs and `angle` of triples of sequences, by their mean states;
    `token_similarity`: cosines between the tokens of a sequence."""
    sequences: Annotated[int, Field(ge=2)] | None = None
    """Size of the groups for `distance` and `angle`: sequences that follow one another in a step's
    batch. A group stays in one micro-batch, so that it does not depend on workers or packing."""

    @model_validator(mode="after")
    def _sequences_where_needed(self) -> Relation:
        least = {"distance": 2, "angle": 3, "token_similarity": 0}[self.relation]
        if least == 0 and self.sequences is not None:
            raise ValueError("token_similarity looks at single sequences: leave `sequences` out")
        if least and (self.sequences is None or self.sequences < least):
            raise ValueError(f"{self.relation} needs `sequences` of at least {least}")
        return self


class CrossEntropy(LossSection):
    """Cross-entropy with the tokens of the text."""

    type: Literal["cross_entropy"]


Loss = Annotated[
    ForwardKL
    | ReverseKL
    | JensenShannon
    | SkewKL
    | TotalVariation
    | CrossEntropy
    | HiddenState
    | Relation,
    Field(discriminator="type"),
]


IDENTITY = (
    "seed",
    "tokenizer",
    "dataset_digest",
    "caches",
    "combine",
    "start",
    "student",
    "losses",
    "training",
)
"""What decides the trained weights: the keys of a training's identity."""


def _named_exception(name: str) -> str:
    if name.partition(".")[0] not in IDENTITY:
        raise ValueError(f"{name!r} is no part of a training's identity: {', '.join(IDENTITY)}")
    if "student.dtype".startswith(name):
        raise ValueError(f"{name!r}: the optimizer's state depends on student.dtype")
    return name


def sequences_together(losses: Sequence[Loss]) -> int:
    """How many sequences in a row of a step's batch stay in one micro-batch."""
    sizes = [loss.sequences for loss in losses if isinstance(loss, Relation)]
    return max([1, *(size for size in sizes if size)])


class TrainingConfig(Section):
    """How the student is trained."""

    losses: Annotated[list[Loss], Field(min_length=1)]
    """Summed with their weights; each is logged apart, under its name."""
    steps: Count
    """Optimizer steps."""
    sequences_per_step: Count
    """Global batch; the order of data does not depend on the number of workers."""
    tokens_per_micro_batch: Count
    """Token budget of one micro-batch on one worker; a longer sequence is refused."""
    packing: bool = True
    """Pack a micro-batch into one row, apart by position ids; else pad rows of one sequence each,
    for architectures that cannot keep packed sequences apart. The numbers are the same."""
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
    loader_processes: Annotated[int, Field(ge=0)] = 1
    """Processes beside each worker that read, combine and pack its next batches; 0 leaves it to the
    worker. They change no number; count them in `resources` where a worker needs its CPUs."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """DeepSpeed's own configuration, verbatim; keys that it would ignore are refused."""
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
    allow_resume_with: list[Annotated[str, AfterValidator(_named_exception)]] = Field(
        default_factory=list
    )
    """What may differ from the checkpoint that training resumes from, as a refusal names it:
    `caches`, `losses`, `training.learning_rate`; recorded in the summary and the model card."""

    @field_validator("losses")
    @classmethod
    def _each_once(cls, losses: list[Loss]) -> list[Loss]:
        known: dict[str, dict[str, Any]] = {}
        for loss in losses:
            fields = loss.model_dump(exclude={"weight"})
            before = known.setdefault(loss.name, fields)
            if before is fields:
                continue
            other = sorted(key for key in fields if fields[key] != before[key])
            raise ValueError(
                f"{loss.name} stands twice in the list, with another {' and '.join(other)}, which "
                "its name does not say: keep one of them"
                if other
                else f"{loss.name} stands twice in the list: add up their weights"
            )
        return losses

    @property
    def teacher_layers(self) -> dict[str, tuple[int, ...]]:
        """By teacher, the layers whose hidden states the losses need, in ascending order."""
        layers: dict[str, set[int]] = {}
        for loss in self.losses:
            if isinstance(loss, StateLoss):
                layers.setdefault(loss.teacher, set()).update(loss.layers)
        return {teacher: tuple(sorted(found)) for teacher, found in layers.items()}

    @model_validator(mode="after")
    def _groups_fill_the_batch(self) -> TrainingConfig:
        groups = (loss.sequences for loss in self.losses if isinstance(loss, Relation))
        sizes = {size for size in groups if size is not None}
        if len(sizes) > 1:
            raise ValueError(
                f"relation losses with groups of {sorted(sizes)} sequences: groups stay in one "
                "micro-batch, so all need the same size"
            )
        for size in sizes:
            if size and self.sequences_per_step % size:
                raise ValueError(
                    f"sequences_per_step ({self.sequences_per_step}) is no multiple of a relation "
                    f"loss's `sequences` ({size})"
                )
        return self

    @model_validator(mode="after")
    def _deepspeed_and_schedule(self) -> TrainingConfig:
        check_deepspeed(self.deepspeed)
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be less than steps ({self.steps})"
            )
        return self
