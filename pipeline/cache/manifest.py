"""The manifest of a cache: its totals and engines, published together with the index.

Index and manifest are derived from the shards and can be rebuilt at any time. Nobody needs a lock:
all writers of one shard write the same rows, and each publisher looks again after it has written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer
from typing_extensions import TypedDict

from pipeline import storage
from pipeline.cache.generations import current_generation
from pipeline.cache.hidden_states import HiddenStatesFigures
from pipeline.cache.index import load_index, read_index, shard_files, write_index
from pipeline.cache.logprobs import DistributionFigures
from pipeline.cache.shard import ShardEntry
from pipeline.layout import CacheLayout

MANIFEST_REMEDY = "remove it, and the next command that scores writes it from the shards"


class CacheTotals(BaseModel):
    """Size and quality of one generation of a cache.

    A figure that this kind of cache does not have is None, and absent from JSON.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_shards: int
    """Shards that exist."""
    num_sequences: int
    """Sequences with a row, each counted once."""
    num_positions: int
    """Positions of these sequences."""
    num_bytes: int
    """Bytes of all shard files."""
    bytes_per_token: float | None = None
    """Bytes per position."""
    mean_norm: float | None = None
    """Mean length of a hidden state; caches of hidden states alone."""
    entries_per_position: float | None = None
    """Mean number of kept entries of a position."""
    kept_mass: float | None = None
    """Mean probability inside the kept entries; with draws, inside the captured ones."""
    kept_mass_p01: float | None = None
    """The 1st percentile of the kept mass in the worst shard."""
    tail_nats: float | None = None
    """Nats that the tail bucket costs; selections without draws alone."""
    lost_mass: float | None = None
    """Mean probability outside the captured entries; selections with draws alone."""
    draw_variance: float | None = None
    """Mean variance that draws give the estimate; selections with draws alone."""
    gold_logprob: float | None = None
    """Mean log-probability of the gold tokens in nats, masked ones left out."""
    num_masked_gold: int | None = None
    """Gold tokens of all shards that the teacher gives no probability."""

    @model_serializer(mode="wrap")
    def _without_absent_figures(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: figure for name, figure in serialize(self).items() if figure is not None}


class Manifest(BaseModel):
    """The manifest of a cache, about its current generation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    recipe: dict[str, Any]
    """Identity under which the rows were made; its hash is in the folder's name."""
    generation: int
    """Number of the current generation."""
    provenance: dict[str, Any]
    """The teacher, and under `engines` everything that made rows of the generation."""
    totals: CacheTotals


def publish(
    cache: CacheLayout,
    identity: dict[str, Any],
    provenance: dict[str, Any],
    written: Container[str] = (),
) -> Manifest:
    """Writes index and manifest from the shards that exist; returns the manifest.

    The manifest names the newest complete generation: one older than that gets its index alone.
    Several jobs may publish one cache at once: each lists the shards again after it has written, so
    that the last one to write leaves index and manifest of every shard.

    Args:
        identity: dict whose hash names the folder of the cache.
        provenance: statement about the teacher, beside the engines that shards name.
        written: digests of shards that the caller wrote: the index may know other shards of these
            names, even of the same size.

    Raises:
        CorruptShardError: a shard that the index does not know fails its checks.
    """
    while True:
        entries = load_index(cache, written)
        write_index(cache, entries)
        manifest = Manifest(
            recipe=identity,
            generation=cache.generation,
            provenance=provenance | {"engines": origins(entries)},
            totals=totals(entries),
        )
        if cache.generation >= current_generation(cache.folder):
            storage.write_json(cache.manifest, manifest.model_dump())
        if is_published(cache):
            return manifest


class _Stored(TypedDict):
    """Manifest as JSON, as far as it is compared with an index."""

    generation: int
    provenance: dict[str, Any]
    totals: dict[str, float]


class _Recipe(TypedDict):
    """Manifest as JSON, as far as it names the identity of the rows."""

    recipe: dict[str, Any]


def recipe_of(folder: str) -> dict[str, Any]:
    """Identity of the rows of a cache, from its manifest.

    Raises:
        CorruptFileError: the manifest is damaged.
    """
    manifest = CacheLayout(folder, 1).manifest
    return storage.read_json(manifest, _Recipe, MANIFEST_REMEDY)["recipe"]


