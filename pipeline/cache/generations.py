"""Generations of a cache: which one a run uses, who names which, and how the next one begins.

    caches/<teacher>-<recipe>/  manifest.json  g1/  g1.index.parquet  g2/  g2.regeneration.json

The manifest names the current generation. A forced regeneration fills the next one beside it and
moves the manifest last, so the old one stays readable. A run pins its generations when it begins to
score and goes on with them; checkpoints and finished trainings name theirs as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import yaml

from pipeline import storage
from pipeline.errors import CacheError
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout, Layout

Names = dict[str, dict[int, list[str]]]
"""By cache folder and generation, who names it."""


def current_generation(folder: str) -> int:
    """The generation that the manifest names; without a manifest the newest one that is complete.

    Raises:
        StorageError: the manifest cannot be read.
    """
    manifest = CacheLayout(folder, 1).manifest
    if storage.exists(manifest):
        return int(storage.read_json(manifest)["generation"])
    complete = [
        number
        for number in generations(folder)
        if not storage.exists(CacheLayout(folder, number).regeneration)
    ]
    return max(complete, default=1)


def generations(folder: str) -> list[int]:
    """The numbers of all generations that have shards or a file of their own, in order."""
    names = storage.list_folders(folder) + [i.base_name for i in storage.list_files(folder)]
    found = (re.match(r"g(\d+)(\.|$)", name) for name in names)
    return sorted({int(match[1]) for match in found if match})


def generation_in_use(layout: Layout, cache: CacheLayout) -> CacheLayout:
    """The cache in the generation that the run has pinned, else in the current one."""
    pinned = pinned_generations(layout).get(cache.name)
    return replace(cache, generation=pinned or current_generation(cache.folder))


def pinned_generations(layout: Layout) -> dict[str, int]:
    """By cache folder, the generations that the run has pinned."""
    return storage.read_json(layout.pins) if storage.exists(layout.pins) else {}


def pin_generations(layout: Layout, caches: Iterable[CacheLayout]) -> None:
    """Fixes the generations that a run uses from now on; called before its first row is scored."""
    pins = {cache.name: cache.generation for cache in caches}
    if pins != pinned_generations(layout):
        storage.write_json(layout.pins, pins)


def unfinished_generation(folder: str) -> int | None:
    """The generation that a forced regeneration has begun and not completed."""
    current = current_generation(folder)
    begun = [
        number
        for number in generations(folder)
        if number > current and storage.exists(CacheLayout(folder, number).regeneration)
    ]
    return max(begun, default=None)


def begin_generation(folder: str, asked: dict[str, Any]) -> CacheLayout:
    """The next generation, or the unfinished one that the same request has begun.

    Args:
        asked: what is to be scored anew, as a JSON value.

    Raises:
        CacheError: an unfinished one was asked for something else.
    """
    number = unfinished_generation(folder)
    if number is None:
        cache = CacheLayout(folder, max([current_generation(folder), *generations(folder)]) + 1)
        storage.write_json(cache.regeneration, asked)
        return cache
    cache = CacheLayout(folder, number)
    begun = storage.read_json(cache.regeneration)
    if begun != asked:
        raise CacheError(
            f"{cache.shards_folder} is an unfinished forced regeneration of {_words(begun)}, and "
            f"now {_words(asked)} is asked for; finish it by the command that began it, or discard "
            "it with `polystill cache gc CONFIG --unfinished`"
        )
    return cache


def is_regenerated(cache: CacheLayout, asked: dict[str, Any]) -> bool:
    """Whether the current generation is what the same request has made; it was interrupted between
    the manifest and its end.
    """
    return storage.exists(cache.regeneration) and storage.read_json(cache.regeneration) == asked


def end_generation(cache: CacheLayout) -> None:
    """Forgets what a generation was made for; call it after its manifest is written, and that of
    all that the same request makes.
    """
    storage.remove(cache.regeneration)


def named_generations(layout: Layout) -> Names:
    """Who names which generation of which cache: runs by their pins and preparations,
    checkpoints and finished trainings by their identities. All runs below the root are asked.

    Raises:
        StorageError: a record cannot be read.
    """
    names: Names = {}

    def name(folder: str, generation: int, who: str) -> None:
        names.setdefault(folder, {}).setdefault(generation, []).append(who)

    for run in _runs(layout):
        of_run = replace(layout, run=run)
        pins = pinned_generations(of_run)
        for folder, generation in pins.items():
            name(folder, generation, f"run {run}")
        for cache in _prepared_caches(of_run):
            if cache.name not in pins:
                name(cache.name, current_generation(cache.folder), f"run {run}")
        for root in sorted({layout.root, *_models_roots(of_run)}):
            for who, identity in _identities(storage.join(root, "runs", run)):
                for cache_name, used in identity.get("caches", {}).items():
                    cache = layout.cache(cache_name, used["fingerprint"])
                    name(cache.name, used["generation"], f"{who} of run {run}")
    return names


def _runs(layout: Layout) -> Iterator[str]:
    """The folders of all runs below the root and of their later rounds."""
    for run in storage.list_folders(layout.runs_folder):
        rounds = storage.list_folders(storage.join(layout.runs_folder, run, "rounds"))
        yield from (run, *(f"{run}/rounds/{number}" for number in rounds))


def _prepared_caches(layout: Layout) -> list[CacheLayout]:
    if not storage.exists(layout.prepared):
        return []
    recipes = storage.read_json(layout.prepared)["scoring_recipes"]
    return [layout.cache(name, digest_json(recipe)) for name, recipe in recipes.items()]


def _models_roots(layout: Layout) -> set[str]:
    """Where the run keeps its checkpoints, by its own config and by the one given."""
    roots = {layout.models_root}
    if storage.exists(layout.resolved_config):
        section = yaml.safe_load(storage.read_bytes(layout.resolved_config))["storage"]
        roots.add(section.get("models_root"))
    return {root for root in roots if root}


def _identities(run_folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for student in storage.list_folders(run_folder):
        folder = storage.join(run_folder, student)
        found = {f"training {student}": storage.join(folder, "training.json")}
        checkpoints = storage.join(folder, "checkpoints")
        found |= {
            f"checkpoint {student}/{step}": storage.join(checkpoints, step, "state.json")
            for step in storage.list_folders(checkpoints)
        }
        for who, path in found.items():
            if storage.exists(path):
                yield who, storage.read_json(path).get("identity", {})


def _words(asked: dict[str, Any]) -> str:
    where = " and ".join(f"{key}={value}" for key, value in asked["where"].items())
    return f"dataset {asked['dataset'][:8]}{' where ' + where if where else ''}"
