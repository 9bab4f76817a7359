"""Canaries: token sequences that every engine scores before its first task, and their comparison.

The short canary proves the capture. Its rows are compared between the replicas of one teacher,
since replicas that disagree would write two teachers into one cache; the rows of the engine that
starts a cache are kept beside the cache and compared with every later engine. The full step is the
largest step that scoring can cause: prompt log-probabilities are not in vLLM's memory profile, so
an engine with too little memory must fail here and not hours later.

Axis names: P positions, K entries.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from typing_extensions import TypedDict

from pipeline import storage
from pipeline.errors import TeacherError
from teachers.noise import mean_tolerance, state_tolerance
from teachers.protocol import Canary, CapturedRows, Comparison, EngineSpec

logger = logging.getLogger(__name__)
CANARY_TOKENS = 33
LOWEST_LOGPROB = -60.0  # stands for the -inf of a masked token, so that differences stay finite


def check_endpoint_canary(path: str, name: str, canary: Canary) -> None:
    """Compares an endpoint with the first canary under its identity, or stores the first one.

    Args:
        path: file of the first canary.
        name: name of the endpoint, for the message.
        canary: canary that the endpoint has scored now.

    Raises:
        TeacherError: the mean difference exceeds what rounding explains (`teachers/noise.py`).
    """
    mean, tolerance = _distance_to_stored(path, canary), _tolerance(canary)
    if not mean <= tolerance:
        raise TeacherError(
            f"{name} disagrees with its first canary ({path}): {_clause(mean, canary, tolerance)}; "
            "if the endpoint serves another model or quantisation now, give the teacher another "
            "`model_identity`, so that its rows go to a cache of their own"
        )


FORGET = "remove it, and the next engine that scores into this cache writes it"


class _Stored(TypedDict):
    """The first canary of a cache as JSON."""

    engine: dict[str, Any]
    gold_and_head_logprobs: list[list[float]]


def check_cache_canaries(paths: Sequence[str], name: str, canary: Canary) -> None:
    """Compares an engine with the engines that started the caches which it is to fill.

    The canary of a cache that no engine has started is stored, with its comparison with
    transformers if there was one. Another version of the engine alone causes a warning.

    Args:
        paths: canary files of the caches.
        name: name of the teacher, for the message.
        canary: canary that the engine has scored.

    Raises:
        TeacherError: the engine computes in another dtype or quantisation, or the mean difference
            from the stored canary or from transformers exceeds what rounding explains.
    """
    if canary.comparison is not None:
        _check_comparison(name, canary.comparison)
    for path in paths:
        mean, stored = _distance_to_stored(path, canary), storage.read_json(path, _Stored, FORGET)
        tolerance = _tolerance(canary, stored.get("transformers", {}).get("noise", 0.0))
        first = stored["engine"]
        changes = {
            key: f"{key} {first[key]}, now {canary.engine[key]}"
            for key in ("dtype", "quantization", "engine_version")
            if first[key] != canary.engine[key]
        }
        if changes.keys() - {"engine_version"} or not mean <= tolerance:
            raise TeacherError(
                f"{name}: this engine disagrees with the one that started this cache ({path}): "
                f"{'; '.join([_clause(mean, canary, tolerance), *changes.values()])}; "
                "one cache cannot hold rows of both: set the first engine's dtype and quantisation "
                "in the teacher's `vllm:` block to continue this cache, set this engine's there to "
                "start a cache of its own, or score all rows again with "
                "`polystill cache regenerate CONFIG --force`"
            )
        if changes:
            logger.warning("%s: the cache was started with %s", name, changes["engine_version"])


def _check_comparison(name: str, comparison: Comparison) -> None:
    if comparison.reason is None and not comparison.mean <= comparison.tolerance:
        raise TeacherError(
            f"{name}: vLLM computes another model than transformers: their log-probabilities "
            f"differ by {comparison.mean:.4g} nats in the mean of {comparison.num_tokens} tokens "
            f"(signed {comparison.signed_mean:+.4g}, at most {comparison.largest:.4g}), and "
            f"rounding explains {comparison.tolerance:.2g}; try another `model_impl` or `dtype` in "
            f"the teacher's `vllm:` block, another version of vLLM, or another kind of device; if "
            f"vLLM is the one that is right, set teachers.{name}.compare_with_transformers: false"
        )


def check_replicas_agree(name: str, first: Canary, other: Canary) -> None:
    """Compares a replica with the first replica of its teacher.

    Raises:
        TeacherError: the replicas run another version, dtype or quantisation, or the mean
            difference exceeds what rounding explains.
    """
    for key in ("engine_version", "dtype", "quantization"):
        if first.engine[key] != other.engine[key]:
            raise TeacherError(
                f"{name}: replicas differ in {key}: {first.engine[key]} and {other.engine[key]}; "
                "one cache cannot hold rows of both: give all nodes the same vLLM and settings"
            )
    ours, theirs = _values(first), _values(other)
    if ours.shape != theirs.shape:
        raise TeacherError(
            f"{name}: replicas return {ours.shape} and {theirs.shape} log-probabilities for one "
            "canary: check that all nodes see the same model files"
        )
    difference = np.abs(ours - theirs)
    mean = float(difference.mean())
    tolerance = _tolerance(first)
    if not mean <= tolerance:
        position, column = np.unravel_index(int(difference.argmax()), difference.shape)
        place = "gold token" if column == 0 else f"entry {column}"
        raise TeacherError(
            f"{name}: replicas disagree: {_clause(mean, first, tolerance)}; farthest apart at "
            f"position {position}, {place}: {ours[position, column]:.5f} on "
            f"{first.engine['device']} and {theirs[position, column]:.5f} on "
            f"{other.engine['device']}; check that all nodes see the same model files and that "
            "their devices are sound"
        )


def _tolerance(canary: Canary, measured: float = 0.0) -> float:
    values = _values(canary)
    return mean_tolerance(canary.engine, values[values > LOWEST_LOGPROB], measured)


def _clause(mean: float, canary: Canary, tolerance: float) -> str:
    return (
        f"mean difference {mean:.4g} nats on the canary, tolerance {tolerance:.2g} "
        f"({canary.engine['dtype']})"
    )


def _distance_to_stored(path: str, canary: Canary) -> float:
    """Mean difference in nats from the stored canary; if none is stored, stores this one."""
    values = _values(canary)
    if not storage.exists(path):
        content = {"engine": canary.engine, "gold_and_head_logprobs": values.tolist()}
        if canary.comparison is not None:
            content["transformers"] = asdict(canary.comparison)
        storage.write_json(path, content)
        return 0.0
    stored = np.array(
        storage.read_json(path, _Stored, FORGET)["gold_and_head_logprobs"], np.float64
    )
    # A shorter context or a narrower capture leaves less to compare.
    rows, columns = np.minimum(stored.shape, values.shape)
    return float(np.abs(stored[:rows, :columns] - values[:rows, :columns]).mean())


def _values(canary: Canary) -> np.ndarray:
    """float64[P, 1 + K]: the gold token's log-probability, then those of the entries."""
    both = np.concatenate([canary.gold_logprobs[:, None], canary.top_logprobs], axis=1)
    return np.maximum(both.astype(np.float64), LOWEST_LOGPROB)