def is_published(cache: CacheLayout) -> bool:
    """Whether the index has exactly the shards that exist, and the manifest agrees with it."""
    entries = read_index(cache)
    if entries is None or [entry.digest for entry in entries] != list(shard_files(cache)):
        return False
    return storage.exists(cache.manifest) and manifest_fits(cache, entries)


def manifest_fits(cache: CacheLayout, entries: Sequence[ShardEntry]) -> bool:
    """Whether the manifest has the totals and engines of an index; true as well when the manifest
    is about another generation.
    """
    manifest = storage.read_json(cache.manifest, _Stored, MANIFEST_REMEDY)
    if manifest["generation"] != cache.generation:
        return True
    if manifest["provenance"].get("engines") != origins(entries):
        return False
    written, expected = manifest["totals"], totals(entries).model_dump()
    # Sums are added in another order on other machines.
    return written.keys() == expected.keys() and all(
        math.isclose(written[name], expected[name], rel_tol=1e-12) for name in expected
    )


def origins(entries: Iterable[ShardEntry]) -> list[dict[str, Any]]:
    """Everything that made rows, such as engines, each once, in the order of the shards."""
    distinct = {json.dumps(entry.origin): entry.origin for entry in entries}
    return [origin for origin in distinct.values() if origin is not None]


def totals(entries: Sequence[ShardEntry]) -> CacheTotals:
    """Sums over sequences, each counted once, in the shard from which its row is read; bytes and
    masked gold tokens are sums over all shards.

    Qualities are means over positions, where a shard's mean stands for each of its sequences.
    """
    positions_of: dict[str, int] = {}
    weights = np.zeros(len(entries))
    for i, entry in enumerate(entries):
        for identifier, num_positions in zip(entry.sequence_ids, entry.positions, strict=True):
            if identifier not in positions_of:
                positions_of[identifier] = num_positions
                weights[i] += num_positions
    num_positions = int(weights.sum())
    num_bytes = sum(entry.num_bytes for entry in entries)
    sizes = CacheTotals(
        num_shards=len(entries),
        num_sequences=len(positions_of),
        num_positions=num_positions,
        num_bytes=num_bytes,
    )
    if num_positions == 0:
        return sizes
    weights /= num_positions
    shards = [entry.figures for entry in entries]
    hidden_states = [figures for figures in shards if isinstance(figures, HiddenStatesFigures)]
    distributions = [figures for figures in shards if isinstance(figures, DistributionFigures)]
    assert not (hidden_states and distributions), "a cache holds one kind of rows"
    quality = (
        _hidden_states_quality(hidden_states, weights)
        if hidden_states
        else _distributions_quality(distributions, weights)
    )
    return sizes.model_copy(update={"bytes_per_token": num_bytes / num_positions, **quality})


def _hidden_states_quality(
    shards: Sequence[HiddenStatesFigures], weights: np.ndarray
) -> dict[str, float]:
    return {"mean_norm": float(weights @ [shard.mean_norm for shard in shards])}


def _distributions_quality(
    shards: Sequence[DistributionFigures], weights: np.ndarray
) -> dict[str, float]:
    kept_mass = float(weights @ [shard.kept_mass for shard in shards])
    density = np.divide(
        [shard.num_entries for shard in shards], [shard.num_positions for shard in shards]
    )
    return {
        "entries_per_position": float(weights @ density),
        "kept_mass": kept_mass,
        "kept_mass_p01": min(shard.kept_mass_p01 for shard in shards),
        **_selection_cost([shard.draw_variance for shard in shards], weights, kept_mass),
        "gold_logprob": float(weights @ [shard.gold_logprob for shard in shards]),
        "num_masked_gold": sum(shard.num_masked_gold for shard in shards),
    }


def _selection_cost(
    variances: Sequence[float | None], weights: np.ndarray, kept_mass: float
) -> dict[str, float]:
    """Cost of the selection: nats of the mass in tail buckets, or lost mass and draws' variance."""
    if None in variances:
        return {"tail_nats": float(-np.log(kept_mass))}
    return {
        "lost_mass": 1 - kept_mass,
        "draw_variance": float(weights @ np.array(variances)),
    }
