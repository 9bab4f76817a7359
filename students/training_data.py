"""The data of a training as one worker sees it: steps read ahead, the hold-out, the probe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
import torch.distributed as dist

from pipeline.records import DatasetEntry
from pipeline.run.training_spec import TrainingSpec
from students.data.batches import BatchSource, Share, StepBatch
from students.data.loader import Loader
from students.data.packing import group_size, pack, side_of
from students.micro_batch import MicroBatch

PROBE_SEQUENCES, PROBE_TOKENS = 8, 2048
"""Most sequences whose log-probabilities the export must reproduce, and their tokens beyond two."""
PROBE_CANDIDATES = 256
"""Sequences of which the longest are chosen: wrong positions show late in a text."""


class TrainingData:
    """The entries of a dataset as the micro-batches of this rank."""

    def __init__(
        self,
        spec: TrainingSpec,
        vocabulary: int,
        device: torch.device,
        length_bounds: tuple[int, ...] = (),
    ) -> None:
        """Reads the dataset and opens the caches that the losses need; raises as `BatchSource`.

        Args:
            vocabulary: rows of the student's LM head.
            length_bounds: see `Share`.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self._share = Share(spec, vocabulary, rank, world_size, length_bounds=length_bounds)
        self._source, self._device = BatchSource(self._share), device
        self.holdout = self._source.holdout

    @property
    def hidden_states_widths(self) -> dict[str, int]:
        """Stored dimensions of the hidden states, by teacher whose hidden states a loss needs."""
        return self._source.hidden_states.widths

    def training_batches(self, start: int, sequences: int) -> Iterator[StepBatch[MicroBatch]]:
        """The batches from a step on; each is on the device before the trainer needs it.

        Args:
            start: the step, counted from 0.
            sequences: number of sequences of all steps before it.
        """
        training = self._share.spec.config.training
        steps = range(start, training.steps)
        share = replace(self._share, origin=sequences - start * training.sequences_per_step)
        # the loader closes first: that frees a thread that waits for one of its processes
        with (
            ThreadPoolExecutor(1) as reader,
            Loader(share, steps, training.loader_processes) as loader,
        ):
            ahead = [reader.submit(self._receive, loader) for _ in steps[:1]]
            for step in steps:
                batch = ahead.pop().result()
                if step + 1 in steps:
                    ahead.append(reader.submit(self._receive, loader))
                yield batch

    def holdout_batches(self) -> Iterator[MicroBatch]:
        """The hold-out sequences of this rank, the same number of micro-batches on each."""
        for packed in self._source.micro_batches(self.holdout):
            yield MicroBatch.of(packed, self._device)

    def probe(self) -> tuple[list[DatasetEntry], MicroBatch]:
        """The same few sequences on every rank, in one micro-batch."""
        candidates = [*self.holdout, *self._source.train][:PROBE_CANDIDATES]
        training, bounds = self._share.spec.config.training, self._share.length_bounds
        side = side_of(max(entry.num_tokens for entry in candidates), bounds)
        candidates = [entry for entry in candidates if side_of(entry.num_tokens, bounds) == side]
        entries = probe_entries(candidates, training.tokens_per_micro_batch, not training.packing)
        packed = pack([self._source.examples[e] for e in entries], not training.packing)
        hidden_states = self._source.hidden_states.batch(entries, range(len(entries)))
        return entries, MicroBatch.of(replace(packed, hidden_states=hidden_states), self._device)

    def _receive(self, loader: Loader) -> StepBatch[MicroBatch]:
        batch = loader.receive()
        micro_batches = [MicroBatch.of(packed, self._device) for packed in batch.micro_batches]
        return StepBatch(batch.step, micro_batches, batch.num_positions, batch.num_tokens)


def probe_entries(
    candidates: Sequence[DatasetEntry], tokens_per_micro_batch: int, padded: bool
) -> list[DatasetEntry]:
    """The longest sequences that fit into one micro-batch together; two at least, if two fit."""
    chosen: list[DatasetEntry] = []
    for entry in sorted(candidates, key=lambda entry: -entry.num_tokens):
        size = group_size([e.num_tokens for e in (*chosen, entry)], padded)
        budget = (
            min(tokens_per_micro_batch, PROBE_TOKENS)
            if len(chosen) > 1
            else (tokens_per_micro_batch)
        )
        if size <= budget:
            chosen.append(entry)
        if len(chosen) == PROBE_SEQUENCES:
            break
    return chosen
