"""What a cache needs to be whole again, and the next generation that a forced regeneration fills.

Without force a cache is mended in place: corrupt shards are set aside, and whatever has no row is
missing. With force the chosen sequences are scored anew into the next generation, which takes over
the rows of all others, so that it is whole when its manifest is written.
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
    "generator": lambda entry: entry.generators,
    "prompt_id": lambda entry: (entry.prompt_id,),
    "sequence_id": lambda entry: (entry.sequence_id,),
}


@dataclass(frozen=True)
class Damage:
    """What is wrong in one generation of a cache.

    Attributes:
        corrupt: shards by digest, with the reason.
        gone: digests of shards that the index names and that do not exist.
        lost: the sequences that only these shards held, as far as the index knows them.
        index: why the index cannot be used; None when it can.
    """

    corrupt: dict[str, str] = field(default_factory=dict)
    gone: frozenset[str] = frozenset()
    lost: frozenset[str] = frozenset()
    index: str | None = None


def parse_where(texts: Sequence[str]) -> dict[str, str]:
    """Conditions `field=value` or `field!=value,value`, all of which must hold.

    Returns:
        The values by field; those of the second form by the field and a `!`.

    Raises:
        ConfigError: a field is unknown, or a text is of another form.
    """
    where = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not value:
            raise ConfigError(f"--where {text!r} is not of the form field=value or field!=value")
        if (field := name.removesuffix("!")) not in WHERE:
            raise ConfigError(f"--where knows no field {field!r}; {closest(field, WHERE)}")
        where[name] = value
    return where


def matching(entries: Iterable[DatasetEntry], where: Mapping[str, str]) -> list[DatasetEntry]:
    """The sequences for which all conditions hold.

    Raises:
        ConfigError: no sequence has such a value, or all sequences are left out.
    """
    found = list(entries)
    for name, value in where.items():
        field = name.removesuffix("!")
        wanted = set(value.split(",")) if name != field else {value}
        known = {each for entry in found for each in WHERE[field](entry)}
        for each in wanted - known:
            raise ConfigError(f"no sequence has {field}={each}; {closest(each, known)}")
        found = [e for e in found if wanted.isdisjoint(WHERE[field](e)) == (name != field)]
    if not found:
        raise ConfigError("no sequence fulfils all conditions of --where")
    return found


def find_damage(cache: CacheLayout, fingerprint: str) -> Damage:
    """Reads every shard of a generation, once, and its index."""
    corrupt: dict[str, str] = {}
    found: dict[str, ShardEntry] = {}
    for info in storage.list_files(cache.shards_folder, ".parquet"):
        digest = info.base_name.removesuffix(".parquet")
        try:
            found[digest] = trusted_shard(cache, digest, fingerprint).entry(info.size)
        except (CacheError, CorruptFileError) as error:  # not where the storage does not answer
            corrupt[digest] = str(error)
    indexed = read_index(cache)
    known = {entry.digest for entry in indexed or ()}
    held = {i for entry in found.values() for i in entry.sequence_ids}
    lost = {i for entry in indexed or () for i in entry.sequence_ids} - held
    gone = known - found.keys() - corrupt.keys()
    return Damage(corrupt, frozenset(gone), frozenset(lost), index_problem(indexed, found))


def set_aside(cache: CacheLayout, damage: Damage) -> None:
    """Moves corrupt shards out of the generation; what they held is missing from now on.

    The index goes on naming them until it is published again: so an interrupted command knows,
    when it is repeated, what other runs have lost.
    """
    if damage.index is not None:
        storage.remove(cache.index)
    for digest in damage.corrupt:
        storage.move(cache.shard(digest), storage.join(cache.aside, f"{digest}.parquet"))


def entries_of(layout: Layout, sequence_ids: Collection[str]) -> list[DatasetEntry]:
    """The entries of sequences in whatever dataset below the root names them; each once."""
    found: dict[str, DatasetEntry] = {}
    for info in storage.list_files(layout.datasets_folder, ".parquet"):
        if len(found) == len(sequence_ids):
            break
        for entry in read_dataset(layout, info.base_name.removesuffix(".parquet")):
            if entry.sequence_id in sequence_ids:
                found.setdefault(entry.sequence_id, entry)
    return list(found.values())


def lacking(
    layout: Layout, cache: CacheLayout, entries: Sequence[DatasetEntry], lost: Collection[str]
) -> list[DatasetEntry]:
    """The sequences to score: those of `entries` without a row, and lost ones of other runs.

    Args:
        lost: of the shards that are gone or set aside.
    """
    elsewhere = set(lost) - {entry.sequence_id for entry in entries}
    others = entries_of(layout, elsewhere) if elsewhere else []
    return missing_sequences([*entries, *others], cache)


def take_over(
    source: CacheLayout, target: CacheLayout, anew: Collection[str], fingerprint: str
) -> int:
    """Gives the next generation all rows and quarantine records but those of sequences scored anew.

    A shard that holds none of these keeps its name: a hard link locally, a copy in an object store.
    Of the others the remaining rows become a shard of their own. Doing it again is harmless.

    Returns:
        Shards taken over.

    Raises:
        CacheError, StorageError: a shard of the source is corrupt.
    """
    taken = 0
    for entry in load_index(source):
        kept = [identifier for identifier in entry.sequence_ids if identifier not in anew]
        if not kept:
            continue
        path = target.shard(digest_ids(kept))
        taken += 1
        if storage.exists(path):
            continue
        if len(kept) == len(entry.sequence_ids):
            storage.link_or_copy(source.shard(entry.digest), path)
        else:
            rows = {row.sequence_id: row for row in open_shard(source.shard(entry.digest)).rows()}
            left = [rows[identifier] for identifier in kept]
            write_shard(path, left, fingerprint, entry.origin)
    if taken and storage.exists(source.canary):  # rows of both engines will lie side by side
        storage.link_or_copy(source.canary, target.canary)
    for identifier, error in quarantined(source).items():
        if identifier not in anew:
            storage.write_json(
                target.quarantine_record(identifier), {"sequence_id": identifier, "error": error}
            )
    return taken


def retry_quarantined(target: CacheLayout, anew: Collection[str]) -> None:
    """Removes the records of what could not be scored anew when a regeneration was interrupted."""
    for identifier in quarantined(target).keys() & set(anew):
        storage.remove(target.quarantine_record(identifier))


def check_whole(source: CacheLayout, target: CacheLayout) -> None:
    """Checks that a generation has a row for all that have one in the generation before it.

    Raises:
        CacheError: a sequence has none, be it that it could not be scored anew.
    """
    had = {identifier for entry in load_index(source) for identifier in entry.sequence_ids}
    has = {identifier for entry in load_index(target) for identifier in entry.sequence_ids}
    if not (lacking := had - has):
        return
    refused = quarantined(target)
    named = [f"{identifier} ({refused[identifier]})" for identifier in lacking & refused.keys()]
    why = f"; could not be scored anew: {', '.join(sorted(named)[:3])}" if named else ""
    raise CacheError(
        f"{target.shards_folder} lacks {len(lacking)} of the {len(had)} sequences of generation "
        f"{source.generation}, which stays the current one{why}. The same command goes on and "
        "tries them again; or begin anew, after `polystill cache gc CONFIG --unfinished`, with "
        "`--where sequence_id!=ID`, which leaves a sequence its old row"
    )
