"""Combined sequences in memory, from the dataset, its sequence shards and the teachers' caches.

    entries -> examples (here) -> order and batches (`batches.py`) -> packed rows (`packing.py`)

Legend: T tokens of a sequence, P its positions, K entries, M teachers of positive weight.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.cache.reader import CacheReader, open_cache
from pipeline.cache.selection import probabilities, without_padding
from pipeline.combine.product import ProductTargets, product_of
from pipeline.combine.weights import combine_targets, required_teachers
from pipeline.config.combine import CombineConfig
from pipeline.errors import TrainingError
from pipeline.layout import CacheLayout, Layout
from pipeline.records import CombinedTargets, DatasetEntry, SparseLogprobs, TokenSequence
from pipeline.sequences import SequenceShards

SEQUENCE_SHARDS_KEPT = 64
EXAMPLE_BYTES_KEPT = 2**30
"""Combined sequences kept in memory by one worker; small data is combined once and then only
packed.
"""


@dataclass(frozen=True)
class Example:
    """One sequence with its combined targets, without the teachers of weight 0. A product of
    teachers stands as one teacher of weight 1.

    Attributes:
        input_ids: int32[T].
        logit_indices: int64[P], `i_j - 1`: the index whose logits are trained against position j.
        gold_ids: int64[P].
        token_ids: int32[M, P, K], padded with 0.
        logprobs: float16[M, P, K], padded with -inf; float32 for a product, and if any are
            estimates, which float16 would shift.
        tail_mass: float16[M, P]; 0 for estimates, which have no bucket; float32 for a product.
        teacher_weights: float32[M, P].
        is_estimate: whether a teacher's entries are an estimate by draws, unbiased only in losses
            that are linear in p.
    """

    input_ids: np.ndarray
    logit_indices: np.ndarray
    gold_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray
    tail_mass: np.ndarray
    teacher_weights: np.ndarray
    is_estimate: bool = False

    @property
    def num_bytes(self) -> int:
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, np.ndarray))


class Examples:
    """Random access to combined sequences; keeps as many as fit into `EXAMPLE_BYTES_KEPT`."""

    def __init__(
        self,
        layout: Layout,
        readers: dict[str, CacheReader],
        teachers: list[str],
        combine: CombineConfig | None,
        vocabulary: int,
    ) -> None:
        """Opens nothing; the `readers` are open.

        Args:
            teachers: names of the scoring teachers, in the config's order.
            combine: None leaves the teachers out, for losses on the text alone.
            vocabulary: rows of the student's LM head.
        """
        self._readers, self._teachers = readers, teachers
        self._combine, self._vocabulary = combine, vocabulary
        self._sequences = SequenceShards(layout, SEQUENCE_SHARDS_KEPT)
        self._kept: OrderedDict[str, Example] = OrderedDict()
        self._num_bytes = 0

    def sequence(self, entry: DatasetEntry) -> TokenSequence:
        """The sequence of an entry, from its shard."""
        sequence = self._sequences.get(entry.shard, entry.sequence_id)
        assert sequence is not None, f"{entry.shard} does not hold {entry.sequence_id}"
        return sequence

    def __getitem__(self, entry: DatasetEntry) -> Example:
        """The combined sequence of an entry.

        Raises:
            CacheError: no teacher of positive weight has scored the sequence.
            TrainingError: it holds a token id outside the student's vocabulary.
        """
        if entry.sequence_id in self._kept:
            self._kept.move_to_end(entry.sequence_id)
            return self._kept[entry.sequence_id]
        example = self._build(self.sequence(entry))
        highest = max(int(example.input_ids.max()), int(example.token_ids.max(initial=0)))
        if highest >= self._vocabulary:
            raise TrainingError(
                f"sequence {entry.sequence_id} holds token id {highest}, but the student's LM head "
                f"has {self._vocabulary} rows, so the teachers' vocabulary is larger than the "
                f"student's: choose a student with at least {highest + 1} rows"
            )
        self._kept[entry.sequence_id] = example
        self._num_bytes += example.num_bytes
        while self._num_bytes > EXAMPLE_BYTES_KEPT and len(self._kept) > 1:
            self._num_bytes -= self._kept.popitem(last=False)[1].num_bytes
        return example

    def _row(self, name: str, sequence_id: str) -> SparseLogprobs | None:
        """A teacher's row; what it holds for ids beyond the student's rows is part of its tail."""
        row = self._readers[name].row(sequence_id)
        return None if row is None else without_padding(row, self._vocabulary)

    def _build(self, sequence: TokenSequence) -> Example:
        if self._combine is None:
            return example_of(
                CombinedTargets(sequence, (), np.zeros((0, sequence.num_positions), np.float32))
            )
        rows = tuple(
            self._row(name, sequence.sequence_id) if name in self._readers else None
            for name in self._teachers
        )
        combined = combine_targets(sequence, rows, self._teachers, self._combine)
        if self._combine.method == "product":
            product = product_of(combined, self._vocabulary, self._combine.min_tail)
            return example_of_product(sequence, product)
        return example_of(combined)


def open_examples(
    layout: Layout,
    caches: dict[str, CacheLayout],
    teachers: list[str],
    combine: CombineConfig | None,
    entries: Sequence[DatasetEntry],
    vocabulary: int,
) -> Examples:
    """Opens the caches of the teachers that can have a weight in the domains of `entries`, and no
    other caches.

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
            f"the caches of the teachers {', '.join(missing)} are missing, but combine.weights "
            "gives these teachers a weight: run the score stage first"
        )
    return Examples(
        layout, {name: open_cache(caches[name]) for name in required}, teachers, combine, vocabulary
    )


