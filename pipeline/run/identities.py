"""Identities: everything that decides the bytes of an answer or of a cache row, and nothing else.

An identity is a JSON value, and its digest names a folder. Every vLLM key of a teacher enters it,
except the neutral ones below, which change speed and memory only. Replicas, paths and host names
never enter.
"""

from __future__ import annotations

from typing import Any

from pipeline.cache import hidden_states, logprobs
from pipeline.cache.kinds import hidden_states_of, teacher_of
from pipeline.config.filters import Judge
from pipeline.config.run import Config
from pipeline.config.synthesis import Answer, Answering, GivenAnswers, Recipe
from pipeline.config.teachers import EndpointTeacherConfig, TeacherConfig
from pipeline.fingerprint import digest_bytes, digest_json, exact_json
from pipeline.layout import CacheLayout, Layout
from pipeline.synthesis.rewriting import preference_template, rubric_of, templates_of

SYNTHESIS_SCHEMA_VERSION = 3
"""Schema version of answered shards."""

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


def _engine_identity(teacher: TeacherConfig | EndpointTeacherConfig) -> dict[str, Any]:
    """The settings of a teacher, beside its model, that can change its numbers or answers."""
    if isinstance(teacher, EndpointTeacherConfig):
        # `model_identity` stands for everything else that the endpoint runs.
        arguments = teacher.endpoint.template_arguments
        told = {"chat_template_kwargs": arguments} if arguments else {}
        return told | teacher.endpoint.model_dump(mode="json", include={"request", "reasoning"})
    decisive = {key: x for key, x in teacher.vllm.items() if key not in NEUTRAL_ENGINE_KEYS}
    return exact_json(decisive)


def scoring_identity(
    config: Config, teacher: str, identity: dict[str, str], tokenizer_hash: str
) -> dict[str, Any]:
    """The identity that names the folder of a teacher's distributions.

    Args:
        identity: identity of the teacher's model.
    """
    return {
        "model": identity,
        "tokenizer": tokenizer_hash,
        "num_logprobs": config.scoring.num_logprobs,
        "selection": config.scoring.selection.model_dump(mode="json"),
        "vllm": _engine_identity(config.teachers[teacher]),
        "schema_version": logprobs.SCHEMA_VERSION,
    }


def hidden_states_identity(
    config: Config, teacher: str, identity: dict[str, str], tokenizer_hash: str
) -> dict[str, Any]:
    """The identity that names the folder of the hidden states of a teacher that a loss needs.

    Args:
        identity: identity of the teacher's model.
    """
    stored = config.scoring.features
    projected = stored.dimensions is not None
    return {
        "model": identity,
        "tokenizer": tokenizer_hash,
        "layers": list(config.training.teacher_layers[teacher]),
        "projection": {"signs": "PCG64", **stored.model_dump()} if projected else None,
        "dtype": "bfloat16",
        "vllm": _engine_identity(config.teachers[teacher]),
        "schema_version": hidden_states.SCHEMA_VERSION,
    }


def cache_identities(
    config: Config, identities: dict[str, dict[str, str]], tokenizer_hash: str
) -> dict[str, dict[str, Any]]:
    """Identities of all caches of the teachers that score, by cache name.

    Args:
        identities: identities of the teachers' models (`teachers/preflight/identity.py`), by
            teacher; teachers that do not score are left out.
    """
    scoring = config.scoring_teachers
    known = {name: identity for name, identity in identities.items() if name in scoring}
    distributions = {
        name: scoring_identity(config, name, identity, tokenizer_hash)
        for name, identity in known.items()
    }
    states = {
        hidden_states_of(name): hidden_states_identity(config, name, known[name], tokenizer_hash)
        for name in known
        if name in config.training.teacher_layers
    }
    return distributions | states


def provenance_of(config: Config, name: str) -> dict[str, Any]:
    """Origin of a cache, for its manifest: the teacher and its model. Shards name their engines.

    Args:
        name: name of the cache.
    """
    teacher = teacher_of(name)
    settings = config.teachers[teacher]
    if isinstance(settings, TeacherConfig):
        return {"teacher": teacher, "model": settings.model}
    return {"teacher": teacher, "endpoint_model": settings.endpoint.model}


def synthesis_identity(
    config: Config,
    recipe: Recipe,
    author: str,
    identity: dict[str, str],
    tokenizer_hash: str,
    chat_end: int | None = None,
) -> dict[str, Any]:
    """The identity that names the folder of a step's answered shards.

    Prompts, and with them system prompts and filled templates, are no part of it: answered shards
    know prompts by their content.

    Args:
        identity: identity of the author's model; unused for given answers.
        chat_end: token that ends a given answer to a chat, if it is not the end-of-sequence token.

    Raises:
        ConfigError: a template cannot be used.
    """
    common = {
        "type": recipe.type,
        "generator": author,
        "tokenizer": tokenizer_hash,
        "schema_version": SYNTHESIS_SCHEMA_VERSION,
    }
    if isinstance(recipe, GivenAnswers):
        if chat_end is not None:
            common |= {"chat_end": chat_end}
        return common | {"max_sequence_tokens": config.synthesis.max_sequence_tokens}
    common |= {
        "model": identity,
        "sampling": exact_json(sampling_of(recipe, author)),
        "vllm": _engine_identity(config.author(author)),
        "seed": config.seed,
    }
    if isinstance(recipe, Answer) and recipe.keep_truncated:
        common |= {"keep_truncated": True}
    if isinstance(recipe, Answering):
        return common | {
            "samples_per_prompt": recipe.samples_per_prompt,
            "max_sequence_tokens": config.synthesis.max_sequence_tokens,
        }
    texts = templates_of(recipe)
    return common | {
        "templates": {name: digest_bytes(text.encode()) for name, text in texts.items()}
    }


def judging_identity(
    config: Config, rule: Judge, identity: dict[str, str], tokenizer_hash: str
) -> dict[str, Any]:
    """The identity that names the folder of a judge's grades.

    Args:
        identity: identity of the judge's model.

    Raises:
        ConfigError: the rubric cannot be used.
    """
    return {
        "judge": identity,
        "tokenizer": tokenizer_hash,
        "rubric": digest_bytes(rubric_of(rule).encode()),
        "vllm": _engine_identity(config.teachers[rule.teacher]),
        "schema_version": SYNTHESIS_SCHEMA_VERSION,
    }


def preference_identity(
    config: Config, judge: str, identity: dict[str, str], tokenizer_hash: str
) -> dict[str, Any]:
    """The identity that names the folder of a judge's replies about pairs of answers.

    Args:
        judge: name of the teacher that judges.
        identity: identity of its model.
    """
    return {
        "judge": identity,
        "tokenizer": tokenizer_hash,
        "template": digest_bytes(preference_template().encode()),
        "vllm": _engine_identity(config.teachers[judge]),
        "schema_version": SYNTHESIS_SCHEMA_VERSION,
    }


def sampling_of(recipe: Recipe, author: str) -> dict[str, Any]:
    """SamplingParams of a step; empty for given answers."""
    if isinstance(recipe, GivenAnswers):
        return {}
    own = recipe.sampling_of.get(author, {}) if isinstance(recipe, Answering) else {}
    return recipe.sampling | own


def cache_layout(layout: Layout, name: str, identity: dict[str, Any]) -> CacheLayout:
    """Folder of a cache, in its first generation.

    Args:
        name: name of the cache.
        identity: identity of the cache.
    """
    return layout.cache(name, digest_json(identity))
