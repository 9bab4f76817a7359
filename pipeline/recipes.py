"""Recipes: what decides the bytes of an answer or of a cache row, and nothing else.

Every vLLM key of a teacher enters its recipe except the neutral ones below, which change speed and
memory only. Replicas, paths and host names never enter.
"""

from __future__ import annotations

from typing import Any

from pipeline import cache_features, cache_logprobs
from pipeline.config import Config, TeacherConfig
from pipeline.features import features_of
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout, Layout

SYNTHESIS_SCHEMA_VERSION = 2
"""Of the records of finished prompt shards."""

NEUTRAL_ENGINE_KEYS = frozenset(
    {
        "block_size",
        "cpu_offload_gb",
        "data_parallel_size",
        "disable_log_stats",
        "distributed_executor_backend",
        "download_dir",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "max_logprobs",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_seqs",
        "pipeline_parallel_size",
        "skip_tokenizer_init",
        "swap_space",
        "tensor_parallel_size",
    }
)
DATASET_GENERATOR = "dataset"


def _engine(teacher: TeacherConfig) -> dict[str, Any]:
    return {key: value for key, value in teacher.vllm.items() if key not in NEUTRAL_ENGINE_KEYS}


def scoring_recipe(
    config: Config, teacher: str, identity: dict[str, str], tokenizer_hash: str
) -> dict[str, Any]:
    """The recipe that names the folder of a teacher's distributions."""
    return {
        "model": identity,
        "tokenizer": tokenizer_hash,
        "num_logprobs": config.scoring.num_logprobs,
        "selection": config.scoring.selection.model_dump(mode="json"),
        "vllm": _engine(config.teachers[teacher]),
        "schema_version": cache_logprobs.SCHEMA_VERSION,
    }


def feature_recipe(
    config: Config, teacher: str, identity: dict[str, str], tokenizer_hash: str
) -> dict[str, Any]:
    """The recipe that names the folder of a teacher's hidden states, which a loss asks for."""
    stored = config.scoring.features
    projected = stored.dimensions is not None
    return {
        "model": identity,
        "tokenizer": tokenizer_hash,
        "layers": list(config.training.teacher_layers[teacher]),
        "projection": {"signs": "PCG64", **stored.model_dump()} if projected else None,
        "dtype": "bfloat16",
        "vllm": _engine(config.teachers[teacher]),
        "schema_version": cache_features.SCHEMA_VERSION,
    }


def cache_recipes(
    config: Config, identities: dict[str, dict[str, str]], tokenizer_hash: str
) -> dict[str, dict[str, Any]]:
    """By name of the cache, the recipes of all that the teachers' caches are to hold.

    Args:
        identities: by teacher, from `teachers/identity.py`; other teachers are left out.
    """
    known = {name: identity for name, identity in identities.items() if name in config.teachers}
    distributions = {
        name: scoring_recipe(config, name, identity, tokenizer_hash)
        for name, identity in known.items()
    }
    features = {
        features_of(name): feature_recipe(config, name, known[name], tokenizer_hash)
        for name in config.training.teacher_layers
        if name in known
    }
    return distributions | features


def synthesis_recipe(
    config: Config, teacher: str, identity: dict[str, str], tokenizer_hash: str
) -> dict[str, Any]:
    """The recipe that names the folder of a teacher's finished prompt shards."""
    return {
        "generator": teacher,
        "model": identity,
        "tokenizer": tokenizer_hash,
        "sampling": config.synthesis.sampling,
        "samples_per_prompt": config.synthesis.samples_per_prompt,
        "max_sequence_tokens": config.synthesis.max_sequence_tokens,
        "vllm": _engine(config.teachers[teacher]),
        "seed": config.seed,
        "schema_version": SYNTHESIS_SCHEMA_VERSION,
    }


def dataset_recipe(config: Config, tokenizer_hash: str) -> dict[str, Any]:
    """The recipe of sequences made from given references."""
    return {
        "generator": DATASET_GENERATOR,
        "tokenizer": tokenizer_hash,
        "max_sequence_tokens": config.synthesis.max_sequence_tokens,
        "schema_version": SYNTHESIS_SCHEMA_VERSION,
    }


def cache_layout(
    layout: Layout, name: str, recipe: dict[str, Any], generation: int = 1
) -> CacheLayout:
    """Where the cache of that name and recipe lies."""
    return layout.cache(name, digest_json(recipe), generation)
