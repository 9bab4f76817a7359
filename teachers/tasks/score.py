"""Cache rows: the teacher-forced distributions and hidden states of sequences, encoded and written
in the teacher's actor.

Tasks are planned from the dataset: sequences without a row are grouped by their sequence shard and
by the caches that lack them, and a group is cut if its rows would take too many bytes. Each group
becomes one shard of each of these caches, in one pass. Selection, projection and encoding run
inside the teacher's actor, so that only index entries travel.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline import storage
from pipeline.cache.index import missing_sequences
from pipeline.cache.projection import HiddenStatesRule
from pipeline.cache.row_checks import ID_BITS
from pipeline.cache.selection import select
from pipeline.cache.shard import ShardEntry, write_shard
from pipeline.config.scoring import Selection
from pipeline.errors import TeacherError
from pipeline.fingerprint import digest_ids
from pipeline.layout import CacheLayout
from pipeline.records import CacheRow, DatasetEntry, TokenSequence
from pipeline.sequences import read_sequences
from teachers.protocol import CapturedRows, ScoringRequest, Teacher
from teachers.tasks.items import halves_of
from teachers.tasks.siblings import Siblings

SEQUENCES_IN_FLIGHT = 256
ORIGIN = (
    "engine",
    "engine_version",
    "model_runner",
    "capture",
    "capture_reason",
    "prefix_sharing",
    "hidden_layers",
    "dtype",
    "quantization",
    "device",
    "num_devices",
    "api",
    "url",
    "served_model",
    "max_logprobs",
)
"""Metadata of the teacher that a shard keeps: all that can change its numbers, and nothing that
depends on the Ray job.
"""
TASK_BYTES = 2**29
"""Largest size of a task's rows. All rows are in memory until the task is done, several tasks are
in flight, and a column of one shard can hold 2 GiB.
"""


@dataclass(frozen=True)
class ScoredShard:
    """Report of a finished task to the driver.

    Attributes:
        entries: index entries of the shards written, by the name of the cache.
        num_tokens: number of tokens of all sequences.
        num_cached_tokens: number of these tokens that came from the engine's prefix cache.
        num_rescored: number of sequences that were scored a second time without the prefix cache,
            because their rows were incomplete.
    """

    entries: Mapping[str, ShardEntry]
    num_tokens: int
    num_cached_tokens: int
    num_rescored: int


@dataclass(frozen=True)
class CacheOutput:
    """One cache that a teacher fills.

    Attributes:
        name: name of the cache, see `pipeline/cache/kinds.py`.
        cache: layout of the cache.
        fingerprint: digest of the cache's identity.
        rule: selection of the distributions, or rule for the hidden states, that is stored.
        position_bytes: largest size of a position.
        vocabulary: number of ids that the tokenizer has, if the teacher has others as well.
        num_rows: number of ids that the teacher has, the rows of its LM head.
    """

    name: str
    cache: CacheLayout
    fingerprint: str
    rule: Selection | HiddenStatesRule
    position_bytes: int
    vocabulary: int | None = None
    num_rows: int = 1 << ID_BITS

    @property
    def holds_hidden_states(self) -> bool:
        return isinstance(self.rule, HiddenStatesRule)

    def row(self, sequence: TokenSequence, captured: CapturedRows, rows_P: np.ndarray) -> CacheRow:
        """Makes the row that the cache stores for a sequence.

        Args:
            sequence: the sequence.
            captured: rows that the teacher returned.
            rows_P: index of the captured row of every position.
        """
        if isinstance(self.rule, HiddenStatesRule):
            assert captured.hidden_states is not None, "hidden states were asked for"
            return self.rule.row(sequence.sequence_id, captured.hidden_states[rows_P])
        return select(
            sequence.sequence_id,
            captured.token_ids[rows_P],
            captured.logprobs[rows_P],
            captured.gold_logprobs[rows_P],
            self.rule,
            teacher=self.fingerprint,
            vocabulary=self.vocabulary,
            num_rows=self.num_rows,
        )


@dataclass(frozen=True)
class ScoreTask:
    """Sequences of one sequence shard that all outputs lack."""

    sequence_shard: str
    sequence_ids: tuple[str, ...]
    outputs: tuple[CacheOutput, ...]

    def __len__(self) -> int:
        return len(self.sequence_ids)

    @property
    def label(self) -> str:
        return f"shard {digest_ids(self.sequence_ids)[:8]} ({len(self)} sequences)"

    def halves(self) -> tuple[ScoreTask, ScoreTask]:
        """The same work in two shards."""
        first, second = halves_of(self.sequence_ids)
        return replace(self, sequence_ids=first), replace(self, sequence_ids=second)

    def quarantine(self, error: str) -> None:
        """Notes that the sequences cannot be scored, so that they are not tried again."""
        for output in self.outputs:
            for identifier in self.sequence_ids:
                storage.write_json(
                    output.cache.quarantine_record(identifier),
                    {"sequence_id": identifier, "error": error},
                )

    async def run(self, teacher: Teacher) -> ScoredShard:
        """Scores the sequences and writes their shards.

        Raises:
            TeacherError: a sequence is missing from its shard, is too long for the engine, or comes
                back with broken rows.
        """
        held = {sequence.sequence_id: sequence for sequence in read_sequences(self.sequence_shard)}
        missing = [identifier for identifier in self.sequence_ids if identifier not in held]
        if missing:
            raise TeacherError(
                f"{self.sequence_shard} lacks sequences that the dataset places there, "
                f"{len(missing)} in all, first {missing[:3]}: remove the file, so that "
                "`polystill run` answers their prompts again"
            )
        sequences = siblings_together([held[identifier] for identifier in self.sequence_ids])
        slots = asyncio.Semaphore(SEQUENCES_IN_FLIGHT)
        families = defaultdict(Siblings)
        scored = await asyncio.gather(
            *(self._score(teacher, s, families[s.prompt_id], slots) for s in sequences)
        )
        by_id = {s.sequence_id: rows for s, rows in zip(sequences, scored, strict=True)}
        in_order = [by_id[identifier] for identifier in self.sequence_ids]
        entries, metadata = {}, teacher.metadata()
        origin = {key: metadata[key] for key in ORIGIN if key in metadata}
        for i, output in enumerate(self.outputs):
            path = output.cache.shard(digest_ids(self.sequence_ids))
            rows = [each.rows[i] for each in in_order]
            entries[output.name] = await asyncio.to_thread(
                write_shard, path, rows, output.fingerprint, origin
            )
        return ScoredShard(
            entries,
            num_tokens=sum(len(sequence.input_ids) for sequence in sequences),
            num_cached_tokens=sum(each.num_cached_tokens for each in scored),
            num_rescored=sum(each.is_rescored for each in scored),
        )

    async def _score(
        self,
        teacher: Teacher,
        sequence: TokenSequence,
        siblings: Siblings,
        slots: asyncio.Semaphore,
    ) -> _Scored:
        positions = sequence.position_indices
        first = int(positions[0])
        request = ScoringRequest(
            sequence.input_ids.tolist(),
            first,
            distributions=any(not output.holds_hidden_states for output in self.outputs),
            hidden_states=any(output.holds_hidden_states for output in self.outputs),
        )
        async with slots:
            captured = await siblings.score(teacher, request)
        rows = tuple(output.row(sequence, captured, positions - first) for output in self.outputs)
        return _Scored(rows, captured.num_cached_tokens, captured.is_rescored)


@dataclass(frozen=True)
class _Scored:
    rows: tuple[CacheRow, ...]
    num_cached_tokens: int
    is_rescored: bool


def siblings_together(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """Orders sequences so that those of one prompt follow each other, while the engine's prefix
    cache holds the prompt.
    """
    groups: dict[str, list[TokenSequence]] = {}
    for sequence in sequences:
        groups.setdefault(sequence.prompt_id, []).append(sequence)
    return [sequence for group in groups.values() for sequence in group]


def plan_scoring(
    root: str, outputs: Sequence[tuple[CacheOutput, Sequence[DatasetEntry]]]
) -> list[ScoreTask]:
    """Tasks for the sequences that one teacher's caches lack and have not quarantined, by sequence
    shard. A sequence that several caches lack is captured in one pass. The rows of a task take at
    most `TASK_BYTES`, unless a single sequence takes more.

    Args:
        root: storage root, to which the shards of the entries are relative.
        outputs: caches, each with the sequences that it must hold.
    """
    lacking: dict[str, tuple[DatasetEntry, list[str]]] = {}
    for output, entries in outputs:
        for entry in missing_sequences(entries, output.cache):
            lacking.setdefault(entry.sequence_id, (entry, []))[1].append(output.name)
    groups: dict[tuple[str, tuple[str, ...]], list[DatasetEntry]] = {}
    for entry, names in lacking.values():
        groups.setdefault((entry.shard, tuple(names)), []).append(entry)
    by_name = {output.name: output for output, _ in outputs}
    tasks = []
    for (shard, names), members in groups.items():
        wanted = tuple(by_name[name] for name in names)
        most = TASK_BYTES // sum(output.position_bytes for output in wanted)
        for group in groups_of_positions(members, most):
            identifiers = tuple(entry.sequence_id for entry in group)
            tasks.append(ScoreTask(storage.join(root, shard), identifiers, wanted))
    return tasks


def groups_of_positions(entries: Sequence[DatasetEntry], most: int) -> list[list[DatasetEntry]]:
    """Cuts entries into groups of at most `most` positions each; a longer entry stands alone."""
    groups: list[list[DatasetEntry]] = []
    room = 0
    for entry in entries:
        if not groups or entry.num_positions > room:
            groups.append([])
            room = most
        groups[-1].append(entry)
        room -= entry.num_positions
    return groups
