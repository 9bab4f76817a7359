"""The batches of a training: the order of its data, cut into steps and into the rows of each rank.

    entries -> order of the epoch -> global batch of a step -> micro-batches of each rank -> tensors

The order is a pure function of (seed, epoch, dataset digest), and a global batch is a list of
sequences: neither depends on the number of workers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

from pipeline.datasets import DatasetEntry, read_dataset
from pipeline.errors import TrainingError
from pipeline.fingerprint import digest_json
from pipeline.training import TrainingJob
from students.dataset import Examples, open_examples
from students.features import TeacherStates
from students.packing import (
    MicroBatch,
    pack,
    plan_groups,
    refuse_long_groups,
    refuse_long_sequences,
)

SHUFFLE_WINDOW_SHARDS = 32
"""Sequence shards whose sequences are shuffled together; fewer than a cache reader keeps decoded.
"""
PROBE_SEQUENCES = 2


@dataclass(frozen=True)
class StepBatch:
    """One step, counted from 0: this rank's micro-batches, and the size of the global batch."""

    step: int
    micro_batches: list[MicroBatch]
    num_positions: int
    num_tokens: int


class DataOrder:
    """Which sequences each step trains on: the epochs one after another, cut into equal batches."""

    def __init__(
        self, shards: Sequence[str], seed: int, dataset_digest: str, sequences_per_step: int
    ) -> None:
        """`shards` names the sequence shard of every sequence, in the dataset's order."""
        self._seed, self._digest, self._batch = seed, dataset_digest, sequences_per_step
        names, codes = np.unique(np.asarray(shards), return_inverse=True)
        self._members = np.split(
            np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1]
        )
        self._num_sequences, self._num_shards = len(codes), len(names)
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def epoch(self, epoch: int) -> np.ndarray:
        """int64[N]: the order of one epoch. Shards are shuffled, then the sequences of every window
        of shards.
        """
        if epoch not in self._epochs:
            entropy = int(digest_json([self._seed, epoch, self._digest]), 16)
            generator = np.random.Generator(np.random.PCG64(entropy))
            shards = generator.permutation(self._num_shards)
            windows = [
                shards[i : i + SHUFFLE_WINDOW_SHARDS]
                for i in range(0, len(shards), SHUFFLE_WINDOW_SHARDS)
            ]
            self._epochs[epoch] = np.concatenate(
                [
                    generator.permutation(np.concatenate([self._members[s] for s in window]))
                    for window in windows
                ]
            )
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def batch(self, step: int) -> np.ndarray:
        """int64[sequences_per_step]: the sequences of a step, counted from 0."""
        places = np.arange(step * self._batch, (step + 1) * self._batch)
        epochs, within = np.divmod(places, self._num_sequences)
        return np.concatenate([self.epoch(int(e))[within[epochs == e]] for e in np.unique(epochs)])


class TrainingData:
    """The entries of a dataset as the micro-batches of this rank."""

    def __init__(self, job: TrainingJob, vocabulary: int, device: torch.device) -> None:
        """Reads the dataset and opens the caches that the losses need.

        Raises:
            TrainingError: nothing to train on, a sequence longer than the budget, or a missing
                cache.
        """
        self._job, self._device = job, device
        self._padded = not job.config.training.packing
        self._world_size, self._rank = dist.get_world_size(), dist.get_rank()
        entries = read_dataset(job.layout, job.dataset_digest)
        self.train = [entry for entry in entries if entry.split == "train"]
        self.holdout = [entry for entry in entries if entry.split == "holdout"]
        if not self.train:
            raise TrainingError(f"dataset {job.dataset_digest} has no sequences of split `train`")
        used = self.train + self.holdout
        budget = job.config.training.tokens_per_micro_batch
        refuse_long_sequences([(entry.sequence_id, entry.num_tokens) for entry in used], budget)
        self._together = job.sequences_together
        lengths = [entry.num_tokens for entry in used]
        refuse_long_groups(lengths, budget, self._padded, self._together)
        combine = job.config.combine if job.uses_teachers else None
        teachers = list(job.config.teachers)
        # apart, since a thread reads ahead in one while the other is used
        self._train_examples, self._holdout_examples = (
            open_examples(job.layout, job.caches, teachers, combine, used, vocabulary)
            for _ in range(2)
        )
        self._train_states, self._holdout_states = (
            TeacherStates(job.caches, job.feature_teachers, used) for _ in range(2)
        )
        shards = [entry.shard for entry in self.train]
        training = job.config.training
        self._order = DataOrder(
            shards, job.config.seed, job.dataset_digest, training.sequences_per_step
        )

    @property
    def state_widths(self) -> dict[str, int]:
        """By teacher whose hidden states a loss needs, their stored dimensions."""
        return self._train_states.widths

    def training_batches(self, start: int) -> Iterator[StepBatch]:
        """The batches from a step on; reads one ahead."""
        steps = range(start, self._job.config.training.steps)
        with ThreadPoolExecutor(1) as reader:
            ahead = [reader.submit(self._step, step) for step in steps[:1]]
            for step in steps:
                batch = ahead.pop().result()
                if step + 1 in steps:
                    ahead.append(reader.submit(self._step, step + 1))
                yield batch

    def holdout_batches(self) -> Iterator[MicroBatch]:
        """The hold-out sequences of this rank, the same number of micro-batches on each."""
        return self._micro_batches(self.holdout, self._holdout_examples, self._holdout_states)

    def probe(self) -> tuple[list[DatasetEntry], MicroBatch]:
        """The same few sequences on every rank, together."""
        entries = [*self.holdout, *self.train][:PROBE_SEQUENCES]
        examples = [self._holdout_examples[entry] for entry in entries]
        states = self._holdout_states.batch(entries, range(len(entries)))
        batch = replace(pack(examples, self._padded), features=states)
        return entries, batch.to(self._device)

    def _step(self, step: int) -> StepBatch:
        batch = [self.train[i] for i in self._order.batch(step)]
        return StepBatch(
            step,
            list(self._micro_batches(batch, self._train_examples, self._train_states)),
            sum(entry.num_positions for entry in batch),
            sum(entry.num_tokens for entry in batch),
        )

    def _micro_batches(
        self, batch: list[DatasetEntry], examples: Examples, states: TeacherStates
    ) -> Iterator[MicroBatch]:
        budget = self._job.config.training.tokens_per_micro_batch
        lengths = [entry.num_tokens for entry in batch]
        plan = plan_groups(lengths, budget, self._world_size, self._padded, self._together)
        for members in plan[self._rank]:
            packed = pack([examples[batch[i]] for i in members], self._padded)
            groups = [i // self._together for i in members]
            features = states.batch([batch[i] for i in members], groups)
            yield replace(packed, features=features).to(self._device)
