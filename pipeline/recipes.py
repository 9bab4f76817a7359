"""Recipes: what decides the bytes of an answer or of a cache row, and nothing else.

Every vLLM key of a teacher enters its recipe except the neutral ones below, which change speed and
memory only. Replicas, paths and host names never enter.
"""

from __future__ import annotations

from typing import Any

from pipeline.cache import SCHEMA_VERSION
from pipeline.config import Config, TeacherConfig
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
    """The recipe that names a teacher's cache folder; `identity` is from `teachers/identity.py`."""
    return {
        "model": identity,
        "tokenizer": tokenizer_hash,
        "num_logprobs": config.scoring.num_logprobs,
        "selection": config.scoring.selection.model_dump(mode="json"),
        "vllm": _engine(config.teachers[teacher]),
        "schema_version": SCHEMA_VERSION,
    }


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
    layout: Layout, teacher: str, recipe: dict[str, Any], generation: int = 1
) -> CacheLayout:
    """Where the cache of a recipe lies."""
    return layout.cache(teacher, digest_json(recipe), generation)
