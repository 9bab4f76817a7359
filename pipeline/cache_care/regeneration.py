"""Repair of a cache, and the next generation that a forced regeneration fills.

Without force a cache is repaired in place: corrupt shards are set aside, and their sequences are
missing from then on. With force the chosen sequences are scored again into the next generation,
which takes over the rows of all other sequences, so that it is complete when its manifest is
written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline import storage
from pipeline.cache.index import load_index, missing_sequences, quarantined, read_index
from pipeline.cache.shard import ShardEntry, open_shard, write_shard
from pipeline.cache_care.verify import index_problem, trusted_shard
from pipeline.errors import CacheError, ConfigError, CorruptFileError
from pipeline.fingerprint import digest_ids
from pipeline.layout import CacheLayout, Layout
from pipeline.messages import closest
from pipeline.records import DatasetEntry
from pipeline.sequences import read_dataset

WHERE: Mapping[str, Callable[[DatasetEntry], Collection[str]]] = {
    "domain": lambda entry: (entry.domain,),
    "split": lambda entry: (entry.split,),
    "generator": lambda entry: entry.authors,
    "prompt_id": lambda entry: (entry.prompt_id,),
    "sequence_id": lambda entry: (entry.sequence_id,),
}
"""The fields of `--where`, with a sequence's values of each."""


@dataclass(frozen=True)
class Damage:
    """Damage of one generation of a cache.

    Attributes:
        corrupt: digest of each corrupt shard, with the reason.
        gone: digests of shards that the index names and that do not exist.
        lost: sequences that only corrupt or missing shards held, as far as the index knows them.
        index: reason why the index cannot be used; None when it can.
    """

    corrupt: dict[str, str] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    lost: frozenset[str] = frozenset()
    index: str | None = None


def parse_where(texts: Sequence[str]) -> dict[str, str]:
    """Parses conditions `field=value` or `field!=value,value`, all of which must hold.

    Returns:
        The value of each field; conditions of the second form have the field and a `!` as key.

    Raises:
        ConfigError: a field is unknown, or a text has another form.
    """
    where = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise ConfigError(f"--where {text!r} has not the form field=value or field!=value")
        if (field := name.removesuffix("!")) not in WHERE:
            raise ConfigError(f"--where has no field {field!r}; {closest(field, WHERE)}")
        where[name] = value
    return where


def matching(entries: Iterable[DatasetEntry], where: Mapping[str, str]) -> list[DatasetEntry]:
    """The sequences for which all conditions hold.

    Raises:
        ConfigError: no sequence has such a value, or the conditions leave no sequence.
    """
    chosen = list(entries)
    for name, text in where.items():
        field = name.removesuffix("!")
        is_negated = name != field
        values = set(text.split(",")) if is_negated else {text}
        known = {value for entry in chosen for value in WHERE[field](entry)}
        for value in values - known:
            raise ConfigError(f"no sequence has {field}={value}; {closest(value, known)}")
        chosen = [e for e in chosen if values.isdisjoint(WHERE[field](e)) == is_negated]
    if not chosen:
        raise ConfigError("no sequence fulfils all conditions of --where; give fewer conditions")
    return chosen


def find_damage(cache: CacheLayout, fingerprint: str) -> Damage:
    """Reads every shard of a generation, once, and its index."""
    corrupt: dict[str, str] = {}
    sound: dict[str, ShardEntry] = {}
    for info in storage.list_files(cache.shards_folder, ".parquet"):
        digest = info.base_name.removesuffix(".parquet")
        try:
            sound[digest] = trusted_shard(cache, digest, fingerprint).entry(info.size)
        except (CacheError, CorruptFileError) as error:  # a storage that fails is no damage
            corrupt[digest] = str(error)
    indexed = read_index(cache)
    known = {entry.digest for entry in indexed or ()}
    held = {i for entry in sound.values() for i in entry.sequence_ids}
    lost = {i for entry in indexed or () for i in entry.sequence_ids} - held
    gone = known - sound.keys() - corrupt.keys()
    return Damage(corrupt, frozenset(gone), frozenset(lost), index_problem(indexed, sound))


