"""The teachers' hidden states of a micro-batch, from their caches.

Legend: P positions of a micro-batch, S its sequences, L stored layers, D stored dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.cache.hidden_states import position_bytes
from pipeline.cache.kinds import hidden_states_of
from pipeline.cache.reader import CacheReader, open_hidden_states
from pipeline.errors import CacheError, TrainingError
from pipeline.layout import CacheLayout
from pipeline.records import DatasetEntry, HiddenStates

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackedHiddenStates:
    """The arrays of a `HiddenStatesBatch`.

    Attributes:
        states: uint16[P, L, D] by teacher, the bits of bfloat16; 0 where the teacher has none.
        covered: whether a teacher has hidden states of each sequence, by teacher.
        lengths: number of positions of every sequence.
        groups: group of every sequence; sequences of a group are compared with one another.
    """

    states: dict[str, np.ndarray]
    covered: dict[str, list[bool]]
    lengths: list[int]
    groups: list[int]


class TeacherHiddenStates:
    """The opened caches of the teachers' hidden states."""

    def __init__(
        self, caches: Mapping[str, CacheLayout], teachers: Sequence[str], used: list[DatasetEntry]
    ) -> None:
        """Opens the caches of the teachers.

        Args:
            caches: caches of the run by name, also those of distributions.
            teachers: names of the teachers whose hidden states a loss needs.
            used: entries of the sequences to be trained on.

        Raises:
            TrainingError: a teacher has no cache, or hidden states of none of the sequences.
            CacheError: a cache is corrupt.
        """
        self._readers: dict[str, CacheReader[HiddenStates]] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        for teacher in teachers:
            name = hidden_states_of(teacher)
            if name not in caches:
                raise TrainingError(
                    f"the cache {name} is missing, but a loss needs the hidden states of "
                    f"{teacher}: run the score stage first"
                )
            reader = self._readers[teacher] = open_hidden_states(caches[name])
            lacking = [e.sequence_id for e in used if e.sequence_id not in reader]
            if len(lacking) == len(used):
                raise TrainingError(
                    f"{caches[name].shards_folder} has hidden states of none of the {len(used)} "
                    "sequences: run the score stage first"
                )
            if lacking:
                logger.warning(
                    "%s has no hidden states of %d of %d sequences: losses on its hidden states "
                    "are 0 there",
                    teacher,
                    len(lacking),
                    len(used),
                )
            row = reader.row(next(e.sequence_id for e in used if e.sequence_id in reader))
            assert row is not None, "the reader has it"
            self._shapes[teacher] = row.states.shape[1], row.states.shape[2]

    @property
    def widths(self) -> dict[str, int]:
        """Stored dimensions D, by teacher."""
        return {teacher: width for teacher, (_, width) in self._shapes.items()}

    @property
    def position_bytes(self) -> dict[str, int]:
        """Bytes that the hidden states of a position take, by teacher."""
        return {teacher: position_bytes(*shape) for teacher, shape in self._shapes.items()}

    def batch(
        self, entries: Sequence[DatasetEntry], groups: Sequence[int]
    ) -> PackedHiddenStates | None:
        """The hidden states of a micro-batch of these sequences; None if no loss needs any.

        Args:
            groups: group of each sequence.

        Raises:
            CacheError: a row has another number of positions than its sequence.
        """
        if not self._readers:
            return None
        lengths = [entry.num_positions for entry in entries]
        edges = np.cumsum([0, *lengths])
        states: dict[str, np.ndarray] = {}
        covered: dict[str, list[bool]] = {}
        for teacher, reader in self._readers.items():
            states_PLD = np.zeros((edges[-1], *self._shapes[teacher]), np.uint16)
            covered[teacher] = []
            for entry, start, stop in zip(entries, edges[:-1], edges[1:], strict=True):
                row = reader.row(entry.sequence_id)
                covered[teacher].append(row is not None)
                if row is None:
                    continue
                if row.num_positions != entry.num_positions:
                    raise CacheError(
                        f"the cache {hidden_states_of(teacher)} holds {row.num_positions} "
                        f"positions of sequence {entry.sequence_id}, but the sequence has "
                        f"{entry.num_positions}: check the cache with "
                        "`polystill cache verify CONFIG`"
                    )
                states_PLD[start:stop] = row.states
            states[teacher] = states_PLD
        return PackedHiddenStates(states, covered, lengths, list(groups))
