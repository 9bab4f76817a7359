"""The training loop of one worker, from top to bottom: data, student, steps, metrics, checkpoints,
final weights.

A step sums its losses over micro-batches and workers and divides by the number of positions of the
whole global batch, so that packing and the number of workers change nothing but speed. DeepSpeed
averages gradients over the workers, hence the factor of the world size in each micro-batch's loss.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from transformers import PreTrainedModel

from pipeline import storage
from pipeline.config.losses import HiddenStatesLoss
from pipeline.config.training import TrainingConfig
from pipeline.errors import TrainingError
from pipeline.rope import length_bounds
from pipeline.run.training_spec import TrainingSpec
from students.architecture.build import build_student
from students.architecture.checks import check_architecture
from students.architecture.dtypes import float_buffers
from students.architecture.head import lm_head_of
from students.architecture.noise import active_noise
from students.architecture.skeleton import check_skeleton, explained
from students.checkpoints.agreement import from_rank_0
from students.checkpoints.attempts import Attempt, begin_attempt
from students.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from students.checkpoints.resume import TrainingState, agreed_resume, allowed_changes
from students.data.batches import StepBatch
from students.deepspeed_engine import DeepSpeedStudent
from students.departure import Departure, NodeLeaves
from students.losses.divergences import DistributionLoss, loss_from_config
from students.losses.hidden_states import HiddenStatesLosses, layer_loss_from_config
from students.micro_batch import MicroBatch
from students.model import StudentModule
from students.progress import MetricsLog, read_metrics
from students.surroundings import Surroundings, one_node
from students.training_data import TrainingData

logger = logging.getLogger(__name__)


def train(
    spec: TrainingSpec, device: torch.device, surroundings: Surroundings | None = None
) -> None:
    """Trains to the last step, resuming from the newest complete checkpoint. `torch.distributed` is
    initialised before.

    Args:
        surroundings: nodes and driver; without them, all workers run on this node.

    Raises:
        TrainingError: the data, the student or a checkpoint does not fit the training, or another
            training of the folder has begun.
        CacheError: a cache is corrupt or does not cover the data.
        NodeLeaves: a node goes away, and a checkpoint is made.
    """
    training, started = spec.config.training, time.monotonic()
    around = surroundings or one_node(dist.get_world_size())
    attempt = from_rank_0(lambda: begin_attempt(spec.folder, around.nodes[0]), device)
    torch.manual_seed(spec.seed + dist.get_rank())
    model = checked_model(spec, device)
    bounds = length_bounds(model.config)
    data = TrainingData(spec, lm_head_of(model).out_features, device, bounds)
    student, state = start_or_resume(spec, model, data, device)
    metrics = None
    if dist.get_rank() == 0:
        metrics = MetricsLog(spec.metrics_path, state.step, attempt.check)
        around.say(f"resumed from step {state.step}" if state.step else "begins at step 0")
    started -= state.seconds
    window_started, window_tokens = time.monotonic(), 0
    departure = Departure(around.leaving)

    for batch in data.training_batches(state.step, state.sequences):
        rate = learning_rate(training, batch.step)
        sums = train_step(student, batch, rate)
        window_tokens += batch.num_tokens
        state = replace(
            state,
            step=batch.step + 1,
            sequences=state.sequences + training.sequences_per_step,
            tokens=state.tokens + batch.num_tokens,
        )
        leaving = departure.after_step(state.step)
        evaluates = is_due(state.step, training.evaluate_every_steps, training)
        saves = is_due(state.step, training.checkpoint_every_steps, training)
        logs = state.step == 1 or is_due(state.step, training.log_every_steps, training)
        if not (logs or evaluates or saves or leaving):
            continue
        values = mean_losses(sums, batch.num_positions, student.module, "train")
        now = time.monotonic()  # the device has finished the step
        state = replace(state, seconds=now - started)
        values["train/grad_norm"] = student.gradient_norm()
        refuse_divergence(values, state.step)  # before a checkpoint keeps such weights
        values["train/learning_rate"] = rate
        values["train/tokens_per_second"] = window_tokens / (now - window_started)
        if evaluates:
            values |= holdout_losses(student, data)
        if metrics is not None and (logs or evaluates or saves):
            metrics.write(state.step, values)
        if saves or leaving:
            save_checkpoint(student, spec, state, attempt, around.nodes)
        if leaving and state.step < training.steps:
            leave(leaving, state.step, around)
        window_started, window_tokens = time.monotonic(), 0
    if metrics is not None:
        metrics.close()
    finish(student, spec, data, state, attempt)


def leave(notice: str, step: int, surroundings: Surroundings) -> None:
    """Ends this start of the training behind a checkpoint; all ranks call it.

    Raises:
        NodeLeaves: always.
    """
    line = f"{notice}: checkpoint at step {step}"
    if dist.get_rank() == 0:
        surroundings.say(line)
    raise NodeLeaves(line)


def checked_model(spec: TrainingSpec, device: torch.device) -> PreTrainedModel:
    """The student's model, whose architecture the losses and the packing can handle.

    Raises:
        TrainingError: the model cannot be loaded or handled.
    """
    student, packing = spec.config.student, spec.config.training.packing
    check_skeleton(student, packing)
    with explained(student):
        model = build_student(student, spec.seed)
        if student.attn_implementation.startswith("flash"):  # needs a GPU
            torch.nn.Module.to(model, device)
        check_architecture(model, packing)
    noise = active_noise(model)
    if noise and dist.get_rank() == 0:
        logger.warning(
            "%s: the model's own config adds noise to the training, %s; student.dropout: false "
            "switches dropout and jitter off",
            spec.student,
            ", ".join(f"{name} {size:g}" for name, size in noise.items()),
        )
    return model


def start_or_resume(
    spec: TrainingSpec, model: PreTrainedModel, data: TrainingData, device: torch.device
) -> tuple[DeepSpeedStudent, TrainingState]:
    """The student under DeepSpeed, and the progress of its training.

    Raises:
        TrainingError: a checkpoint does not fit the training.
    """
    resume = agreed_resume(spec, device)
    universal = resume is not None and resume.universal
    on_hidden_states = hidden_states_losses(spec, model, data.hidden_states_widths)
    module = StudentModule(model, distribution_losses(spec), on_hidden_states)
    student = DeepSpeedStudent(module, spec, universal)
    if resume is None:
        return student, TrainingState(step=0, sequences=0, tokens=0, seconds=0.0)
    return student, load_checkpoint(student, spec, resume)


def is_due(step: int, every: int, training: TrainingConfig) -> bool:
    """Whether something is done after a step, counted from 1: at its intervals and at the end."""
    return step % every == 0 or step == training.steps


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Learning rate of a step, counted from 0: linear from 0 to the peak over the warm-up, then
    cosine down to the last rate.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps + 1) / (training.steps - training.warmup_steps)
    low = training.min_learning_rate_ratio
    return training.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def train_step(
    student: DeepSpeedStudent, batch: StepBatch[MicroBatch], rate: float
) -> torch.Tensor:
    """Takes one optimizer step; returns this rank's sums of the figures."""
    factor = dist.get_world_size() / batch.num_positions
    sums_F = torch.zeros(len(student.module.figure_names), device=student.device)
    for micro_batch in batch.micro_batches:
        sums_F += student.accumulate(micro_batch, factor)
    student.step(rate)
    return sums_F


