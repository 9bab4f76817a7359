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
from typing import Any

from pipeline import storage
from pipeline.cache.kinds import holdout_identities
from pipeline.errors import CacheError, CorruptFileError
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout, Layout
from pipeline.yaml_text import YamlError, read_yaml

Names = dict[str, dict[int, list[str]]]
"""The runs, checkpoints and trainings that name a generation, by cache folder and generation."""


def current_generation(folder: str) -> int:
    """The generation that the manifest names; without a manifest, the newest complete one.

    Raises:
        StorageError: the manifest cannot be read.
    """
    manifest = CacheLayout(folder, 1).manifest
    if storage.exists(manifest):
        return _number(manifest, _member(manifest, storage.read_json(manifest), "generation"))
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
    pins = storage.read_json(layout.pins) if storage.exists(layout.pins) else {}
    if not isinstance(pins, dict):
        raise CorruptFileError(_other_kind(layout.pins, "it is no mapping"))
    return {folder: _number(layout.pins, number) for folder, number in pins.items()}


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
            for user, path, used in _training_caches(storage.join(root, "runs", run)):
                for cache_name, of_cache in used.items():
                    fingerprint = str(_member(path, of_cache, "fingerprint"))
                    cache = layout.cache(cache_name, fingerprint)
                    generation = _number(path, _member(path, of_cache, "generation"))
                    name(cache.name, generation, f"{user} of run {run}")
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
        config = read_yaml(storage.read_bytes(path))
    except YamlError as error:
        raise CorruptFileError(_other_kind(path, f"it is no YAML: {error}")) from error
    root = _member(path, _member(path, config, "storage"), "models_root", "")
    return {str(root)} if root else set()


def _prepared_caches(layout: Layout) -> list[CacheLayout]:
    if not storage.exists(layout.prepared):
        return []
    path = layout.prepared
    identities = _member(path, storage.read_json(path), "scoring_recipes")
    try:
        identities = identities | holdout_identities(identities)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(_other_kind(path, "its scoring_recipes are of another")) from error
    return [layout.cache(name, digest_json(identity)) for name, identity in identities.items()]


def _training_caches(run_folder: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The finished trainings and checkpoints of a run: the name of each, its file, and the caches
    that its identity names.
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
                identity = storage.read_json(path)
                for key in ("identity", "caches"):
                    identity = _member(path, identity, key, {})
                if not isinstance(identity, dict):
                    raise CorruptFileError(_other_kind(path, "its caches are no mapping"))
                yield user, path, identity


def _member(path: str, value: Any, key: str, default: Any = None) -> Any:
    """Value of a key of a mapping that a file holds."""
    if not isinstance(value, dict) or (default is None and key not in value):
        raise CorruptFileError(_other_kind(path, f"it has no {key}"))
    return value.get(key, default)


def _number(path: str, value: Any) -> int:
    """Number of a generation that a file names."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CorruptFileError(_other_kind(path, f"{str(value)[:40]!r} is no generation"))
    return value


def _other_kind(path: str, problem: str) -> str:
    return f"{path} is not what polystill wrote: {problem}; bring the file back, or remove it"


def _request_text(request: dict[str, Any]) -> str:
    where = " and ".join(f"{key}={value}" for key, value in request["where"].items())
    return f"dataset {request['dataset'][:8]}{' where ' + where if where else ''}"
