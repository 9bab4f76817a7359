"""From the dataset, its sequence shards and the teachers' caches to packed micro-batches.

    entries -> order of the epoch -> global batch of a step -> micro-batches of each rank -> tensors

The order is a pure function of (seed, epoch, dataset digest), and a global batch is a list of
sequences: neither depends on the number of workers. Packing decides only which sequences are
computed together, never what is summed.

Legend: T tokens of a packed row, P its positions, K entries, M teachers (of a packed row: as many
as any of its sequences has with a positive weight).
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from pipeline import storage
from pipeline.cache_index import CacheReader, open_cache
from pipeline.config_targets import CombineConfig
from pipeline.datasets import DatasetEntry, read_sequences
from pipeline.errors import TrainingError
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout, Layout
from pipeline.records import CombinedTargets, TokenSequence
from pipeline.targets import combine_targets, required_teachers
from students.losses import Targets

SHUFFLE_WINDOW_SHARDS = 32
"""Sequence shards whose sequences are shuffled together; fewer than a cache reader keeps decoded.
"""
SEQUENCE_SHARDS_KEPT = 64
EXAMPLE_BYTES_KEPT = 2**30
"""Combined sequences kept in memory by one worker; small data is combined once and then only
packed.
"""


@dataclass(frozen=True)
class Example:
    """One sequence with its combined targets, teachers of weight 0 left out.

    Attributes:
        input_ids: int32[T].
        logit_indices: int64[P], `i_j - 1`: the index whose logits are trained against position j.
        gold_ids: int64[P].
        token_ids: int32[M, P, K], padded with 0.
        logprobs: float16[M, P, K], padded with -inf.
        tail_mass: float16[M, P].
        teacher_weights: float32[M, P].
    """

    input_ids: np.ndarray
    logit_indices: np.ndarray
    gold_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray
    tail_mass: np.ndarray
    teacher_weights: np.ndarray

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in vars(self).values())


@dataclass(frozen=True)
class MicroBatch:
    """Several sequences packed into one row; `position_ids` start again at 0 with each of them.

    Attributes:
        input_ids: int64[1, T].
        position_ids: int64[1, T].
        logit_indices: int64[P], into the packed row.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    logit_indices: torch.Tensor
    targets: Targets

    def to(self, device: torch.device) -> MicroBatch:
        moved = {
            f.name: getattr(self.targets, f.name).to(device, non_blocking=True)
            for f in fields(Targets)
        }
        return MicroBatch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            self.logit_indices.to(device),
            Targets(**moved),
        )


class Examples:
    """Random access to the combined sequences of a dataset; keeps what fits into
    `EXAMPLE_BYTES_KEPT`.
    """

    def __init__(
        self,
        layout: Layout,
        readers: dict[str, CacheReader],
        teachers: list[str],
        combine: CombineConfig | None,
        vocabulary: int,
    ) -> None:
        """`combine=None` leaves the teachers out, for losses on the text alone."""
        self._layout, self._readers, self._teachers = layout, readers, teachers
        self._combine, self._vocabulary = combine, vocabulary
        self._shards: OrderedDict[str, dict[str, TokenSequence]] = OrderedDict()
        self._kept: OrderedDict[str, Example] = OrderedDict()
        self._num_bytes = 0

    def sequence(self, entry: DatasetEntry) -> TokenSequence:
        """The sequence of an entry, read through the last shards used."""
        if entry.shard not in self._shards:
            shard = read_sequences(storage.join(self._layout.root, entry.shard))
            self._shards[entry.shard] = {sequence.sequence_id: sequence for sequence in shard}
            if len(self._shards) > SEQUENCE_SHARDS_KEPT:
                self._shards.popitem(last=False)
        self._shards.move_to_end(entry.shard)
        return self._shards[entry.shard][entry.sequence_id]

    def __getitem__(self, entry: DatasetEntry) -> Example:
        """The combined sequence of an entry.

        Raises:
            CacheError: no teacher of positive weight has scored it.
            TrainingError: it holds a token id outside the student's vocabulary.
        """
        if entry.sequence_id in self._kept:
            self._kept.move_to_end(entry.sequence_id)
            return self._kept[entry.sequence_id]
        example = self._build(self.sequence(entry))
        highest = max(int(example.input_ids.max()), int(example.token_ids.max(initial=0)))
        if highest >= self._vocabulary:
            raise TrainingError(
                f"sequence {entry.sequence_id} or its cached targets hold token id {highest}, but "
                "the student's head "
                f"has {self._vocabulary} rows: the teachers' vocabulary is larger than the "
                "student's"
            )
        self._kept[entry.sequence_id] = example
        self._num_bytes += example.num_bytes
        while self._num_bytes > EXAMPLE_BYTES_KEPT and len(self._kept) > 1:
            self._num_bytes -= self._kept.popitem(last=False)[1].num_bytes
        return example

    def _build(self, sequence: TokenSequence) -> Example:
        if self._combine is None:
            return example_of(
                CombinedTargets(sequence, (), np.zeros((0, sequence.num_positions), np.float32))
            )
        rows = tuple(
            self._readers[name].row(sequence.sequence_id) if name in self._readers else None
            for name in self._teachers
        )
        return example_of(combine_targets(sequence, rows, self._teachers, self._combine))


