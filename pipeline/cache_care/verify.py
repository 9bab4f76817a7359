"""Verification of a cache: checksums of its shards, and the invariants of every row.

A shard's own checksum finds content that was changed after it was written. The invariants find
content that was written wrongly, or changed together with its checksum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import storage
from pipeline.cache.hidden_states import check_states
from pipeline.cache.index import read_index
from pipeline.cache.manifest import manifest_fits
from pipeline.cache.row_checks import check_row, mass_tolerance
from pipeline.cache.shard import Shard, ShardEntry, open_shard
from pipeline.errors import CacheError, StorageError
from pipeline.fingerprint import digest_ids
from pipeline.layout import CacheLayout
from pipeline.records import CacheRow, HiddenStates, SparseLogprobs, TokenSequence
from pipeline.sequences import SequenceReader

HALF_STEP = 2.0**-10
"""Largest relative difference of two float16 numbers that come from one float32 number or from its
two neighbours.
"""


@dataclass(frozen=True)
class CacheProblem:
    """A problem of a cache file, or of one row in it; `sequence_id` is None for the whole file."""

    path: str
    sequence_id: str | None
    text: str

    def __str__(self) -> str:
        row = f", sequence {self.sequence_id}" if self.sequence_id else ""
        return f"{self.path}{row}: {self.text}"


@dataclass(frozen=True)
class CheckedCache:
    """Result of a pass over all shards of one generation.

    Attributes:
        problems: all problems found.
        num_shards: shard files read.
        num_rows: rows of the sound shards.
        num_compared: rows whose sequence was at hand, so that their alignment was checked too.
    """

    problems: list[CacheProblem]
    num_shards: int
    num_rows: int
    num_compared: int


def index_problem(
    indexed: Sequence[ShardEntry] | None, from_shards: Mapping[str, ShardEntry]
) -> str | None:
    """Reason why an index cannot be used; None when it is right about every shard that it knows.

    Args:
        indexed: entries of the index; None where it cannot be read.
        from_shards: entries that the shards themselves give, by digest.
    """
    if indexed is None:
        return "it cannot be read"
    for entry in indexed:
        if from_shards.get(entry.digest, entry) != entry:
            return f"its entry of shard {entry.digest} contradicts the shard"
    return None


def check_cache(
    cache: CacheLayout,
    fingerprint: str,
    vocabulary: int,
    sequences: SequenceReader,
) -> CheckedCache:
    """Checks every shard and row of a generation, its index and its manifest.

    Args:
        fingerprint: hash of the identity that the shards must name.
        vocabulary: number of token ids; every id must lie below it.
        sequences: sequences at hand; rows of other sequences are checked without their tokens.
    """
    problems, counted, compared = [], Counter(), 0
    sound: dict[str, ShardEntry] = {}
    files = storage.list_files(cache.shards_folder, ".parquet")
    for info in files:
        digest = info.base_name.removesuffix(".parquet")
        path = cache.shard(digest)
        try:
            shard = trusted_shard(cache, digest, fingerprint)
        except (CacheError, StorageError) as error:
            problems.append(CacheProblem(path, None, str(error)))
            continue
        sound[digest] = shard.entry(info.size)
        for row in shard.rows:
            sequence = sequences.get(row.sequence_id)
            counted[row.sequence_id] += 1
            compared += sequence is not None
            problems += [
                CacheProblem(path, row.sequence_id, text)
                for text in row_problems(row, vocabulary, sequence)
            ]
    problems += _derived_problems(cache, {info.base_name for info in files}, sound)
    return CheckedCache(problems, len(files), counted.total(), compared)


def _derived_problems(
    cache: CacheLayout, files: Container[str], sound: Mapping[str, ShardEntry]
) -> Iterator[CacheProblem]:
    """Problems of index and manifest. It is no problem if they lack the newest shards: scoring was
    interrupted, or goes on.
    """
    indexed = read_index(cache)
    if text := index_problem(indexed, sound):
        yield CacheProblem(cache.index, None, text)
    for entry in indexed or ():
        if f"{entry.digest}.parquet" not in files:
            yield CacheProblem(
                cache.shard(entry.digest), None, "it is gone, but the index names it"
            )
    if indexed and not (storage.exists(cache.manifest) and manifest_fits(cache, indexed)):
        yield CacheProblem(cache.manifest, None, "it is missing or disagrees with the index")


def row_problems(row: CacheRow, vocabulary: int, sequence: TokenSequence | None) -> list[str]:
    """All problems of a row; if its arrays have wrong lengths, that problem alone.

    Args:
        vocabulary: number of token ids; every id must lie below it.
        sequence: sequence that the row belongs to; None leaves the alignment unchecked.
    """
    try:
        if isinstance(row, HiddenStates):
            check_states(row)
            return _length_problems(row, sequence)
        check_row(row)
    except CacheError as error:
        return [str(error).removeprefix(f"sequence {row.sequence_id}: ")]
    problems = []
    if len(row.token_ids) and int(row.token_ids.max()) >= vocabulary:
        problems.append(
            f"token id {row.token_ids.max()} is not below the vocabulary size {vocabulary}"
        )
    if not ((row.tail_mass >= 0) & (row.tail_mass <= 1)).all():
        problems.append("a tail mass is not between 0 and 1")
    elif mass_problem := _mass_problem(row):
        problems.append(mass_problem)
    if (row.entropies < 0).any():
        problems.append("an entropy is negative")
    if (len(row.logprobs) and (row.logprobs > 0).any()) or (row.gold_logprobs > 0).any():
        problems.append("a log-probability is above 0")
    positions = np.repeat(np.arange(row.num_positions), row.num_entries)
    if sequence is None:
        return problems
    if lengths := _length_problems(row, sequence):
        return problems + lengths
    return problems + _gold_problems(row, sequence, positions)


def _mass_problem(row: SparseLogprobs) -> str | None:
    """Problem of a row whose exact entries and tail do not have mass 1, or more with draws."""
    positions_H = np.repeat(np.arange(row.num_positions), row.num_entries)[row.is_exact_N]
    exact_P = np.bincount(
        positions_H, weights=np.exp(row.logprobs.astype(np.float64)), minlength=row.num_positions
    )
    mass_P = exact_P + row.tail_mass
    off_P = mass_P - 1 if row.is_drawn else np.abs(mass_P - 1)
    if off_P.max(initial=0.0) <= mass_tolerance(int(row.num_entries.max(initial=0))):
        return None
    j = int(np.argmax(off_P))
    return f"position {j}: exact entries and tail have a mass of {mass_P[j]:.4f}"


def _length_problems(row: CacheRow, sequence: TokenSequence | None) -> list[str]:
    if sequence is None or row.num_positions == sequence.num_positions:
        return []
    return [f"it has {row.num_positions} positions, its sequence has {sequence.num_positions}"]


def _gold_problems(
    row: SparseLogprobs, sequence: TokenSequence, positions: np.ndarray
) -> list[str]:
    """Problems of gold tokens: a gold token among the exact entries must have the same
    log-probability there; one outside of them must not be likelier than the last exact entry. Drawn
    entries tell nothing about it.
    """
    gold_P = row.gold_logprobs.astype(np.float64)
    kept_H = row.logprobs.astype(np.float64)
    positions_H = positions[row.is_exact_N]
    is_gold_H = row.token_ids[row.is_exact_N] == sequence.gold_ids[positions_H].astype(np.uint32)
    slack_H = HALF_STEP * np.maximum(np.abs(kept_H), 1.0)
    wrong_H = is_gold_H & (np.abs(kept_H - gold_P[positions_H]) > slack_H)
    problems = []
    if wrong_H.any():
        j = int(positions_H[np.argmax(wrong_H)])
        entry = float(kept_H[np.argmax(wrong_H)])
        problems.append(
            f"position {j}: the gold token is kept with log-probability {entry:.4f}, but the row "
            f"gives it {gold_P[j]:.4f}"
        )
    holds_gold_P = np.bincount(positions_H, weights=is_gold_H, minlength=row.num_positions) > 0
    is_last_H = np.append(positions_H[1:] != positions_H[:-1], True)[: len(positions_H)]
    above_H = is_last_H & ~holds_gold_P[positions_H] & (gold_P[positions_H] > kept_H + slack_H)
    if above_H.any():
        j = int(positions_H[np.argmax(above_H)])
        problems.append(
            f"position {j}: the gold token is not among the exact entries, but with "
            f"log-probability {gold_P[j]:.4f} it is likelier than the last of them "
            f"({kept_H[np.argmax(above_H)]:.4f})"
        )
    return problems


def trusted_shard(cache: CacheLayout, digest: str, fingerprint: str) -> Shard:
    """Reads a shard and checks its checksum, its identity and its name.

    Raises:
        CacheError: a check fails.
        StorageError: the shard cannot be read.
    """
    path = cache.shard(digest)
    shard = open_shard(path)
    if shard.fingerprint != fingerprint:
        raise CacheError(
            f"{path} was made under identity {shard.fingerprint}, but this cache has {fingerprint}"
        )
    if digest_ids(shard.identifiers) != digest:
        raise CacheError(f"{path} does not hold the sequences that its name promises")
    return shard
