"""Garbage in the caches of a storage root: found, listed, removed.

A generation is kept if a manifest names it, or any run below the root by its pins, its preparation,
a checkpoint or a finished training. A cache folder that no run names at all is garbage, whatever
its own manifest says. Only what polystill has written is garbage (`ownership.py`); everything else
is left and named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline import storage
from pipeline.cache.generations import (
    Names,
    current_generation,
    named_generations,
    unfinished_generation,
)
from pipeline.cache.index import load_index
from pipeline.cache_care.entries import (
    Entry,
    entries_below,
    is_link,
    remove_empty_folder,
    remove_file,
)
from pipeline.cache_care.ownership import (
    WRITTEN,
    finished_name,
    generation_of,
    holds_a_cache,
    is_cache_file,
    is_cache_folder,
    is_entered_cache,
    is_written_name,
)
from pipeline.cache_care.runs_at_hand import check_caches_folder, check_runs
from pipeline.errors import CacheError
from pipeline.layout import CacheLayout, Layout
from pipeline.messages import table

LEFTOVER_AGE_SECONDS = 3600
"""A younger unfinished write may still be going on."""
LEFTOVER = "an unfinished write"
SHOWN_FOREIGN = 20


@dataclass(frozen=True)
class Garbage:
    """One file that nobody needs, and the reason.

    Attributes:
        path: path below the storage root.
    """

    path: str
    num_bytes: int
    reason: str


@dataclass(frozen=True)
class Findings:
    """Contents of a storage root that are in no use, or not ours.

    Attributes:
        garbage: files that polystill has written and nobody needs.
        foreign: paths below the root of what polystill has not written, with the kind of what is
            neither file nor folder.
    """

    garbage: list[Garbage]
    foreign: list[str]


def find_garbage(layout: Layout, now: float, unfinished: bool = False) -> Findings:
    """All files in the root's caches that nobody needs, and old unfinished writes.

    Args:
        now: seconds since the epoch.
        unfinished: whether forced regenerations that have begun and not ended are garbage too.

    Raises:
        CacheError: the runs that may name caches, or their checkpoints, are not all there.
        StorageError: a file of a run cannot be read, so that no file is known to be garbage.
    """
    check_caches_folder(layout)
    # Files are listed before names are read: either may appear in between, and a listed
    # generation without a name is then older than all names that were read.
    entries = entries_below(layout.caches_folder, is_entered_cache)
    caches: dict[str, list[Entry]] = {}
    garbage: list[Garbage] = []
    foreign: list[str] = []
    for entry in entries:
        folder, _, name = entry.path.partition("/")
        final = finished_name(name) or name
        if not (is_cache_folder(folder) and is_cache_file(final) and entry.kind == "file"):
            foreign.append(_shown("caches", entry))
        elif final == name:
            caches.setdefault(folder, []).append(entry)
        elif now - entry.modified > LEFTOVER_AGE_SECONDS:
            garbage.append(_garbage("caches", entry, LEFTOVER))
    if caches:
        check_runs(layout)
    names = named_generations(layout)
    for folder, members in caches.items():
        path = storage.join(layout.caches_folder, folder)
        inside = [entry.path.partition("/")[2] for entry in members]
        if folder in names or holds_a_cache(path, inside):
            garbage += _of_cache(path, members, names, unfinished)
        else:
            foreign.append(f"caches/{folder}")
            garbage = [item for item in garbage if not item.path.startswith(f"caches/{folder}/")]
    for name in WRITTEN:
        found = _leftovers(layout, name, now)
        garbage, foreign = garbage + found.garbage, foreign + found.foreign
    return Findings(garbage, sorted(set(foreign)))


def garbage_table(layout: Layout, found: Findings) -> str:
    """The garbage by folder and reason, with its bytes, and what is left, as a table for people."""
    groups: dict[tuple[str, str], list[int]] = {}
    for item in found.garbage:
        folder = storage.join(layout.root, item.path.rpartition("/")[0])
        groups.setdefault((folder, item.reason), []).append(item.num_bytes)
    rows = [
        [f"{len(sizes):,}", f"{sum(sizes):,}", folder, reason]
        for (folder, reason), sizes in groups.items()
    ]
    total = sum(sum(sizes) for sizes in groups.values())
    listed = table(["files", "bytes", "folder", "why"], rows)
    return "\n".join([listed, f"{total:,} bytes in all", *foreign_lines(layout, found)])


def foreign_lines(layout: Layout, found: Findings) -> list[str]:
    """Lines that name what is not ours."""
    paths = [storage.join(layout.root, path) for path in found.foreign[:SHOWN_FOREIGN]]
    lines = [f"not ours, left: {path if path.isprintable() else repr(path)}" for path in paths]
    more = len(found.foreign) - len(lines)
    return [*lines, f"not ours, left: {more} more"] if more else lines


def remove_garbage(layout: Layout, garbage: Iterable[Garbage]) -> None:
    """Removes the files, and then the folders of the caches that are empty.

    The mark of an unfinished generation goes last: the rest of it is never taken for complete.
    """
    folders = set()
    for item in sorted(garbage, key=lambda item: item.path.endswith(".regeneration.json")):
        remove_file(layout.root, item.path)
        parts = item.path.split("/")
        if parts[0] == "caches":
            folders |= {"/".join(parts[:depth]) for depth in range(2, len(parts))}
    for folder in sorted(folders, key=lambda folder: -folder.count("/")):
        remove_empty_folder(layout.root, folder)


def _of_cache(path: str, members: list[Entry], names: Names, unfinished: bool) -> Iterator[Garbage]:
    """Files of one cache that nobody needs."""
    folder = path.rpartition("/")[2]
    begun = None if unfinished else unfinished_generation(path)
    if folder not in names and begun is None:
        yield from (_garbage("caches", entry, "no run names this cache") for entry in members)
        return
    groups: dict[int, list[Entry]] = {}
    for entry in members:
        number = generation_of(entry.path.partition("/")[2])
        if number is not None:
            groups.setdefault(number, []).append(entry)
    current = current_generation(path)
    if current not in groups and any(number < current for number in groups):
        raise CacheError(
            f"the manifest of {path} names generation {current}, which is not there, so its older "
            "rows may be the only ones: bring the generation back, or remove the folder yourself"
        )
    for number, entries in groups.items():
        if number in {current, begun, *names.get(folder, {})}:
            yield from _inside(CacheLayout(path, number), entries, is_begun=number == begun)
        elif number < current or unfinished:
            yield from (
                _garbage("caches", entry, "nobody names this generation") for entry in entries
            )


def _inside(cache: CacheLayout, entries: list[Entry], is_begun: bool) -> Iterator[Garbage]:
    """Files that a kept generation does not need."""
    prefix = f"{cache.name}/g{cache.generation}"
    notes = []
    for entry in entries:
        if entry.path.startswith(f"{prefix}.aside/"):
            yield _garbage("caches", entry, "a corrupt shard that was set aside")
        elif entry.path == f"{prefix}.regeneration.json" and not is_begun:
            yield _garbage("caches", entry, "it is complete")
        elif entry.path.startswith(f"{prefix}.quarantine/"):
            notes.append(entry)
    if notes:
        shards = load_index(cache, corrupt=[])
        scored = {i for shard in shards for i in shard.sequence_ids}
        for entry in notes:
            if entry.path.rpartition("/")[2].removesuffix(".json") in scored:
                yield _garbage("caches", entry, "this sequence has a row by now")


def _leftovers(layout: Layout, name: str, now: float) -> Findings:
    """Unfinished writes below a folder of the root that are too old to be still going on."""
    garbage, foreign = [], []
    folder = storage.join(layout.root, name)
    if is_link(folder):
        return Findings([], [f"{name} (a link)"])
    deepest = WRITTEN[name].count("/")
    for entry in entries_below(folder, lambda path: path.count("/") < deepest):
        if (final := finished_name(entry.path)) is None:
            continue
        if entry.kind != "file" or not is_written_name(name, final):
            foreign.append(_shown(name, entry))
        elif now - entry.modified > LEFTOVER_AGE_SECONDS:
            garbage.append(_garbage(name, entry, LEFTOVER))
    return Findings(garbage, foreign)


def _garbage(folder: str, entry: Entry, reason: str) -> Garbage:
    return Garbage(f"{folder}/{entry.path}", entry.num_bytes, reason)


def _shown(folder: str, entry: Entry) -> str:
    kinds = {"link": " (a link)", "other": " (no regular file)"}
    return f"{folder}/{entry.path}{kinds.get(entry.kind, '')}"