def open_examples(
    layout: Layout,
    caches: dict[str, CacheLayout],
    teachers: list[str],
    combine: CombineConfig | None,
    entries: Sequence[DatasetEntry],
    vocabulary: int,
) -> Examples:
    """Opens the caches of the teachers that can weigh anything in the domains of `entries`, and no
    others.

    Raises:
        TrainingError: such a teacher has no cache.
    """
    if combine is None:
        return Examples(layout, {}, teachers, None, vocabulary)
    domains = sorted({entry.domain for entry in entries})
    required = sorted(
        {name for domain in domains for name in required_teachers(combine, teachers, domain)}
    )
    missing = [name for name in required if name not in caches]
    if missing:
        raise TrainingError(
            f"no cache was given for {missing}, which combine.weights gives a weight: score them "
            "first"
        )
    return Examples(
        layout, {name: open_cache(caches[name]) for name in required}, teachers, combine, vocabulary
    )


def example_of(combined: CombinedTargets) -> Example:
    """Pads the ragged rows of the teachers that weigh anything in this sequence."""
    sequence, num_positions = combined.sequence, combined.sequence.num_positions
    used = [
        (w_P, row)
        for w_P, row in zip(combined.teacher_weights, combined.rows, strict=True)
        if w_P.any()
    ]
    num_entries = max((int(row.num_entries.max()) for _, row in used), default=1)
    shape = (len(used), num_positions, num_entries)
    token_ids_MPK, logprobs_MPK = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float16)
    for m, (_, row) in enumerate(used):
        kept_PK = np.arange(num_entries) < row.num_entries[:, None]
        token_ids_MPK[m][kept_PK] = row.token_ids
        logprobs_MPK[m][kept_PK] = row.logprobs
    return Example(
        input_ids=sequence.input_ids,
        logit_indices=sequence.position_indices - 1,
        gold_ids=sequence.gold_ids.astype(np.int64),
        token_ids=token_ids_MPK,
        logprobs=logprobs_MPK,
        tail_mass=np.array([row.tail_mass for _, row in used], np.float16).reshape(shape[:2]),
        teacher_weights=np.array([w_P for w_P, _ in used], np.float32).reshape(shape[:2]),
    )


