"""Generations of a cache: which one a run uses, which ones are named, and how the next one begins.

    caches/<teacher>-<hash>/  manifest.json  g1/  g1.index.parquet  g2/  g2.regeneration.json

The manifest names the current generation. A forced regeneration fills the next generation beside it
and moves the manifest last, so the old generation stays readable. A run pins its generations when
it begins to score, and uses them from then on; checkpoints and finished trainings name theirs as
well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from pipeline import storage
from pipeline.cache.kinds import holdout_identities
from pipeline.errors import CacheError, CorruptFileError
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout, Layout
from pipeline.plain_json import RESTORE, NotJSONError, checked
from pipeline.yaml_text import YamlError, read_yaml

Generation = Annotated[int, Field(ge=1)]
Names = dict[str, dict[int, list[str]]]
"""The runs, checkpoints and trainings that name a generation, by cache folder and generation."""


class _Manifest(TypedDict):
    generation: Generation


class _Prepared(TypedDict):
    scoring_recipes: dict[str, dict[str, Any]]


class _UsedCache(TypedDict):
    fingerprint: str
    generation: Generation


class _Identity(TypedDict, total=False):
    caches: dict[str, _UsedCache]


class _Trained(TypedDict, total=False):
    """A finished training or a checkpoint."""

    identity: _Identity


class _Storage(TypedDict, total=False):
    models_root: str | None


class _Config(TypedDict):
    storage: _Storage


def current_generation(folder: str) -> int:
    """The generation that the manifest names; without a manifest, the newest complete one.

    Raises:
        StorageError: the manifest cannot be read.
    """
    manifest = CacheLayout(folder, 1).manifest
    if storage.exists(manifest):
        return storage.read_json(manifest, _Manifest)["generation"]
    complete = [
        number
        for number in generations(folder)
        if not storage.exists(CacheLayout(folder, number).regeneration)
    ]
    return max(complete, default=1)


def generations(folder: str) -> list[int]:
    """The numbers of all generations that have a folder or a file, in order."""
    names = storage.list_folders(folder) + [i.base_name for i in storage.list_files(folder)]
    matches = (re.match(r"g(\d+)(\.|$)", name) for name in names)
    return sorted({int(match[1]) for match in matches if match})


def generation_in_use(layout: Layout, cache: CacheLayout) -> CacheLayout:
    """The cache in the generation that the run has pinned, or else in the current generation."""
    pinned = pinned_generations(layout).get(cache.name)
    return replace(cache, generation=pinned or current_generation(cache.folder))


def pinned_generations(layout: Layout) -> dict[str, int]:
    """The generations that the run has pinned, by name of the cache folder.

    Raises:
        StorageError: the pins cannot be read.
    """
    if not storage.exists(layout.pins):
        return {}
    return storage.read_json(layout.pins, dict[str, Generation])


def pin_generations(layout: Layout, caches: Iterable[CacheLayout]) -> None:
    """Fixes the generations that a run uses from now on; call it before the first row is scored."""
    pins = {cache.name: cache.generation for cache in caches}
    if pins != pinned_generations(layout):
        storage.write_json(layout.pins, pins)


def unfinished_generation(folder: str) -> int | None:
    """The generation that a forced regeneration has begun and not completed, if any."""
    current = current_generation(folder)
    begun = [
        number
        for number in generations(folder)
        if number > current and storage.exists(CacheLayout(folder, number).regeneration)
    ]
    return max(begun, default=None)


def begin_generation(folder: str, request: dict[str, Any]) -> CacheLayout:
    """The next generation, or the unfinished generation that the same request has begun.

    Args:
        request: `dataset` and `where` of the sequences to score again, as a JSON value.

    Raises:
        CacheError: a generation is unfinished that another request has begun.
    """
    number = unfinished_generation(folder)
    if number is None:
        cache = CacheLayout(folder, max([current_generation(folder), *generations(folder)]) + 1)
        storage.write_json(cache.regeneration, request)
        return cache
    cache = CacheLayout(folder, number)
    begun = storage.read_json(cache.regeneration)
    if begun != request:
        raise CacheError(
            f"{cache.shards_folder} is an unfinished forced regeneration of "
            f"{_request_text(begun)}, but this command is about {_request_text(request)}: repeat "
            "the command that began it, or discard it with `polystill cache gc CONFIG --unfinished`"
        )
    return cache


def is_regenerated(cache: CacheLayout, request: dict[str, Any]) -> bool:
    """Whether the same request has completed the current generation, and was interrupted between
    the manifest and its own end.
    """
    return storage.exists(cache.regeneration) and storage.read_json(cache.regeneration) == request


def end_generation(cache: CacheLayout) -> None:
    """Forgets the request that a generation was made for; call it after the manifests of all
    generations of this request are written.
    """
    storage.remove(cache.regeneration)


def named_generations(layout: Layout) -> Names:
    """The users of every generation of every cache, from all runs below the root: runs name
    generations by their pins and preparations, checkpoints and finished trainings by their
    identities.

    Raises:
        StorageError: a file of a run cannot be read.
    """
    names: Names = {}

    def name(folder: str, generation: int, user: str) -> None:
        names.setdefault(folder, {}).setdefault(generation, []).append(user)

    for run in runs_below(layout):
        of_run = replace(layout, run=run)
        pins = pinned_generations(of_run)
        for folder, generation in pins.items():
            name(folder, generation, f"run {run}")
        for cache in _prepared_caches(of_run):
            if cache.name not in pins:
                name(cache.name, current_generation(cache.folder), f"run {run}")
        for root in sorted(filter(None, {layout.root, layout.models_root, *models_roots(of_run)})):
            for user, used in _training_caches(storage.join(root, "runs", run)):
                for cache_name, of_cache in used.items():
                    cache = layout.cache(cache_name, of_cache["fingerprint"])
                    name(cache.name, of_cache["generation"], f"{user} of run {run}")
    return names


def runs_below(layout: Layout) -> Iterator[str]:
    """The folders of all runs below the root, and of their later rounds."""
    for run in storage.list_folders(layout.runs_folder):
        rounds = storage.list_folders(storage.join(layout.runs_folder, run, "rounds"))
        yield from (run, *(f"{run}/rounds/{number}" for number in rounds))


def models_roots(layout: Layout) -> set[str]:
    """The root of a run's checkpoints, if the run's own config names one.

    Raises:
        StorageError: the config cannot be read.
    """
    path = layout.resolved_config
    if not storage.exists(path):
        return set()
    try:
        config = checked(read_yaml(storage.read_bytes(path)), _Config)
    except (YamlError, NotJSONError) as error:
        raise CorruptFileError(
            f"{path} does not hold what polystill writes there: {error}; bring it back from a copy"
        ) from error
    return set(filter(None, [config["storage"].get("models_root")]))


def _prepared_caches(layout: Layout) -> list[CacheLayout]:
    if not storage.exists(layout.prepared):
        return []
    identities = storage.read_json(layout.prepared, _Prepared)["scoring_recipes"]
    try:
        identities = identities | holdout_identities(identities)
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{layout.prepared} does not hold what polystill writes there: scoring_recipes are "
            f"those of no cache; {RESTORE}"
        ) from error
    return [layout.cache(name, digest_json(identity)) for name, identity in identities.items()]


def _training_caches(run_folder: str) -> Iterator[tuple[str, dict[str, _UsedCache]]]:
    """The finished trainings and checkpoints of a run: the name of each, and the caches that its
    identity names.
    """
    for student in storage.list_folders(run_folder):
        folder = storage.join(run_folder, student)
        paths = {f"training {student}": storage.join(folder, "training.json")}
        checkpoints = storage.join(folder, "checkpoints")
        paths |= {
            f"checkpoint {student}/{step}": storage.join(checkpoints, step, "state.json")
            for step in storage.list_folders(checkpoints)
        }
        for user, path in paths.items():
            if storage.exists(path):
                yield user, storage.read_json(path, _Trained).get("identity", {}).get("caches", {})


def _request_text(request: dict[str, Any]) -> str:
    where = " and ".join(f"{key}={value}" for key, value in request["where"].items())
    return f"dataset {request['dataset'][:8]}{' where ' + where if where else ''}"
