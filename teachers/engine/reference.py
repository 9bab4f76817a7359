"""Comparison of an engine with transformers, which computes the same model on the CPU.

Engines that agree with one another can all be wrong: an implementation may leave out a step of the
model, or attend to one token too many. The text is longer than the attention windows of the model,
as far as that is affordable.

Legend: P positions, K entries, V vocabulary.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from transformers import AutoConfig, AutoModelForCausalLM, BatchEncoding

from teachers.engine.hardware import weight_size
from teachers.noise import MULTIPLE, expected_noise
from teachers.protocol import CANARY_ENTRIES, CapturedRows, Comparison, EngineSpec
from teachers.rope import uses_long_factors, with_long_factors

FEWEST_TOKENS, MOST_TOKENS = 128, 1280
BEHIND_A_WINDOW = 64
"""Tokens of the text behind the largest window."""
MEMORY_SHARE = 0.5
"""Share of the free memory that the model may take, since other engines start at the same time."""
CGROUP = Path("/sys/fs/cgroup")
FAILURES = (ImportError, OSError, RuntimeError, ValueError, AttributeError, KeyError, TypeError)
"""Errors that transformers raises for models that it cannot load or run."""


def num_tokens(config: Mapping[str, Any], most: int) -> int:
    """Length of the text that is compared.

    Args:
        config: config of the model as a dictionary.
        most: number of tokens that the engine can score.
    """
    ends = [window + BEHIND_A_WINDOW for window in _windows(config)]
    reachable = [end for end in ends if end <= min(most, MOST_TOKENS)]
    return min(most, max([FEWEST_TOKENS, *reachable]))


def _windows(config: Mapping[str, Any]) -> Iterator[int]:
    """Sizes of the windows and chunks that a config and its parts name."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _windows(value)
        elif isinstance(value, int) and ("window" in key or "chunk" in key):
            yield value


def reason_not_to_compare(
    spec: EngineSpec, engine: Mapping[str, Any], text_tokens: int, vocabulary: int
) -> str | None:
    """Reason why an engine is not compared with transformers; None if it can be.

    Args:
        engine: metadata of the engine.
        text_tokens: length of the text.
        vocabulary: number of token ids.
    """
    if engine["quantization"] is not None or spec.vllm.get("kv_cache_dtype", "auto") != "auto":
        return "the engine computes with quantised numbers"
    num_parameters, _ = weight_size(spec.model, spec.revision)
    if num_parameters is None:
        return "the size of the weights is unknown, since they are no local safetensors"
    needed = 1.1 * 4 * num_parameters + 16 * text_tokens * vocabulary
    free = free_memory_bytes()
    if needed > MEMORY_SHARE * free:
        return (
            f"its weights in float32 need {needed / 2**30:.1f} GiB of the node's memory, and "
            f"{MEMORY_SHARE:.0%} of the free {free / 2**30:.1f} GiB may be taken"
        )
    return None


def free_memory_bytes() -> int:
    """Memory that this process may still take, within the limit of its container."""
    free = psutil.virtual_memory().available
    limit, used, stat = (CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if not limit.is_file() or limit.read_text().strip() == "max":
        return free
    counts = dict(line.split() for line in stat.read_text().splitlines())
    in_use = int(used.read_text()) - int(counts.get("inactive_file", 0))  # files can be dropped
    return min(free, int(limit.read_text()) - in_use)


def compare(
    spec: EngineSpec, engine: Mapping[str, Any], input_ids: list[int], rows: CapturedRows
) -> Comparison:
    """Compares the engine's rows with those that transformers computes in float32.

    The tolerance comes from the noise of transformers itself in the engine's dtype, which is the
    part of the difference that rounding explains. In float32 it is what rounding is expected to
    cause (`teachers/noise.py`).

    Args:
        engine: metadata of the engine.
        input_ids: the text.
        rows: rows of the engine from token 1 on.
    """
    gold_P1 = np.array(input_ids[1:])[:, None]
    ids_PK = np.concatenate([gold_P1, rows.token_ids[:, :CANARY_ENTRIES]], axis=1)
    ours_PK = np.concatenate([rows.gold_logprobs[:, None], rows.logprobs[:, :CANARY_ENTRIES]], 1)
    try:
        exact_PK = _logprobs(spec, "float32", input_ids, ids_PK)
        noise = expected_noise(engine, exact_PK)
        if engine["dtype"] != "float32":
            rounded_PK = _logprobs(spec, engine["dtype"], input_ids, ids_PK)
            noise = float(np.abs(_differences(rounded_PK, exact_PK)).mean())
    except FAILURES as error:
        return Comparison(f"transformers fails at it: {type(error).__name__}: {error}")
    differences = _differences(ours_PK, exact_PK)
    return Comparison(
        reason=None,
        num_tokens=len(input_ids),
        mean=float(np.abs(differences).mean()),
        signed_mean=float(differences.mean()),
        largest=float(np.abs(differences).max()),
        noise=noise,
        tolerance=MULTIPLE * noise,
    )


def _differences(one_PK: np.ndarray, other_PK: np.ndarray) -> np.ndarray:
    """Differences in nats, where at least one side is finite; a side that is not counts as far."""
    far = np.finfo(np.float16).min
    is_finite_PK = np.isfinite(one_PK) | np.isfinite(other_PK)
    one_PK, other_PK = (np.maximum(each.astype(np.float64), far) for each in (one_PK, other_PK))
    return (one_PK - other_PK)[is_finite_PK]


def _logprobs(spec: EngineSpec, dtype: str, input_ids: list[int], ids_PK: np.ndarray) -> np.ndarray:
    """float64[P, K]: log-probabilities of given tokens from transformers, with plain attention."""
    model = AutoModelForCausalLM.from_pretrained(
        spec.model,
        revision=spec.revision,
        trust_remote_code=spec.trust_remote_code,
        config=_config(spec),
        dtype=dtype,
        attn_implementation="eager",
    ).requires_grad_(False)
    batch = BatchEncoding({"input_ids": [input_ids]}, tensor_type="pt")
    logits_TV = model(**batch, use_cache=False).logits[0]
    del model
    gc.collect()  # models hold themselves in circles
    found_PK = np.empty(ids_PK.shape)
    for j, ids_K in enumerate(ids_PK):
        logits_V = logits_TV[j].double().numpy()
        largest = logits_V.max()
        found_PK[j] = logits_V[ids_K] - largest - math.log(np.exp(logits_V - largest).sum())
    return found_PK


def _config(spec: EngineSpec) -> Any:
    """Config of the model from transformers, with the rotary factors that the engine has."""
    config = AutoConfig.from_pretrained(
        spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code
    )
    if uses_long_factors(spec.vllm, config.get_text_config()):
        with_long_factors(config.get_text_config())
    return config
