"""`training`: steps, batches, losses and workers of the student's training."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, Field, field_validator, model_validator

from pipeline.config.base import (
    Count,
    Decay,
    Fraction,
    Handful,
    Positive,
    Price,
    Real,
    Resources,
    Section,
    Verbatim,
    Whole,
)
from pipeline.config.deepspeed import check_deepspeed
from pipeline.config.losses import HiddenStatesLoss, Loss

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
"""Keys of a training's identity: everything that decides the trained weights."""


def _identity_key(name: str) -> str:
    if name.partition(".")[0] not in IDENTITY:
        raise ValueError(
            f"{name!r} is no part of a training's identity; its parts are {', '.join(IDENTITY)}"
        )
    if "student.dtype".startswith(name):
        raise ValueError(
            f"{name!r} is not accepted, since the optimizer's state depends on student.dtype: name "
            "narrower keys, or start a new training with --from-checkpoint"
        )
    return name


class TrainingConfig(Section):
    """Training of the student."""

    losses: Annotated[list[Loss], Field(min_length=1)]
    """Losses, summed with their weights. Each is also logged by itself, under a name made of its
    type and parameters."""
    steps: Count
    """Number of optimizer steps. The train sequences are gone through (`steps` times
    `sequences_per_step`) / (number of train sequences) times, in another order each time."""
    sequences_per_step: Count
    """Number of sequences of one optimizer step, over all workers. The order of the sequences
    depends on `seed` and not on the number of workers."""
    tokens_per_micro_batch: Count
    """Largest number of tokens that one worker processes at once; a step runs as many micro-batches
    as it needs. It changes memory and speed, not the results. Raise it until memory is full. It
    must hold the longest sequence, so set `synthesis.max_sequence_tokens` if it cannot."""
    packing: bool = True
    """Pack the sequences of a micro-batch into one row, kept apart by position ids. With `false`
    each sequence is a padded row of its own, which wastes work; set it for architectures that
    cannot keep packed sequences apart, which a check at the start detects. The results are the
    same."""
    learning_rate: Positive
    """Peak of AdamW's learning rate, which is reached after the warm-up. Lower it if the loss
    rises or becomes not-a-number."""
    warmup_steps: Annotated[Whole, Field(ge=0)]
    """Number of steps in which the learning rate rises linearly from 0 to its peak; after them it
    falls on a cosine curve until the last step. Must be less than `steps`."""
    min_learning_rate_ratio: Fraction = 0.1
    """Learning rate at the last step, as a fraction of the peak, from 0 to 1; with 1 it stays at
    the peak after the warm-up."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of AdamW's running means of the gradient and of its square."""
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    """Weight decay of AdamW; it applies to matrices only, not to biases and norms."""
    gradient_clipping: Positive = 1.0
    """Largest norm of the gradient over all parameters; a larger gradient is scaled down to it."""
    workers: Handful = 1
    """Number of Ray Train workers that share each step. The results stay the same up to the order
    of summation."""
    resources: Resources = Resources()
    """Resources of one worker. For training on GPUs set `{num_gpus: 1}`."""
    loader_processes: Annotated[Whole, Field(ge=0, le=1000)] = 1
    """Number of processes beside each worker that read, combine and pack its next batches; with 0
    the worker does it itself. They change no number. Raise it if workers wait for their batches,
    and count these processes in the CPUs of `resources`."""
    deepspeed: Verbatim = Field(default_factory=dict)
    """DeepSpeed's own configuration, passed as it is, such as `{zero_optimization: {stage: 2}}`.
    Keys that DeepSpeed would ignore, or that other fields set, are refused."""
    log_every_steps: Count = 10
    """Steps from one line of metrics to the next, in `metrics.jsonl` and TensorBoard."""
    evaluate_every_steps: Count
    """Steps from one measurement of the losses on the hold-out sequences to the next."""
    checkpoint_every_steps: Count
    """Steps from one complete checkpoint to the next. An interrupted training resumes from the last
    one, so this many steps can be lost at most."""
    keep_checkpoints: Count = 2
    """Number of newest complete checkpoints that are kept; older ones are deleted."""
    max_failures: Annotated[Whole, Field(ge=-1)] = 2
    """Number of times that training restarts from one and the same checkpoint after a worker died;
    -1 for no limit. Each new checkpoint sets the count to 0. Workers whose node goes away after a
    notice are not counted."""
    cost_per_hour: Price = 0.0
    """Price per hour of the hardware of one worker, in any currency. The report adds it up; it
    changes nothing else."""
    allow_resume_with: list[Annotated[str, AfterValidator(_identity_key)]] = Field(
        default_factory=list
    )
    """Differences from the checkpoint that are accepted when training resumes, by the names that a
    refused resume lists, such as `caches`, `losses` or `training.learning_rate`. The command-line
    option `--allow` sets it. Accepted differences are recorded in the training's summary and in the
    model card."""

    @field_validator("losses")
    @classmethod
    def _each_stands_once(cls, losses: list[Loss]) -> list[Loss]:
        known: dict[str, dict[str, Any]] = {}
        for loss in losses:
            fields = loss.model_dump(exclude={"weight"})
            first = known.setdefault(loss.name, fields)
            if first is fields:
                continue
            other = sorted(key for key in fields if fields[key] != first[key])
            raise ValueError(
                f"{loss.name} stands twice in the list, with another {' and '.join(other)}, which "
                "its name does not tell apart: keep one of them"
                if other
                else f"{loss.name} stands twice in the list: add up the weights in one entry"
            )
        return losses

    @property
    def teacher_layers(self) -> dict[str, tuple[int, ...]]:
        """Layers whose hidden states the losses need, in ascending order, by teacher."""
        layers: dict[str, set[int]] = {}
        for loss in self.losses:
            if isinstance(loss, HiddenStatesLoss):
                layers.setdefault(loss.teacher, set()).update(loss.layers)
        return {teacher: tuple(sorted(numbers)) for teacher, numbers in layers.items()}

    @model_validator(mode="after")
    def _groups_fill_the_batch(self) -> TrainingConfig:
        sizes = {loss.sequences_together for loss in self.losses} - {1}
        if len(sizes) > 1:
            raise ValueError(
                f"losses of type relation have groups of {sorted(sizes)} sequences, but a group "
                "stays in one micro-batch: give all of them the same `sequences`"
            )
        for size in sizes:
            if self.sequences_per_step % size:
                raise ValueError(
                    f"sequences_per_step ({self.sequences_per_step}) is no multiple of the "
                    f"`sequences` of a relation loss ({size}): change one of them"
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
