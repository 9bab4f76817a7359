"""What a run's caches hold, lack and are named by: figures of each teacher, and a table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.cache.generations import Names, current_generation, generations, unfinished_generation
from pipeline.cache.index import load_index, quarantined, totals
from pipeline.cache.projection import teacher_of
from pipeline.config.run import Config
from pipeline.errors import CorruptShardError
from pipeline.fingerprint import differences
from pipeline.layout import CacheLayout, Layout
from pipeline.messages import table
from pipeline.records import DatasetEntry
from pipeline.run.identities import cache_identities, cache_layout
from pipeline.run.preparation import Prepared


@dataclass(frozen=True)
class StaleFolder:
    """A cache of the same teacher under another recipe.

    Attributes:
        changes: one line per recipe field that differs, old beside new.
        named_by: the runs and checkpoints that use it.
    """

    name: str
    changes: list[str]
    num_bytes: int
    named_by: list[str]


@dataclass(frozen=True)
class TeacherStatus:
    """One teacher's cache, in the generation that the run uses.

    Attributes:
        missing: sequences of the run's dataset that are neither scored nor quarantined.
        corrupt: shards whose size is not that of the index, and that do not pass their checks.
        totals: of the index: shards, sequences, positions, bytes, kept mass.
        generations: one line each.
    """

    teacher: str
    cache: CacheLayout
    missing: int
    corrupt: list[str]
    refused: dict[str, str]
    totals: dict[str, float]
    generations: list[str]
    stale: list[StaleFolder]


def expected_identities(config: Config, prepared: Prepared) -> dict[str, dict[str, Any]]:
    """The recipes of a config that has changed since it was prepared, model identities as then."""
    identities = {
        teacher_of(name): recipe["model"] for name, recipe in prepared.scoring_recipes.items()
    }
    return cache_identities(config, identities, prepared.tokenizer_hash)


def teacher_status(
    layout: Layout,
    teacher: str,
    recipe: dict[str, Any],
    cache: CacheLayout,
    entries: Sequence[DatasetEntry],
    names: Names,
) -> TeacherStatus:
    """Reads what one teacher's cache holds.

    Args:
        names: who uses which generation of which cache below the root.

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
        refused=refused,
        totals=totals(shards),
        generations=_generation_lines(cache, names.get(cache.name, {})),
        stale=[
            StaleFolder(
                folder,
                changes,
                _num_bytes(storage.join(layout.caches_folder, folder)),
                sorted({who for lines in names.get(folder, {}).values() for who in lines}),
            )
            for folder, changes in _other_identities(layout, teacher, recipe)
        ],
    )


def status_table(run: str, entries: Sequence[DatasetEntry], found: Sequence[TeacherStatus]) -> str:
    """The status of all teachers for people."""
    positions = sum(entry.num_positions for entry in entries)
    header = ["teacher", "cache", "shards", "missing", "quarantined", "tokens", "bytes"]
    rows = [
        [
            status.teacher,
            f"{status.cache.name}/g{status.cache.generation}",
            f"{status.totals['num_shards']:,}",
            f"{status.missing:,}",
            f"{len(status.refused):,}",
            f"{status.totals['num_positions']:,}",
            f"{status.totals['num_bytes']:,}",
            _number(status.totals, "bytes_per_token", ".1f"),
            _number(status.totals, "kept_mass", ".5f"),
        ]
        for status in found
    ]
    lines = [f"run {run}: {len(entries):,} sequences, {positions:,} tokens to score"]
    lines += [table([*header, "bytes/token", "kept mass"], rows)]
    for status in found:
        lines += [f"{status.teacher}: {line}" for line in status.generations + status.corrupt]
        lines += [
            f"{status.teacher}: quarantined {identifier}: {error}"
            for identifier, error in status.refused.items()
        ]
        for stale in status.stale:
            who = ", ".join(stale.named_by) or "nobody"
            lines.append(
                f"{status.teacher}: stale {stale.name} ({stale.num_bytes:,} bytes, named by {who})"
            )
            lines += [f"    {change}" for change in stale.changes]
    return "\n".join(lines)


def _number(found: dict[str, float], name: str, form: str) -> str:
    return format(found[name], form) if name in found else "-"


def stale_caches(layout: Layout, prepared: Prepared) -> list[str]:
    """What differs from the caches that teachers without one have under other recipes, in lines."""
    return [
        f"{teacher}: cache {folder} was made with another recipe: {'; '.join(changes)}"
        for teacher, recipe in prepared.scoring_recipes.items()
        if not storage.exists(cache_layout(layout, teacher, recipe).manifest)
        for folder, changes in _other_identities(layout, teacher, recipe)
    ]


def _other_identities(
    layout: Layout, teacher: str, recipe: dict[str, Any]
) -> list[tuple[str, list[str]]]:
    """The other folders of a teacher that have a manifest, and what differs from a recipe."""
    found = []
    for folder in storage.list_folders(layout.caches_folder):
        manifest = CacheLayout(storage.join(layout.caches_folder, folder), 1).manifest
        is_other = folder != cache_layout(layout, teacher, recipe).name
        if folder.rpartition("-")[0] == teacher and is_other and storage.exists(manifest):
            found.append((folder, differences(storage.read_json(manifest)["recipe"], recipe)))
    return found


def _generation_lines(cache: CacheLayout, names: dict[int, list[str]]) -> list[str]:
    current, unfinished = current_generation(cache.folder), unfinished_generation(cache.folder)
    lines = []
    for number in generations(cache.folder):
        state = {current: "current", unfinished: "unfinished"}.get(number, "former")
        who = ", ".join(names.get(number, [])) or "nobody"
        used = " (used by this run)" if number == cache.generation else ""
        lines.append(f"generation {number} {state}{used}, named by {who}")
    return lines


def _num_bytes(folder: str) -> int:
    return sum(info.size for info in storage.files_below(folder).values())
