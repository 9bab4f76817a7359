"""The training loop of one worker, from top to bottom: data, engine, steps, metrics, checkpoints,
final weights.

A step sums its losses over micro-batches and workers and divides by the number of positions of the
whole global batch, so that packing and the number of workers change nothing but speed. DeepSpeed
averages gradients over the workers, hence the factor of the world size in each micro-batch's loss.
"""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from pipeline import storage
from pipeline.config_training import TrainingConfig
from pipeline.datasets import DatasetEntry, read_dataset
from pipeline.errors import TrainingError
from pipeline.training import TrainingJob
from students.checkpoint import load_checkpoint, read_metrics, save_checkpoint
from students.dataset import (
    DataOrder,
    Examples,
    MicroBatch,
    open_examples,
    pack,
    plan_micro_batches,
    refuse_long_sequences,
)
from students.losses import LossWeights
from students.model import StudentModule, build_student, check_architecture

PROBE_SEQUENCES = 2


def train(job: TrainingJob, device: torch.device) -> None:
    """Trains to the last step, resuming from the newest complete checkpoint. `torch.distributed` is
    initialised.

    Raises:
        TrainingError: the data, the student or a checkpoint does not fit the job.
        CacheError: a cache is corrupt or does not cover the data.
    """
    training, rank, started = job.config.training, dist.get_rank(), time.monotonic()
    torch.manual_seed(job.config.seed + rank)
    model = build_student(job.config.student, job.config.seed)
    if job.config.student.attn_implementation.startswith("flash"):
        model = model.to(device)
    check_architecture(model)
    vocabulary = model.get_output_embeddings().weight.shape[0]
    data = TrainingData(job, vocabulary, device)
    engine, norms = initialize_engine(StudentModule(model, loss_weights(job)), job)
    state = load_checkpoint(engine, job) or {"step": 0, "tokens": 0, "seconds": 0.0}
    metrics = MetricsLog(job.folder, state["step"]) if rank == 0 else None
    seconds_before, window_started, window_tokens = state["seconds"], time.monotonic(), 0

    for step, micro_batches, num_positions, num_tokens in data.training_batches(state["step"]):
        rate = learning_rate(training, step)
        sums = train_step(engine, micro_batches, num_positions, rate)
        step += 1
        window_tokens += num_tokens
        state = {
            "step": step,
            "tokens": state["tokens"] + num_tokens,
            "seconds": seconds_before + time.monotonic() - started,
        }
        if step == 1 or step % training.log_every_steps == 0 or step == training.steps:
            values = mean_losses(sums, num_positions, job, "train")
            elapsed = time.monotonic() - window_started
            values |= {
                "train/learning_rate": rate,
                "train/grad_norm": float(norms() if norms else engine.get_global_grad_norm()),
                "train/tokens_per_second": window_tokens / elapsed,
            }
            if not math.isfinite(values["train/loss"]):
                raise TrainingError(
                    f"the loss is {values['train/loss']} at step {step}: lower "
                    "training.learning_rate"
                )
            write_metrics(metrics, step, values)
            window_started, window_tokens = time.monotonic(), 0
        if step % training.evaluate_every_steps == 0 or step == training.steps:
            write_metrics(metrics, step, holdout_losses(engine, data, job))
        if step % training.checkpoint_every_steps == 0 or step == training.steps:
            save_checkpoint(engine, job, state)
    finish(engine, job, data, state)


