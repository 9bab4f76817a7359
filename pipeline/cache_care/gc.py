"""Garbage in the caches of a storage root: found, listed, removed.

A generation is kept if a manifest names it, or any run below the root by its pins, its preparation,
a checkpoint or a finished training. A cache folder that no run names at all is garbage, whatever
its own manifest says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pipeline import storage
from pipeline.cache.generations import (
    current_generation,
    generations,
    named_generations,
    unfinished_generation,
)
from pipeline.cache.index import load_index
from pipeline.layout import CacheLayout, Layout
from pipeline.messages import table

LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.tmp$")
"""Names of unfinished writes (`pipeline/storage.py`)."""
LEFTOVER_AGE_SECONDS = 3600
"""A younger unfinished write may still be going on."""
WRITTEN_FOLDERS = (
    "caches",
    "sequences",
    "synthesis",
    "datasets",
    "prompts",
    "rejected",
    "judgements",
)


@dataclass(frozen=True)
class Garbage:
    """One file that nobody needs, and the reason."""

    path: str
    num_bytes: int
    reason: str


def find_garbage(layout: Layout, now: float, unfinished: bool = False) -> list[Garbage]:
    """All files in the root's caches that nobody needs, and old unfinished writes.

    Args:
        now: seconds since the epoch.
        unfinished: whether forced regenerations that have begun and not ended are garbage too.

    Raises:
        StorageError: a file of a run cannot be read, so that no file is known to be garbage.
    """
    garbage = list(_leftovers(layout, now))
    folders = storage.list_folders(layout.caches_folder)
    paths = {folder: storage.join(layout.caches_folder, folder) for folder in folders}
    # Generations are listed before their names are read: either may appear in between, and a listed
    # generation without a name is then older than all names that were read.
    numbers = {folder: generations(path) for folder, path in paths.items()}
    names = named_generations(layout)
    for folder, path in paths.items():
        begun = None if unfinished else unfinished_generation(path)
        if folder not in names and begun is None:
            garbage += _files(path, "", "no run names this cache")
            continue
        current = current_generation(path)
        for number in numbers[folder]:
            if number in {current, begun, *names.get(folder, {})}:
                garbage += _inside(CacheLayout(path, number), is_begun=number == begun)
            elif number < current or unfinished:
                garbage += _files(path, f"g{number}", "nobody names this generation")
    unique = {item.path: item for item in garbage}
    return list(unique.values())


def garbage_table(garbage: Iterable[Garbage]) -> str:
    """The files by folder and reason, with their bytes, as a table for people."""
    groups: dict[tuple[str, str], list[int]] = {}
    for item in garbage:
        groups.setdefault((item.path.rpartition("/")[0], item.reason), []).append(item.num_bytes)
    rows = [
        [f"{len(sizes):,}", f"{sum(sizes):,}", folder, reason]
        for (folder, reason), sizes in groups.items()
    ]
    total = sum(sum(sizes) for sizes in groups.values())
    return f"{table(['files', 'bytes', 'folder', 'why'], rows)}\n{total:,} bytes in all"


def remove_garbage(layout: Layout, garbage: Iterable[Garbage]) -> None:
    """Removes the files, and then the cache folders that are empty.

    The mark of an unfinished generation goes last: the rest of it is never taken for complete.
    """
    for item in sorted(garbage, key=lambda item: item.path.endswith(".regeneration.json")):
        storage.remove(item.path)
    for folder in storage.list_folders(layout.caches_folder):
        path = storage.join(layout.caches_folder, folder)
        for name in storage.list_folders(path):
            storage.remove_empty_folders(storage.join(path, name))
        storage.remove_empty_folders(path)


def _inside(cache: CacheLayout, is_begun: bool) -> Iterator[Garbage]:
    """Files that a kept generation does not need."""
    yield from _files(cache.aside, "", "a corrupt shard that was set aside")
    if storage.exists(cache.regeneration) and not is_begun:
        yield from _files(cache.folder, f"g{cache.generation}.regeneration", "it is complete")
    notes = storage.list_files(cache.quarantine, ".json")
    if notes:
        entries = load_index(cache, corrupt=[])
        scored = {i for entry in entries for i in entry.sequence_ids}
        for info in notes:
            path = storage.join(cache.quarantine, info.base_name)
            if json.loads(storage.read_bytes(path))["sequence_id"] in scored:
                yield Garbage(path, info.size, "this sequence has a row by now")


def _files(folder: str, prefix: str, reason: str) -> Iterator[Garbage]:
    """All files below a folder, or the files of one generation (`g1`: in `g1/`, and `g1.…`)."""
    for name, info in storage.files_below(folder).items():
        if not prefix or re.match(rf"{re.escape(prefix)}[./]", name):
            yield Garbage(storage.join(folder, name), info.size, reason)


def _leftovers(layout: Layout, now: float) -> Iterator[Garbage]:
    """Unfinished writes that are too old to be still going on."""
    for name in WRITTEN_FOLDERS:
        folder = storage.join(layout.root, name)
        for path, info in storage.files_below(folder).items():
            is_old = now - info.mtime_ns / 1e9 > LEFTOVER_AGE_SECONDS
            if is_old and LEFTOVER.match(path.rpartition("/")[2]):
                yield Garbage(storage.join(folder, path), info.size, "an unfinished write")