def set_aside(cache: CacheLayout, damage: Damage) -> None:
    """Moves corrupt shards out of the generation; their sequences are missing from then on.

    The index names these shards until it is published again, so that an interrupted command, when
    it is repeated, knows the sequences that other runs have lost.
    """
    if damage.index is not None:
        storage.remove(cache.index)
    for digest in damage.corrupt:
        storage.move(cache.shard(digest), storage.join(cache.aside, f"{digest}.parquet"))


def entries_of(layout: Layout, sequence_ids: Collection[str]) -> list[DatasetEntry]:
    """The entries of sequences, each once, from all datasets below the root."""
    entries: dict[str, DatasetEntry] = {}
    for info in storage.list_files(layout.datasets_folder, ".parquet"):
        if len(entries) == len(sequence_ids):
            break
        for entry in read_dataset(layout, info.base_name.removesuffix(".parquet")):
            if entry.sequence_id in sequence_ids:
                entries.setdefault(entry.sequence_id, entry)
    return list(entries.values())


def sequences_to_score(
    layout: Layout, cache: CacheLayout, entries: Sequence[DatasetEntry], lost: Collection[str]
) -> list[DatasetEntry]:
    """The sequences of `entries` without a row, and the lost sequences of other runs.

    Args:
        lost: sequences of the shards that are gone or set aside.
    """
    elsewhere = set(lost) - {entry.sequence_id for entry in entries}
    others = entries_of(layout, elsewhere) if elsewhere else []
    return missing_sequences([*entries, *others], cache)


def take_over(
    source: CacheLayout, target: CacheLayout, rescored: Collection[str], fingerprint: str
) -> int:
    """Gives the next generation all rows and quarantine notes, except for the sequences that are
    scored again.

    A shard without such sequences keeps its name: it becomes a hard link locally, a copy in an
    object store. From any other shard the remaining rows become a new shard. It is harmless to
    repeat this.

    Returns:
        The number of shards taken over.

    Raises:
        CacheError: a shard of the source is corrupt.
        StorageError: a shard cannot be read or written.
    """
    taken = 0
    for entry in load_index(source):
        kept = [identifier for identifier in entry.sequence_ids if identifier not in rescored]
        if not kept:
            continue
        path = target.shard(digest_ids(kept))
        taken += 1
        if storage.exists(path):
            continue
        if len(kept) == len(entry.sequence_ids):
            storage.link_or_copy(source.shard(entry.digest), path)
        else:
            rows = {row.sequence_id: row for row in open_shard(source.shard(entry.digest)).rows}
            remaining = [rows[identifier] for identifier in kept]
            write_shard(path, remaining, fingerprint, entry.origin)
    if taken and storage.exists(source.canary):  # rows of both engines will lie side by side
        storage.link_or_copy(source.canary, target.canary)
    for identifier, error in quarantined(source).items():
        if identifier not in rescored:
            storage.write_json(
                target.quarantine_record(identifier), {"sequence_id": identifier, "error": error}
            )
    return taken


def retry_quarantined(target: CacheLayout, rescored: Collection[str]) -> None:
    """Removes the quarantine notes of an interrupted regeneration about these sequences."""
    for identifier in quarantined(target).keys() & set(rescored):
        storage.remove(target.quarantine_record(identifier))


def check_complete(source: CacheLayout, target: CacheLayout) -> None:
    """Checks that a generation has a row for every sequence of the generation before it.

    Raises:
        CacheError: a sequence has no row, for instance because it could not be scored again.
    """
    before = {identifier for entry in load_index(source) for identifier in entry.sequence_ids}
    after = {identifier for entry in load_index(target) for identifier in entry.sequence_ids}
    if not (lost := before - after):
        return
    refused = quarantined(target)
    named = [f"{identifier} ({refused[identifier]})" for identifier in lost & refused.keys()]
    reason = f"; could not be scored again: {', '.join(sorted(named)[:3])}" if named else ""
    raise CacheError(
        f"{target.shards_folder} lacks {len(lost)} of the {len(before)} sequences of generation "
        f"{source.generation}, which stays the current one{reason}: rerun the command to try them "
        "again; or discard the new generation with `polystill cache gc CONFIG --unfinished` and "
        "exclude them with `--where sequence_id!=ID`, which keeps the old row of a sequence"
    )