def pack(examples: Sequence[Example]) -> MicroBatch:
    """Packs sequences into one row. Without any, a row of one token and no positions, which weighs
    nothing.
    """
    examples = examples or [_NOTHING]
    starts = np.cumsum([0] + [len(example.input_ids) for example in examples])
    edges = np.cumsum([0] + [len(example.gold_ids) for example in examples])
    num_teachers = max(example.token_ids.shape[0] for example in examples)
    num_entries = max(example.token_ids.shape[2] for example in examples)
    shape = (num_teachers, int(edges[-1]), num_entries)
    token_ids_MPK, logprobs_MPK = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float16)
    tail_MP, weights_MP = np.zeros(shape[:2], np.float16), np.zeros(shape[:2], np.float32)
    for example, start, stop in zip(examples, edges[:-1], edges[1:], strict=True):
        m, _, k = example.token_ids.shape
        token_ids_MPK[:m, start:stop, :k] = example.token_ids
        logprobs_MPK[:m, start:stop, :k] = example.logprobs
        tail_MP[:m, start:stop] = example.tail_mass
        weights_MP[:m, start:stop] = example.teacher_weights
    input_ids = np.concatenate([example.input_ids for example in examples]).astype(np.int64)
    indices = [
        example.logit_indices + start for example, start in zip(examples, starts[:-1], strict=True)
    ]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(
            np.concatenate([np.arange(len(e.input_ids)) for e in examples])
        )[None],
        logit_indices=torch.from_numpy(np.concatenate(indices)),
        targets=Targets(
            gold_ids=torch.from_numpy(np.concatenate([example.gold_ids for example in examples])),
            token_ids=torch.from_numpy(token_ids_MPK),
            logprobs=torch.from_numpy(logprobs_MPK),
            tail_mass=torch.from_numpy(tail_MP),
            teacher_weights=torch.from_numpy(weights_MP),
        ),
    )


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


def plan_micro_batches(
    lengths: Sequence[int], tokens_per_micro_batch: int, world_size: int
) -> list[list[list[int]]]:
    """Which sequences each rank packs together: for every rank an equal number of lists of indices
    into `lengths`.

    The number of rows is what first-fit decreasing needs, rounded up to the world size; sequences
    are then spread over them evenly, longest first, so that ranks wait little for one another. A
    row may stay empty.

    Raises:
        TrainingError: a sequence is longer than the budget.
    """
    refuse_long_sequences(
        [(str(i), length) for i, length in enumerate(lengths)], tokens_per_micro_batch
    )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    rows = _first_fit(order, lengths, tokens_per_micro_batch)
    num_rows = -(-max(len(rows), 1) // world_size) * world_size
    spread = _spread(order, lengths, num_rows)
    if max(sum(lengths[i] for i in row) for row in spread) <= tokens_per_micro_batch:
        rows = spread
    rows += [[] for _ in range(num_rows - len(rows))]
    rows.sort(key=lambda row: -sum(lengths[i] for i in row))
    return [rows[rank::world_size] for rank in range(world_size)]


def refuse_long_sequences(lengths: Sequence[tuple[str, int]], tokens_per_micro_batch: int) -> None:
    """Sequences are never cut.

    Raises:
        TrainingError: naming the sequences that are longer than the budget.
    """
    too_long = [
        f"{name} ({length} tokens)" for name, length in lengths if length > tokens_per_micro_batch
    ]
    if too_long:
        shown = ", ".join(too_long[:10]) + (
            f" and {len(too_long) - 10} more" if len(too_long) > 10 else ""
        )
        raise TrainingError(
            f"{len(too_long)} sequences are longer than training.tokens_per_micro_batch "
            f"({tokens_per_micro_batch}): "
            f"{shown}. Raise it, or filter long sequences out of the dataset."
        )


_NOTHING = Example(
    input_ids=np.zeros(1, np.int32),
    logit_indices=np.zeros(0, np.int64),
    gold_ids=np.zeros(0, np.int64),
    token_ids=np.zeros((1, 0, 1), np.int32),
    logprobs=np.zeros((1, 0, 1), np.float16),
    tail_mass=np.zeros((1, 0), np.float16),
    teacher_weights=np.zeros((1, 0), np.float32),
)


def _first_fit(order: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for i in order:
        for r, left in enumerate(room):
            if lengths[i] <= left:
                break
        else:
            r = len(rows)
            rows.append([])
            room.append(budget)
        rows[r].append(i)
        room[r] -= lengths[i]
    return rows


def _spread(order: list[int], lengths: Sequence[int], num_rows: int) -> list[list[int]]:
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    heap = [(0, r) for r in range(num_rows)]
    for i in order:
        load, r = heapq.heappop(heap)
        rows[r].append(i)
        heapq.heappush(heap, (load + lengths[i], r))
    return rows
