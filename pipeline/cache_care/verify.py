"""Is a cache what it says? Checksums of its shards, and the invariants of every row.

A shard's own checksum finds what was changed after it was written; the invariants find what was
written wrongly, or changed by somebody who wrote a new checksum as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline import storage
from pipeline.cache.hidden_states import check_states
from pipeline.cache.index import manifest_fits, read_index
from pipeline.cache.row_checks import MASS_TOLERANCE, check_row
from pipeline.cache.shard import Shard, ShardEntry, open_shard
from pipeline.errors import CacheError, StorageError
from pipeline.fingerprint import digest_ids
from pipeline.layout import CacheLayout
from pipeline.records import CacheRow, HiddenStates, SparseLogprobs, TokenSequence
from pipeline.sequences import SequenceReader

HALF_STEP = 2.0**-10
"""Largest difference, relative to their size, of two float16 that come from one float32 number or
from its two neighbours.
"""


@dataclass(frozen=True)
class Problem:
    """Something wrong in a cache; `sequence_id` is None where the whole file is concerned."""

    path: str
    sequence_id: str | None
    text: str

    def __str__(self) -> str:
        row = f", sequence {self.sequence_id}" if self.sequence_id else ""
        return f"{self.path}{row}: {self.text}"


@dataclass(frozen=True)
class CheckedCache:
    """What a pass over all shards of one generation found.

    Attributes:
        num_compared: rows whose sequence was at hand, so that their alignment was checked too.
    """

    problems: list[Problem]
    num_shards: int
    num_rows: int
    num_compared: int


def index_problem(
    indexed: Sequence[ShardEntry] | None, found: Mapping[str, ShardEntry]
) -> str | None:
    """Why an index cannot be used; None when it is right about every shard that it knows.

    Args:
        indexed: its entries; None where it cannot be read.
        found: the entries that the shards themselves give, by digest.
    """
    if indexed is None:
        return "it cannot be read"
    for entry in indexed:
        if found.get(entry.digest, entry) != entry:
            return f"describes shard {entry.digest} otherwise than the shard itself"
    return None


def check_cache(
    cache: CacheLayout,
    fingerprint: str,
    vocabulary: int,
    sequences: SequenceReader,
) -> CheckedCache:
    """Checks every shard and row of a generation, its index and its manifest.

    Args:
        fingerprint: of the recipe that the shards must name.
        vocabulary: ids must lie below it.
        sequences: rows of others are checked without their tokens.
    """
    problems, counted, compared = [], Counter(), 0
    found: dict[str, ShardEntry] = {}
    files = storage.list_files(cache.shards_folder, ".parquet")
    for info in files:
        digest = info.base_name.removesuffix(".parquet")
        path = cache.shard(digest)
        try:
            shard = trusted_shard(cache, digest, fingerprint)
        except (CacheError, StorageError) as error:
            problems.append(Problem(path, None, str(error)))
            continue
        found[digest] = shard.entry(info.size)
        for row in shard.rows():
            sequence = sequences.get(row.sequence_id)
            counted[row.sequence_id] += 1
            compared += sequence is not None
            problems += [
                Problem(path, row.sequence_id, text)
                for text in row_problems(row, vocabulary, sequence)
            ]
    problems += _derived_problems(cache, {info.base_name for info in files}, found)
    return CheckedCache(problems, len(files), counted.total(), compared)


def _derived_problems(
    cache: CacheLayout, files: Container[str], found: Mapping[str, ShardEntry]
) -> Iterator[Problem]:
    """What is wrong with index and manifest. That they do not know the newest shards is no problem:
    scoring was interrupted, or goes on.
    """
    indexed = read_index(cache)
    if text := index_problem(indexed, found):
        yield Problem(cache.index, None, text)
    for entry in indexed or ():
        if f"{entry.digest}.parquet" not in files:
            yield Problem(cache.shard(entry.digest), None, "the index names it, and it is gone")
    if indexed and not (storage.exists(cache.manifest) and manifest_fits(cache, indexed)):
        yield Problem(cache.manifest, None, "it does not say what the index says")


def row_problems(row: CacheRow, vocabulary: int, sequence: TokenSequence | None) -> list[str]:
    """What is wrong with a row, all of it; of arrays of wrong lengths only that is said.

    Args:
        sequence: that the row belongs to; None leaves the alignment unchecked.
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
        problems.append(f"token id {row.token_ids.max()} in a vocabulary of {vocabulary}")
    if not ((row.tail_mass >= 0) & (row.tail_mass <= 1)).all():
        problems.append("a tail mass is not between 0 and 1")
    elif wrong := _mass_problem(row):
        problems.append(wrong)
    if (row.entropies < 0).any():
        problems.append("an entropy is negative")
    if (len(row.logprobs) and (row.logprobs > 0).any()) or (row.gold_logprobs > 0).any():
        problems.append("a log-probability is above 0")
    positions = np.repeat(np.arange(row.num_positions), row.num_entries)
    pairs = positions.astype(np.int64) << 32 | row.token_ids.astype(np.int64)
    if len(np.unique(pairs)) < len(pairs):
        problems.append("a position holds a token id twice")
    if sequence is None:
        return problems
    if lengths := _length_problems(row, sequence):
        return problems + lengths
    return problems + _gold_problems(row, sequence, positions)


