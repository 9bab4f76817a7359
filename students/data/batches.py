"""The batches of a training: the order of its data, cut into steps and into the rows of each rank.

    entries -> order of the epoch -> global batch of a step -> micro-batches of each rank

The order is a pure function of (seed, epoch, dataset digest), and a global batch is a list of
sequences: neither depends on the number of workers. Loader processes run this: it needs no torch.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from pipeline.cache.reader import DECODED_BYTES_KEPT
from pipeline.errors import TrainingError
from pipeline.fingerprint import digest_json
from pipeline.records import DatasetEntry
from pipeline.run.training_spec import TrainingSpec
from pipeline.sequences import read_dataset
from students.data.examples import Examples, open_examples
from students.data.hidden_states import TeacherHiddenStates
from students.data.packing import (
    PackedBatch,
    pack,
    plan_groups,
    refuse_groups_across_bounds,
    refuse_long_groups,
    refuse_long_sequences,
)

logger = logging.getLogger(__name__)

WINDOW_SHARDS, WINDOW_POSITIONS = 32, 2**22
"""Most sequence shards whose sequences are shuffled together, and most of their positions: a cache
reader keeps all of them decoded if a position takes up to 512 bytes. A larger shard is a window of
its own.
"""
Batch = TypeVar("Batch")


@dataclass(frozen=True)
class StepBatch(Generic[Batch]):
    """One step, counted from 0: this rank's micro-batches, and the size of the global batch."""

    step: int
    micro_batches: list[Batch]
    num_positions: int
    num_tokens: int


class DataOrder:
    """The sequences of each step: the epochs one after another, cut into equal batches."""

    def __init__(
        self,
        shards: Sequence[str],
        positions: Sequence[int],
        seed: int,
        dataset_digest: str,
        sequences_per_step: int,
        origin: int = 0,
    ) -> None:
        """
        Args:
            shards: name of the sequence shard of every sequence, in the dataset's order.
            positions: number of positions of every sequence.
            origin: see `Share`.
        """
        self._seed, self._digest, self._batch = seed, dataset_digest, sequences_per_step
        self._origin = origin
        names, codes = np.unique(np.asarray(shards), return_inverse=True)
        self._members = np.split(
            np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1]
        )
        self._num_sequences = len(codes)
        self._positions_of_shards = np.bincount(codes, positions, len(names))
        self._epochs: OrderedDict[int, np.ndarray] = OrderedDict()

    def epoch(self, epoch: int) -> np.ndarray:
        """int64[N]: the order of one epoch. The shards are shuffled, then the sequences of every
        window of shards.
        """
        if epoch not in self._epochs:
            entropy = int(digest_json([self._seed, epoch, self._digest]), 16)
            generator = np.random.Generator(np.random.PCG64(entropy))
            shards = generator.permutation(len(self._members))
            self._epochs[epoch] = np.concatenate(
                [
                    generator.permutation(np.concatenate([self._members[s] for s in window]))
                    for window in self._windows(shards)
                ]
            )
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _windows(self, shards: np.ndarray) -> list[list[int]]:
        windows: list[list[int]] = []
        room = 0
        for shard in shards:
            positions = self._positions_of_shards[shard]
            if not windows or len(windows[-1]) == WINDOW_SHARDS or positions > room:
                windows.append([])
                room = WINDOW_POSITIONS
            windows[-1].append(shard)
            room -= positions
        return windows

    def batch(self, step: int) -> np.ndarray:
        """int64[sequences_per_step]: the sequences of a step, counted from 0."""
        places = self._origin + np.arange(step * self._batch, (step + 1) * self._batch)
        epochs, within = np.divmod(places, self._num_sequences)
        return np.concatenate([self.epoch(int(e))[within[epochs == e]] for e in np.unique(epochs)])


