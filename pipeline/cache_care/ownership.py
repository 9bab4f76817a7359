"""Names and marks by which a file below a storage root is known to be ours.

Whatever has another name, or is a link, a named pipe or the like, is somebody else's: it is never
removed, and no folder of it is entered.
"""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.cache.kinds import HIDDEN_STATES, HOLDOUT
from pipeline.config.base import NAME
from pipeline.errors import StorageError
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout
from pipeline.synthesis.stored_file import StoredFile

_NAME, _HASH = NAME.strip("^$"), "[0-9a-f]{32}"
_GENERATION = r"g(?P<generation>[1-9]\d{0,8})"
_KINDS = "|".join(map(re.escape, (HIDDEN_STATES, HOLDOUT)))
_CACHE_FOLDER = re.compile(rf"{_NAME}({_KINDS})?-(?P<fingerprint>[0-9a-f]{{16}})", re.ASCII)
_CACHE_SUBFOLDER = re.compile(rf"{_GENERATION}(\.aside|\.quarantine)?", re.ASCII)
_CACHE_FILE = re.compile(
    rf"manifest\.json|{_GENERATION}(\.index\.parquet|\.canary\.json|\.regeneration\.json"
    rf"|(\.aside)?/{_HASH}\.parquet|\.quarantine/{_HASH}\.json)",
    re.ASCII,
)
_TEMPORARY = re.compile(r"(?P<folder>(.*/)?)\.(?P<name>[^/]+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
WRITTEN = {
    "prompts": rf"{_HASH}\.parquet",
    "datasets": rf"{_HASH}\.parquet",
    "sequences": rf"{_NAME}/{_HASH}\.parquet",
    "synthesis": rf"{_HASH}/{_HASH}\.json",
    "judgements": rf"{_HASH}/{_HASH}\.json",
    "rejected": rf"{_HASH}/(\d+-[a-z_]+|{_HASH})\.parquet",
}
"""Folders below the root beside the caches, with the names of the files that are written there."""
SHARDS_TRIED = 8


def is_cache_folder(path: str) -> bool:
    """Whether a path below `caches/` has the name of a cache's folder."""
    return _CACHE_FOLDER.fullmatch(path) is not None


def is_entered_cache(path: str) -> bool:
    """Whether a path below `caches/` is the folder of a cache, or a folder of its layout."""
    folder, _, below = path.partition("/")
    return is_cache_folder(folder) and (not below or bool(_CACHE_SUBFOLDER.fullmatch(below)))


def is_cache_file(name: str) -> bool:
    """Whether a path below the folder of a cache has a name of the layout."""
    return _CACHE_FILE.fullmatch(name) is not None


def generation_of(name: str) -> int | None:
    """Generation that a path below the folder of a cache belongs to; None of the manifest."""
    found = _CACHE_FILE.fullmatch(name)
    assert found is not None, name
    return int(found["generation"]) if found["generation"] else None


def finished_name(path: str) -> str | None:
    """Path that an unfinished write would have got; None if the path is no unfinished write."""
    found = _TEMPORARY.fullmatch(path)
    return f"{found['folder']}{found['name']}" if found else None


def is_written_name(folder: str, path: str) -> bool:
    """Whether a path below a folder of `WRITTEN` is of a file that is written there."""
    return re.fullmatch(WRITTEN[folder], path, re.ASCII) is not None


def holds_a_cache(folder: str, names: list[str]) -> bool:
    """Whether a folder with the name of a cache is one.

    The fingerprint in the folder's name must be that of the manifest's identity; without a
    manifest, that of a shard. A folder without either is known by its names alone.

    Args:
        folder: path or URI of the folder.
        names: names of the layout in it.
    """
    named = _CACHE_FOLDER.fullmatch(folder.rpartition("/")[2])
    assert named is not None, folder
    if "manifest.json" in names:
        try:
            manifest = storage.read_json(CacheLayout(folder, 1).manifest)
        except StorageError:
            return False
        recipe = manifest.get("recipe") if isinstance(manifest, dict) else None
        return recipe is not None and digest_json(recipe).startswith(named["fingerprint"])
    shards = [name for name in names if re.fullmatch(rf"{_GENERATION}/[^/]+", name)]
    marks = (_fingerprint(storage.join(folder, name)) for name in shards[:SHARDS_TRIED])
    return any(mark.startswith(named["fingerprint"]) for mark in marks) if shards else True


def _fingerprint(shard: str) -> str:
    """Fingerprint that a shard names; empty if it names none."""
    try:
        with StoredFile(shard) as file:
            metadata = pq.read_schema(file).metadata or {}
    except (pa.ArrowException, OSError, UnicodeDecodeError, StorageError):
        return ""
    return metadata.get(b"polystill.fingerprint", b"").decode(errors="replace")