def canary_ids(length: int, vocabulary: int, number: int = 0) -> list[int]:
    """Token ids of a canary; two numbers below the vocabulary share no prefix."""
    return [(7 * i + 3 + number) % vocabulary for i in range(length)]


def full_step(length: int, vocabulary: int, max_step_tokens: int, max_seqs: int) -> list[list[int]]:
    """Sequences of the greatest length, enough to fill one step of the engine and one more.

    Args:
        length: tokens of each sequence.
        vocabulary: number of token ids.
        max_step_tokens: `max_num_batched_tokens` of the engine.
        max_seqs: `max_num_seqs` of the engine.
    """
    count = min(max_seqs, math.ceil(max_step_tokens / length) + 1)
    return [canary_ids(length, vocabulary, number) for number in range(count)]


def full_step_death(num_sequences: int, spec: EngineSpec, config: Any) -> str:
    """Message for an engine that died while it scored the full step.

    Args:
        num_sequences: number of sequences of the step.
        spec: specification of the engine.
        config: vLLM's config of the engine.
    """
    scheduler = config.scheduler_config
    return (
        f"{spec.model}: the engine died in the largest step that scoring can cause, "
        f"{num_sequences} sequences of {spec.min_model_len - 1} tokens with {spec.num_logprobs} "
        "log-probabilities per token, most likely because memory ran out (the engine's log names "
        f"the cause): lower vllm.gpu_memory_utilization "
        f"({config.cache_config.gpu_memory_utilization}), vllm.max_num_batched_tokens "
        f"({scheduler.max_num_batched_tokens}), vllm.max_num_seqs ({scheduler.max_num_seqs}) or "
        f"scoring.num_logprobs ({spec.num_logprobs})"
    )


def reason_not_to_share_prefixes(
    computed: CapturedRows, cached: CapturedRows, engine: Mapping[str, Any]
) -> str | None:
    """Reason why hidden states from the prefix cache are not reliable; None if they are.

    Args:
        computed: rows that were computed without the prefix cache.
        cached: rows of the same tokens, with the prefix cache.
        engine: metadata of the engine, with its `dtype` and `num_layers`.
    """
    one, other = computed.hidden_states, cached.hidden_states
    assert one is not None and other is not None, "the canary captures hidden states"
    if not cached.num_cached_tokens:
        return "the prefix cache held no token of the canary, so the canary shows nothing"
    difference, largest = np.abs(one - other).max(), np.abs(one).max()
    tolerance = state_tolerance(engine)
    if not difference <= tolerance * largest:
        return (
            "hidden states from the prefix cache differ from those computed anew by "
            f"{difference / largest:.2g} of the largest value, tolerance {tolerance:.2g} "
            f"({engine['dtype']})"
        )
    return None
