"""Scoring: every sequence's teacher-forced distributions, encoded and written where captured.

Work is planned from the dataset: sequences without a row in the cache, grouped by the sequence
shard that holds them; each group becomes one cache shard. Selection and encoding run inside the
teacher's actor, so that nothing but a shard's index entry travels.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.cache import ShardEntry, write_shard
from pipeline.cache_index import missing_sequences
from pipeline.config_targets import Selection
from pipeline.datasets import DatasetEntry, read_sequences
from pipeline.errors import TeacherError
from pipeline.fingerprint import digest_ids
from pipeline.layout import CacheLayout
from pipeline.records import SparseLogprobs, TokenSequence
from pipeline.selection import select
from teachers.siblings import Siblings

if TYPE_CHECKING:
    from teachers.vllm_teacher import VllmTeacher

SEQUENCES_IN_FLIGHT = 256


@dataclass(frozen=True)
class ScoredShard:
    """What a finished task reports to the driver.

    Attributes:
        num_cached_tokens: of `num_tokens`, those that came from the engine's prefix cache.
        num_rescored: sequences that were scored again without it, for their rows were incomplete.
    """

    entry: ShardEntry
    num_tokens: int
    num_cached_tokens: int
    num_rescored: int
    seconds: float


@dataclass(frozen=True)
class ScoringTask:
    """The sequences of one sequence shard that one teacher has not scored yet."""

    cache: CacheLayout
    fingerprint: str
    sequence_shard: str
    sequence_ids: tuple[str, ...]
    selection: Selection

    def __len__(self) -> int:
        return len(self.sequence_ids)

    @property
    def label(self) -> str:
        return f"shard {digest_ids(self.sequence_ids)[:8]} ({len(self)} sequences)"

    def halves(self) -> tuple[ScoringTask, ScoringTask]:
        """The same work in two shards."""
        middle = len(self) // 2
        return (
            replace(self, sequence_ids=self.sequence_ids[:middle]),
            replace(self, sequence_ids=self.sequence_ids[middle:]),
        )

    def quarantine(self, error: str) -> None:
        """Records that the sequences cannot be scored, so that they are not tried again."""
        for identifier in self.sequence_ids:
            storage.write_json(
                storage.join(self.cache.quarantine, f"{identifier}.json"),
                {"sequence_id": identifier, "error": error},
            )

    async def run(self, teacher: VllmTeacher) -> ScoredShard:
        """Scores the sequences and writes their shard.

        Raises:
            TeacherError: a sequence is missing from its shard, too long for the engine, or comes
                back broken.
        """
        started = time.monotonic()
        held = {sequence.sequence_id: sequence for sequence in read_sequences(self.sequence_shard)}
        missing = [identifier for identifier in self.sequence_ids if identifier not in held]
        if missing:
            raise TeacherError(
                f"{self.sequence_shard} lacks sequences {missing[:3]} ({len(missing)} in all)"
            )
        sequences = siblings_together([held[identifier] for identifier in self.sequence_ids])
        slots = asyncio.Semaphore(SEQUENCES_IN_FLIGHT)
        families = defaultdict(Siblings)
        scored = await asyncio.gather(
            *(self._score(teacher, each, families[each.prompt_id], slots) for each in sequences)
        )
        rows = {each.row.sequence_id: each.row for each in scored}
        path = self.cache.shard(digest_ids(self.sequence_ids))
        in_order = [rows[identifier] for identifier in self.sequence_ids]
        entry = await asyncio.to_thread(write_shard, path, in_order, self.fingerprint)
        return ScoredShard(
            entry,
            num_tokens=sum(len(sequence.input_ids) for sequence in sequences),
            num_cached_tokens=sum(each.num_cached_tokens for each in scored),
            num_rescored=sum(each.is_rescored for each in scored),
            seconds=time.monotonic() - started,
        )

    async def _score(
        self,
        teacher: VllmTeacher,
        sequence: TokenSequence,
        siblings: Siblings,
        slots: asyncio.Semaphore,
    ) -> _Scored:
        positions = sequence.position_indices
        first = int(positions[0])
        async with slots:
            captured = await siblings.score(teacher, sequence.input_ids, first)
        rows = positions - first
        kept = select(
            sequence.sequence_id,
            captured.token_ids[rows],
            captured.logprobs[rows],
            captured.gold_logprobs[rows],
            self.selection,
            teacher=self.fingerprint,
        )
        return _Scored(kept, captured.num_cached_tokens, captured.is_rescored)


@dataclass(frozen=True)
class _Scored:
    row: SparseLogprobs
    num_cached_tokens: int
    is_rescored: bool


def siblings_together(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Sequences of one prompt one after another, so that its prefix is still in the cache."""
    groups: dict[str, list[TokenSequence]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.prompt_id, []).append(sequence)
    return [sequence for group in groups.values() for sequence in group]


def plan_scoring(
    root: str,
    entries: Sequence[DatasetEntry],
    cache: CacheLayout,
    fingerprint: str,
    selection: Selection,
) -> list[ScoringTask]:
    """The sequences that a cache has neither scored nor quarantined, by sequence shard.

    Args:
        root: the storage root, to which the entries' shards are relative.
    """
    groups: dict[str, list[str]] = {}
    for entry in missing_sequences(entries, cache):
        groups.setdefault(entry.shard, []).append(entry.sequence_id)
    return [
        ScoringTask(cache, fingerprint, storage.join(root, shard), tuple(identifiers), selection)
        for shard, identifiers in groups.items()
    ]