def example_of(combined: CombinedTargets) -> Example:
    """Pads the ragged rows of the teachers that have a weight in this sequence."""
    sequence, num_positions = combined.sequence, combined.sequence.num_positions
    used = [
        (w_P, row)
        for w_P, row in zip(combined.teacher_weights, combined.rows, strict=True)
        if row is not None and w_P.any()
    ]
    num_entries = max((int(row.num_entries.max()) for _, row in used), default=1)
    shape = (len(used), num_positions, num_entries)
    is_estimate = any(row.is_drawn for _, row in used)
    token_ids_MPK = np.zeros(shape, np.int32)
    logprobs_MPK = np.full(shape, -np.inf, np.float32 if is_estimate else np.float16)
    tail_MP = np.zeros(shape[:2], np.float16)
    for m, (_, row) in enumerate(used):
        kept_PK = np.arange(num_entries) < row.num_entries[:, None]
        token_ids_MPK[m][kept_PK] = row.token_ids
        if row.is_drawn:
            # ids that were not drawn lie in no bucket: the student's bucket would hold captured ids
            with np.errstate(divide="ignore"):
                logprobs_MPK[m][kept_PK] = np.log(probabilities(row))
        else:
            logprobs_MPK[m][kept_PK] = row.logprobs
            tail_MP[m] = row.tail_mass
    return Example(
        input_ids=sequence.input_ids,
        logit_indices=sequence.position_indices - 1,
        gold_ids=sequence.gold_ids.astype(np.int64),
        token_ids=token_ids_MPK,
        logprobs=logprobs_MPK,
        tail_mass=tail_MP,
        teacher_weights=np.array([w_P for w_P, _ in used], np.float32).reshape(shape[:2]),
        is_estimate=is_estimate,
    )


def example_of_product(sequence: TokenSequence, product: ProductTargets) -> Example:
    """Pads the union of the teachers' ids."""
    num_positions = sequence.num_positions
    kept_PK = np.arange(int(product.num_entries.max())) < product.num_entries[:, None]
    token_ids_PK = np.zeros(kept_PK.shape, np.int32)
    logprobs_PK = np.full(kept_PK.shape, -np.inf, np.float32)
    token_ids_PK[kept_PK], logprobs_PK[kept_PK] = product.token_ids, product.logprobs
    return Example(
        input_ids=sequence.input_ids,
        logit_indices=sequence.position_indices - 1,
        gold_ids=sequence.gold_ids.astype(np.int64),
        token_ids=token_ids_PK[None],
        logprobs=logprobs_PK[None],
        tail_mass=product.tail_mass.astype(np.float32)[None],
        teacher_weights=np.ones((1, num_positions), np.float32),
    )
