"""`training`: steps, batches, losses and workers of the student's training."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.config.base import Count, Fraction, Positive, Resources, Section
from pipeline.config.deepspeed import check_deepspeed
from pipeline.config.losses import Loss, Relation, StateLoss

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