def holdout_losses(student: DeepSpeedStudent, data: TrainingData) -> dict[str, float]:
    """The losses on the hold-out sequences; empty without hold-out sequences."""
    if not data.holdout:
        return {}
    sums_F = torch.zeros(len(student.module.figure_names), device=student.device)
    for micro_batch in data.holdout_batches():
        figures_FP, _ = student.evaluate(micro_batch)
        sums_F += figures_FP.sum(dim=1)
    num_positions = sum(entry.num_positions for entry in data.holdout)
    return mean_losses(sums_F, num_positions, student.module, "holdout")


def mean_losses(
    sums_F: torch.Tensor, num_positions: int, module: StudentModule, prefix: str
) -> dict[str, float]:
    """The weighted loss and every figure, per position over all ranks, by slash name."""
    dist.all_reduce(sums_F)
    means_F = sums_F / num_positions
    values = dict(zip(module.figure_names, means_F.tolist(), strict=True))
    values = {"loss": module.total(means_F).item()} | values
    return {f"{prefix}/{name}": value for name, value in values.items()}


def refuse_divergence(values: dict[str, float], step: int) -> None:
    """Stops a training whose loss or gradient norm is no longer finite.

    Raises:
        TrainingError: one of the two is not finite; the message has both.
    """
    loss, norm = values["train/loss"], values["train/grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingError(
            f"training diverged: at step {step} the loss is {loss} and the gradient norm is "
            f"{norm}; lower training.learning_rate"
        )