def _mass_problem(row: SparseLogprobs) -> str | None:
    """Head and tail are the whole distribution, or with draws at most that."""
    positions_H = np.repeat(np.arange(row.num_positions), row.num_entries)[row.head_N]
    head_P = np.bincount(
        positions_H, weights=np.exp(row.logprobs.astype(np.float64)), minlength=row.num_positions
    )
    mass_P = head_P + row.tail_mass
    off_P = mass_P - 1 if row.is_drawn else np.abs(mass_P - 1)
    if off_P.max(initial=0.0) <= MASS_TOLERANCE:
        return None
    j = int(np.argmax(off_P))
    return f"position {j}: head and tail have a mass of {mass_P[j]:.4f}"


def _length_problems(row: CacheRow, sequence: TokenSequence | None) -> list[str]:
    if sequence is None or row.num_positions == sequence.num_positions:
        return []
    return [f"{row.num_positions} positions, its sequence has {sequence.num_positions}"]


def _gold_problems(
    row: SparseLogprobs, sequence: TokenSequence, positions: np.ndarray
) -> list[str]:
    """A gold token in the head has its own log-probability; one outside of it is no likelier than
    the last of the head. Drawn entries say nothing of it.
    """
    gold_P = row.gold_logprobs.astype(np.float64)
    kept_H = row.logprobs.astype(np.float64)
    positions_H = positions[row.head_N]
    is_gold_H = row.token_ids[row.head_N] == sequence.gold_ids[positions_H].astype(np.uint32)
    slack_H = HALF_STEP * np.maximum(np.abs(kept_H), 1.0)
    wrong_H = is_gold_H & (np.abs(kept_H - gold_P[positions_H]) > slack_H)
    problems = []
    if wrong_H.any():
        j = int(positions_H[np.argmax(wrong_H)])
        entry = float(kept_H[np.argmax(wrong_H)])
        problems.append(
            f"position {j}: the gold token is kept with {entry:.4f}, but its log-probability is "
            f"given as {gold_P[j]:.4f}"
        )
    holds_gold_P = np.bincount(positions_H, weights=is_gold_H, minlength=row.num_positions) > 0
    is_last_H = np.append(positions_H[1:] != positions_H[:-1], True)[: len(positions_H)]
    above_H = is_last_H & ~holds_gold_P[positions_H] & (gold_P[positions_H] > kept_H + slack_H)
    if above_H.any():
        j = int(positions_H[np.argmax(above_H)])
        problems.append(
            f"position {j}: the gold token is not among the entries, but with {gold_P[j]:.4f} it "
            f"is likelier than the last of them ({kept_H[np.argmax(above_H)]:.4f})"
        )
    return problems


def trusted_shard(cache: CacheLayout, digest: str, fingerprint: str) -> Shard:
    """Reads a shard; its checksum, its recipe and its name must fit.

    Raises:
        CacheError, StorageError: they do not.
    """
    path = cache.shard(digest)
    shard = open_shard(path)
    if shard.fingerprint != fingerprint:
        raise CacheError(f"{path} was made under the recipe {shard.fingerprint}, not {fingerprint}")
    if digest_ids(shard.identifiers) != digest:
        raise CacheError(f"{path} holds other sequences than its name says")
    return shard