class TrainingData:
    """The entries of a dataset as the micro-batches of this rank."""

    def __init__(self, job: TrainingJob, vocabulary: int, device: torch.device) -> None:
        """Reads the dataset and opens the caches that the losses need.

        Raises:
            TrainingError: nothing to train on, a sequence longer than the budget, or a missing
                cache.
        """
        self._job, self._device = job, device
        self._world_size, self._rank = dist.get_world_size(), dist.get_rank()
        entries = read_dataset(job.layout, job.dataset_digest)
        self.train = [entry for entry in entries if entry.split == "train"]
        self.holdout = [entry for entry in entries if entry.split == "holdout"]
        if not self.train:
            raise TrainingError(f"dataset {job.dataset_digest} has no sequences of split `train`")
        used = self.train + self.holdout
        budget = job.config.training.tokens_per_micro_batch
        refuse_long_sequences([(entry.sequence_id, entry.num_tokens) for entry in used], budget)
        combine = job.config.combine if job.uses_teachers else None
        teachers = list(job.config.teachers)
        # apart, since a thread reads ahead in one while the other is used
        self._train_examples, self._holdout_examples = (
            open_examples(job.layout, job.caches, teachers, combine, used, vocabulary)
            for _ in range(2)
        )
        shards = [entry.shard for entry in self.train]
        training = job.config.training
        self._order = DataOrder(
            shards, job.config.seed, job.dataset_digest, training.sequences_per_step
        )

    def training_batches(self, start: int) -> Iterator[tuple[int, list[MicroBatch], int, int]]:
        """Step, micro-batches of this rank, and the positions and tokens of the global batch; reads
        one ahead.
        """
        stop = self._job.config.training.steps

        def build(step: int) -> tuple[int, list[MicroBatch], int, int]:
            batch = [self.train[i] for i in self._order.batch(step)]
            micro_batches = list(self._micro_batches(batch, self._train_examples))
            return (
                step,
                micro_batches,
                sum(e.num_positions for e in batch),
                sum(e.num_tokens for e in batch),
            )

        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(build, start) if start < stop else None
            for step in range(start, stop):
                current = ahead.result()
                if step + 1 < stop:
                    ahead = reader.submit(build, step + 1)
                yield current

    def holdout_batches(self) -> Iterator[MicroBatch]:
        """The hold-out sequences of this rank, the same number of micro-batches on each."""
        return self._micro_batches(self.holdout, self._holdout_examples)

    def probe(self) -> tuple[list[DatasetEntry], list[list[int]], MicroBatch]:
        """The same few sequences on every rank."""
        entries = [*self.holdout, *self.train][:PROBE_SEQUENCES]
        examples = [self._holdout_examples[entry] for entry in entries]
        return entries, [e.input_ids.tolist() for e in examples], pack(examples).to(self._device)

    def _micro_batches(self, batch: list[DatasetEntry], examples: Examples) -> Iterator[MicroBatch]:
        budget = self._job.config.training.tokens_per_micro_batch
        plan = plan_micro_batches([entry.num_tokens for entry in batch], budget, self._world_size)[
            self._rank
        ]
        for row in plan:
            yield pack([examples[batch[i]] for i in row]).to(self._device)


def initialize_engine(
    module: StudentModule, job: TrainingJob
) -> tuple[deepspeed.DeepSpeedEngine, Any]:
    """DeepSpeed around the module, and a function that gives the gradient norm where DeepSpeed
    knows none.
    """
    training, bf16 = job.config.training, job.config.student.dtype == "bfloat16"
    plain = job.zero_stage == 0 and not bf16
    optimizer = make_optimizer(module, training)
    norms: list[torch.Tensor] = []
    if plain:
        # DeepSpeed then steps the optimizer itself and reports no norm: clip between its all-reduce
        # and the update
        def clip(*_: Any) -> None:
            norms[:] = [
                torch.nn.utils.clip_grad_norm_(module.parameters(), training.gradient_clipping)
            ]

        optimizer.register_step_pre_hook(clip)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config={
            "steps_per_print": None,
            **training.deepspeed,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": 0.0 if plain else training.gradient_clipping,
            "bf16": {"enabled": bf16},
        },
    )
    return engine, (lambda: norms[0]) if plain else None