def distribution_losses(spec: TrainingSpec) -> tuple[DistributionLoss, ...]:
    """The training's losses on the student's next-token distribution, as parameter objects."""
    return tuple(
        loss_from_config(loss.name, loss.model_dump())
        for loss in spec.losses
        if not isinstance(loss, HiddenStatesLoss)
    )


def hidden_states_losses(
    spec: TrainingSpec, model: PreTrainedModel, widths: dict[str, int]
) -> HiddenStatesLosses | None:
    """The training's losses on hidden states, with their matrices in the student's dtype.

    Args:
        widths: dimensions of the stored hidden states, by teacher.
    """
    stored_layers = spec.config.training.teacher_layers
    losses = tuple(
        layer_loss_from_config(loss.name, loss.model_dump(), stored_layers[loss.teacher])
        for loss in spec.losses
        if isinstance(loss, HiddenStatesLoss)
    )
    if not losses:
        return None
    hidden_size = model.config.get_text_config().hidden_size
    return HiddenStatesLosses(losses, hidden_size, widths, spec.seed).to(model.dtype)


def finish(
    student: DeepSpeedStudent,
    spec: TrainingSpec,
    data: TrainingData,
    state: TrainingState,
    attempt: Attempt,
) -> None:
    """Writes `final/` (the weights, and log-probabilities that the export must reproduce) and then
    `training.json`.

    Raises:
        TrainingError: another training of the folder has begun.
    """
    weights = student.full_weights()
    entries, batch = data.probe()
    gold_logprobs = (-student.evaluate(batch)[0][0]).tolist()
    peak = torch.tensor([peak_memory_gib()], device=student.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    from_rank_0(attempt.check, student.device)
    if dist.get_rank() == 0:
        path = Path(spec.layout.final_weights(spec.student))
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes files that only their owner can read
        probe: dict[str, Any] = {
            "shards": sorted({entry.shard for entry in entries}),
            "buffers": float_buffers(student.module.model),
            "transformers": transformers.__version__,
            "gold_logprobs": {},
        }
        for entry in entries:
            probe["gold_logprobs"][entry.sequence_id] = gold_logprobs[: entry.num_positions]
            del gold_logprobs[: entry.num_positions]
        storage.write_json(spec.layout.probe(spec.student), probe)
        summary = {
            "steps": state.step,
            "final": last_values(spec.metrics_path),
            "tokens": state.tokens,
            "seconds": state.seconds,
            "peak_memory_gib": float(peak),
            "world_size": dist.get_world_size(),
            "zero_stage": spec.zero_stage,
            "identity": spec.identity(),
            "changes": allowed_changes(spec.folder),
        }
        storage.write_json(spec.summary_path, summary)
    dist.barrier()


def last_values(metrics_path: str) -> dict[str, float]:
    """The last value of every metric."""
    last: dict[str, float] = {}
    for line in read_metrics(metrics_path):
        last |= line
    last.pop("step", None)
    return last


def peak_memory_gib() -> float:
    """Peak memory of this worker: device memory on a GPU, resident memory otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
