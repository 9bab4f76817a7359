"""Status of a run's caches: figures of each cache, its gaps and its users, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.cache.generations import Names, current_generation, generations, unfinished_generation
from pipeline.cache.index import load_index, quarantined
from pipeline.cache.kinds import teacher_of
from pipeline.cache.manifest import CacheTotals, recipe_of, totals
from pipeline.errors import CorruptShardError
from pipeline.fingerprint import differences
from pipeline.layout import CacheLayout, Layout
from pipeline.messages import table
from pipeline.records import DatasetEntry
from pipeline.run.identities import cache_identities, cache_layout
from pipeline.run.prepared_run import Run


@dataclass(frozen=True)
class StaleFolder:
    """A cache of the same teacher under another identity.

    Attributes:
        name: name of the folder.
        changes: one line per field of the identity that differs, old beside new.
        num_bytes: bytes of all its files.
        named_by: runs and checkpoints that use it.
    """

    name: str
    changes: list[str]
    num_bytes: int
    named_by: list[str]


@dataclass(frozen=True)
class TeacherStatus:
    """Status of one teacher's cache, in the generation that the run uses.

    Attributes:
        teacher: name of the cache.
        missing: number of sequences of the run's dataset that are neither scored nor quarantined.
        corrupt: errors of shards that the index does not vouch for and that fail their checks.
        quarantined: error of each sequence that could not be scored.
        totals: size and quality of the shards that are sound.
        generations: one line for each generation.
        stale: caches of the same teacher under other identities.
    """

    teacher: str
    cache: CacheLayout
    missing: int
    corrupt: list[str]
    quarantined: dict[str, str]
    totals: CacheTotals
    generations: list[str]
    stale: list[StaleFolder]


def expected_identities(run: Run) -> dict[str, dict[str, Any]]:
    """Cache identities of a config that has changed since it was prepared; the identities of the
    models are those of the preparation.
    """
    identities = {
        teacher_of(name): identity["model"]
        for name, identity in run.prepared.cache_identities.items()
    }
    return cache_identities(run.config, identities, run.prepared.tokenizer_hash)


def teacher_status(
    layout: Layout,
    teacher: str,
    identity: dict[str, Any],
    cache: CacheLayout,
    entries: Sequence[DatasetEntry],
    names: Names,
) -> TeacherStatus:
    """Reads the status of one teacher's cache.

    Args:
        teacher: name of the cache.
        identity: identity that the config gives the cache now.
        entries: sequences of the run.
        names: users of every generation of every cache below the root.

    Raises:
        StorageError: an index, a manifest or a shard without an index entry cannot be read.
    """
    corrupt: list[CorruptShardError] = []
    shards = load_index(cache, corrupt=corrupt)
    refused = quarantined(cache)
    scored = {identifier for shard in shards for identifier in shard.sequence_ids}
    return TeacherStatus(
        teacher=teacher,
        cache=cache,
        missing=sum(e.sequence_id not in scored and e.sequence_id not in refused for e in entries),
        corrupt=[str(error) for error in corrupt],
        quarantined=refused,
        totals=totals(shards),
        generations=_generation_lines(cache, names.get(cache.name, {})),
        stale=[
            StaleFolder(
                folder,
                changes,
                _num_bytes(storage.join(layout.caches_folder, folder)),
                sorted({user for users in names.get(folder, {}).values() for user in users}),
            )
            for folder, changes in _other_identities(layout, teacher, identity)
        ],
    )


def status_table(
    run: str, entries: Sequence[DatasetEntry], statuses: Sequence[TeacherStatus]
) -> str:
    """The status of all caches of a run as a table for people."""
    positions = sum(entry.num_positions for entry in entries)
    header = ["teacher", "cache", "shards", "missing", "quarantined", "tokens", "bytes"]
    rows = [
        [
            status.teacher,
            f"{status.cache.name}/g{status.cache.generation}",
            f"{status.totals.num_shards:,}",
            f"{status.missing:,}",
            f"{len(status.quarantined):,}",
            f"{status.totals.num_positions:,}",
            f"{status.totals.num_bytes:,}",
            _number(status.totals.bytes_per_token, ".1f"),
            _number(status.totals.kept_mass, ".5f"),
        ]
        for status in statuses
    ]
    lines = [f"run {run}: {len(entries):,} sequences, {positions:,} tokens to score"]
    lines += [table([*header, "bytes/token", "kept mass"], rows)]
    for status in statuses:
        lines += [f"{status.teacher}: {line}" for line in status.generations + status.corrupt]
        lines += [
            f"{status.teacher}: quarantined {identifier}: {error}"
            for identifier, error in status.quarantined.items()
        ]
        for stale in status.stale:
            users = ", ".join(stale.named_by) or "nobody"
            size = f"{stale.num_bytes:,} bytes"
            lines.append(f"{status.teacher}: stale {stale.name} ({size}, named by {users})")
            lines += [f"    {change}" for change in stale.changes]
    return "\n".join(lines)


def _number(figure: float | None, form: str) -> str:
    return "-" if figure is None else format(figure, form)


def stale_caches(run: Run) -> list[str]:
    """Lines about caches under other identities, for teachers without a cache under their own."""
    return [
        f"{teacher}: {folder} cannot be used, for it was made with other settings: "
        f"{'; '.join(changes)}"
        for teacher, identity in run.prepared.cache_identities.items()
        if not storage.exists(cache_layout(run.layout, teacher, identity).manifest)
        for folder, changes in _other_identities(run.layout, teacher, identity)
    ]


def _other_identities(
    layout: Layout, teacher: str, identity: dict[str, Any]
) -> list[tuple[str, list[str]]]:
    """The other cache folders of a teacher that have a manifest, and their differences from an
    identity.
    """
    others = []
    for folder in storage.list_folders(layout.caches_folder):
        manifest = CacheLayout(storage.join(layout.caches_folder, folder), 1).manifest
        is_other = folder != cache_layout(layout, teacher, identity).name
        if folder.rpartition("-")[0] == teacher and is_other and storage.exists(manifest):
            others.append(
                (
                    folder,
                    differences(recipe_of(storage.join(layout.caches_folder, folder)), identity),
                )
            )
    return others


def _generation_lines(cache: CacheLayout, names: dict[int, list[str]]) -> list[str]:
    current, unfinished = current_generation(cache.folder), unfinished_generation(cache.folder)
    lines = []
    for number in generations(cache.folder):
        state = {current: "current", unfinished: "unfinished"}.get(number, "former")
        users = ", ".join(names.get(number, [])) or "nobody"
        used = " (used by this run)" if number == cache.generation else ""
        lines.append(f"generation {number} {state}{used}, named by {users}")
    return lines


def _num_bytes(folder: str) -> int:
    return sum(info.size for info in storage.files_below(folder).values())