@dataclass(frozen=True)
class Share:
    """The part of a training's batches that a process makes: everything that its rank computes.

    Attributes:
        spec: the training.
        vocabulary: rows of the student's LM head.
        origin: the place in the order of the data at which step 0 would begin; not 0 if the steps
            before a resume had batches of another size.
        length_bounds: lengths at which the student's positions change, in ascending order;
            sequences on two sides of one are never computed together.
    """

    spec: TrainingSpec
    vocabulary: int
    rank: int
    world_size: int
    origin: int = 0
    length_bounds: tuple[int, ...] = ()


class BatchSource:
    """The sequences of a dataset as the packed micro-batches of one rank."""

    def __init__(self, share: Share) -> None:
        """Reads the dataset and opens the caches that the losses need.

        Raises:
            TrainingError: there is nothing to train on, a sequence is longer than the budget, or a
                cache is missing.
        """
        self._share, spec = share, share.spec
        entries = read_dataset(spec.layout, spec.dataset_digest)
        self.train = [entry for entry in entries if entry.split == "train"]
        self.holdout = [entry for entry in entries if entry.split == "holdout"]
        if not self.train:
            raise TrainingError(
                f"dataset {spec.dataset_digest} has no sequences of split `train`: add prompts, "
                "loosen the filters, or lower prompts.holdout_fraction"
            )
        used, training = self.train + self.holdout, spec.config.training
        padded, budget = not training.packing, training.tokens_per_micro_batch
        refuse_long_sequences([(entry.sequence_id, entry.num_tokens) for entry in used], budget)
        lengths = [entry.num_tokens for entry in used]
        refuse_long_groups(lengths, budget, padded, spec.sequences_together)
        refuse_groups_across_bounds(lengths, share.length_bounds, spec.sequences_together)
        self.examples: Examples = open_examples(
            spec.layout,
            spec.caches,
            spec.config.scoring_teachers,
            spec.combine if spec.uses_teachers else None,
            used,
            share.vocabulary,
        )
        self.hidden_states = TeacherHiddenStates(spec.caches, spec.hidden_states_teachers, used)
        self._warn_of_wide_hidden_states()
        self._order = DataOrder(
            [entry.shard for entry in self.train],
            [entry.num_positions for entry in self.train],
            spec.seed,
            spec.dataset_digest,
            training.sequences_per_step,
            share.origin,
        )

    def _warn_of_wide_hidden_states(self) -> None:
        positions = min(WINDOW_POSITIONS, sum(entry.num_positions for entry in self.train))
        for teacher, num_bytes in self.hidden_states.position_bytes.items():
            if positions * num_bytes > DECODED_BYTES_KEPT:
                logger.warning(
                    "hidden states of %s take %d bytes per position, so the sequences that are "
                    "shuffled together need %.1f GiB, but only %.1f GiB stay in memory and shards "
                    "are read again and again: lower scoring.features.dimensions",
                    teacher,
                    num_bytes,
                    positions * num_bytes / 2**30,
                    DECODED_BYTES_KEPT / 2**30,
                )

    def step(self, step: int) -> StepBatch[PackedBatch]:
        """The micro-batches of a step, counted from 0."""
        batch = [self.train[i] for i in self._order.batch(step)]
        return StepBatch(
            step,
            list(self.micro_batches(batch)),
            sum(entry.num_positions for entry in batch),
            sum(entry.num_tokens for entry in batch),
        )

    def micro_batches(self, batch: Sequence[DatasetEntry]) -> Iterator[PackedBatch]:
        """This rank's micro-batches of any sequences; all ranks have the same number of them."""
        spec, lengths = self._share.spec, [entry.num_tokens for entry in batch]
        together, padded = spec.sequences_together, not spec.config.training.packing
        budget = spec.config.training.tokens_per_micro_batch
        world_size, bounds = self._share.world_size, self._share.length_bounds
        plan = plan_groups(lengths, budget, world_size, padded, together, bounds)
        for members in plan[self._share.rank]:
            packed = pack([self.examples[batch[i]] for i in members], padded)
            groups = [i // together for i in members]
            hidden_states = self.hidden_states.batch([batch[i] for i in members], groups)
            yield replace(packed, hidden_states=hidden_states)