def make_optimizer(module: torch.nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only; DeepSpeed's own on the CPU when the config offloads
    it there.
    """
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.deepspeed.get("zero_optimization", {}).get("offload_optimizer"):
        return DeepSpeedCPUAdam(
            groups, lr=training.learning_rate, betas=training.betas, adamw_mode=True
        )
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=training.betas, fused=True)


def learning_rate(training: TrainingConfig, step: int) -> float:
    """Of a step counted from 0: linear from 0 to the peak over the warm-up, then cosine down to the
    last rate.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    progress = (step - training.warmup_steps + 1) / (training.steps - training.warmup_steps)
    low = training.min_learning_rate_ratio
    return training.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


def train_step(
    engine: deepspeed.DeepSpeedEngine,
    micro_batches: list[MicroBatch],
    num_positions: int,
    rate: float,
) -> torch.Tensor:
    """One optimizer step; returns this rank's sums of total, forward_kl and cross_entropy."""
    engine.train()
    sums = torch.zeros(3, device=engine.device)
    for micro_batch in micro_batches:
        total, forward_kl, cross_entropy = engine(micro_batch)
        engine.backward(total * (dist.get_world_size() / num_positions))
        sums += torch.stack([total.detach(), forward_kl, cross_entropy])
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    engine.step()
    return sums


@torch.no_grad()
def holdout_losses(
    engine: deepspeed.DeepSpeedEngine, data: TrainingData, job: TrainingJob
) -> dict[str, float]:
    """The losses on the hold-out sequences; empty without any."""
    if not data.holdout:
        return {}
    engine.eval()
    weights, sums = loss_weights(job), torch.zeros(3, device=engine.device)
    for micro_batch in data.holdout_batches():
        gold_logprobs, forward_kl, _ = engine(micro_batch)
        kl, ce = forward_kl.sum(), -gold_logprobs.sum()
        sums += torch.stack([weights.forward_kl * kl + weights.cross_entropy * ce, kl, ce])
    return mean_losses(sums, sum(entry.num_positions for entry in data.holdout), job, "holdout")


def mean_losses(
    sums: torch.Tensor, num_positions: int, job: TrainingJob, prefix: str
) -> dict[str, float]:
    """Nats per position over all ranks, by slash name."""
    dist.all_reduce(sums)
    total, forward_kl, cross_entropy = (sums / num_positions).tolist()
    values = {f"{prefix}/loss": total, f"{prefix}/cross_entropy": cross_entropy}
    return values | ({f"{prefix}/forward_kl": forward_kl} if job.uses_teachers else {})


def loss_weights(job: TrainingJob) -> LossWeights:
    """The weights of the job's losses; a loss named twice counts twice."""
    weights = {"forward_kl": 0.0, "cross_entropy": 0.0}
    for loss in job.losses:
        weights[loss.type] += loss.weight
    return LossWeights(**weights)


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of rank 0; what an interrupted run wrote after `step`
    is dropped.
    """

    def __init__(self, folder: str, step: int) -> None:
        self._path = Path(folder, "metrics.jsonl")
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        storage.write_bytes(
            str(self._path), "".join(json.dumps(line) + "\n" for line in kept).encode()
        )
        self._stream = self._path.open("a")
        self._events = SummaryWriter(str(Path(folder, "tensorboard")), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()


def write_metrics(metrics: MetricsLog | None, step: int, values: dict[str, float]) -> None:
    """Writes on rank 0, which alone has a log."""
    if metrics is not None and values:
        metrics.write(step, values)


def finish(
    engine: deepspeed.DeepSpeedEngine, job: TrainingJob, data: TrainingData, state: dict[str, Any]
) -> None:
    """Writes `final/` (weights, and log-probabilities that the export must reproduce) and then
    `training.json`.
    """
    weights = gather_weights(engine)
    entries, input_ids, batch = data.probe()
    engine.eval()
    with torch.no_grad():
        gold_logprobs, *_ = engine(batch)
    peak = torch.tensor([peak_memory_gib()], device=engine.device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        folder = Path(job.folder, "final")
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "weights.safetensors", metadata={"format": "pt"})
        probe = {
            "sequence_ids": [entry.sequence_id for entry in entries],
            "input_ids": input_ids,
            "logit_indices": batch.logit_indices.tolist(),
            "gold_logprobs": gold_logprobs.tolist(),
        }
        storage.write_json(str(folder / "probe.json"), probe)
        last: dict[str, float] = {}
        for line in read_metrics(job.folder):
            last |= line
        summary = {
            "steps": state["step"],
            "final": {name: value for name, value in last.items() if name != "step"},
            "tokens": state["tokens"],
            "seconds": state["seconds"],
            "peak_memory_gib": float(peak),
            "world_size": dist.get_world_size(),
            "zero_stage": job.zero_stage,
            "identity": job.identity(),
        }
        storage.write_json(job.summary_path, summary)
    dist.barrier()


def gather_weights(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.Tensor]:
    """float32 master weights by their name in the Hugging Face model, on rank 0; tied weights once.

    All ranks call it. With bfloat16 at stage 0 DeepSpeed gives no access to its master weights:
    these are then the bfloat16 weights, which is what is exported in any case.
    """
    model, weights = engine.module.model, {}
    for name, parameter in model.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        if dist.get_rank() == 0:
            weights[name] = (parameter if full is None else full).detach().float().cpu().clone()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {
        name: value.cpu() for name, value in model.state_dict().items() if name not in parameters
    }
    return weights | buffers


def peak_memory_gib() -> float:
    """Of this worker: device memory on a GPU, resident memory otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
