"""Canaries: what an engine scores before its first shard, and what is concluded from it.

A short one proves the capture and is compared between the replicas of one teacher, for replicas
that disagree would write two teachers into one cache; that of the engine which begins a cache is
kept beside it, for all later ones. A full one asks for the largest step that
scoring can cause: prompt log-probabilities are not in vLLM's memory profile, so an engine that has
too little memory must fail here and not hours later. A control is asked when items fail and nothing
else is left that could show whose fault it is.

Axis names: P positions, K entries.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.errors import TeacherError
from pipeline.records import Prompt
from teachers.protocol import Canary, CapturedRows, EngineSpec, ScoringRequest, Teacher

logger = logging.getLogger(__name__)
CANARY_TOKENS = 33
CONTROL_TOKENS, CONTROL_VOCABULARY = 4, 16  # few and low ids, which every model has
CONTROL_MESSAGE = {"role": "user", "content": "Say yes."}
LOWEST_LOGPROB = -60.0  # of what a model masks; keeps differences finite
MEAN_TOLERANCES = {"float32": 2e-3, "float16": 1e-2, "bfloat16": 6e-2}
"""Nats, mean over a canary's gold and head log-probabilities. bfloat16 stores a logit of 16 to
2**-4, float16 to 2**-7; float32 leaves room for TF32 products. Kernels and devices differ by less;
other weights, another quantisation or a broken device differ by more."""
STATE_TOLERANCES = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest difference of two captures of one hidden state, relative to the largest value: one was
computed in another batch. A state that was never written, or another token's, differs more."""


class ControlTask:
    """A task of no items that every sound teacher can do: rows of a few tokens, or of one that was
    started to generate alone, an answer of one token.
    """

    label = "a control"

    def __len__(self) -> int:
        return 0

    async def run(self, teacher: Teacher) -> None:
        """Asks for it.

        Raises:
            TeacherError: the teacher cannot do it.
        """
        input_ids = canary_ids(CONTROL_TOKENS, CONTROL_VOCABULARY)
        if teacher.can_score:
            await teacher.score(ScoringRequest(input_ids, 1))
            return
        prompt = Prompt("control", "control", "train", messages=(CONTROL_MESSAGE,))
        await teacher.generate(input_ids, {"max_tokens": 1}, 1, prompt)


def hold_to_first(path: str, name: str, found: Canary) -> None:
    """Compares an endpoint with what it said when it was first asked under its identity, which is
    written where nothing lies yet.

    Args:
        name: of the endpoint, for the message.

    Raises:
        TeacherError: it says something else by more than the tolerance of its dtype.
    """
    mean, tolerance = _distance_to_first(path, found), MEAN_TOLERANCES[str(found.engine["dtype"])]
    if not mean <= tolerance:
        raise TeacherError(
            f"{name} does not say of the canary what it said when it was first asked ({path}): "
            f"log-probabilities are {mean:.4g} nats apart on average, the tolerance for "
            f"{found.engine['dtype']} is {tolerance}. If another model or quantisation is served "
            "there now, give it another `model_identity`, and its rows go to a cache of their own"
        )


def hold_to_cache(paths: Sequence[str], name: str, found: Canary) -> None:
    """Compares an engine with those that began the caches which it is to fill; of a cache that
    nobody has begun it is the first. Another version of the engine is only said.

    Args:
        paths: of the caches' canaries.
        name: of the teacher, for the message.

    Raises:
        TeacherError: it computes in another dtype or quantisation, or says something else by more
            than the tolerance of its dtype.
    """
    for path in paths:
        mean, tolerance = (
            _distance_to_first(path, found),
            MEAN_TOLERANCES[str(found.engine["dtype"])],
        )
        first = storage.read_json(path)["engine"]
        changes = {
            key: f"{key} {first[key]}, now {found.engine[key]}"
            for key in ("dtype", "quantization", "engine_version")
            if first[key] != found.engine[key]
        }
        if changes.keys() - {"engine_version"} or not mean <= tolerance:
            raise TeacherError(
                f"{name}: this engine does not say of the canary what the one said that began the "
                f"cache ({path}): log-probabilities are {mean:.4g} nats apart on average, the "
                f"tolerance for {found.engine['dtype']} is {tolerance}"
                f"{''.join(f'; {change}' for change in changes.values())}. One cache cannot hold "
                "rows of both: name the first one's dtype and quantisation in the teacher's "
                "`vllm:` block, or this one's for a cache of its own, or score all rows anew with "
                "`polystill cache regenerate CONFIG --force`"
            )
        if changes:
            logger.warning("%s: the cache was begun with %s", name, changes["engine_version"])


def _distance_to_first(path: str, found: Canary) -> float:
    """Nats on average between a canary and the one stored, which it becomes where nothing lies."""
    values = _values(found)
    if not storage.exists(path):
        shown = {"engine": found.engine, "gold_and_head_logprobs": values.tolist()}
        storage.write_json(path, shown)
        return 0.0
    stored = np.array(storage.read_json(path)["gold_and_head_logprobs"], np.float64)
    # A shorter context or a narrower capture leaves less to compare.
    rows, columns = np.minimum(stored.shape, values.shape)
    return float(np.abs(stored[:rows, :columns] - values[:rows, :columns]).mean())


def died_of(step: str, spec: EngineSpec, config: Any) -> str:
    """What is said of an engine that the full canary killed.

    Args:
        step: how many sequences, tokens and log-probabilities that was.
        config: vLLM's.
    """
    scheduler = config.scheduler_config
    return (
        f"{spec.model}: the engine died of the largest step that scoring asks for, {step} "
        "log-probabilities each, most likely for want of memory (its log names the cause). "
        f"Lower vllm.gpu_memory_utilization ({config.cache_config.gpu_memory_utilization}), "
        f"vllm.max_num_batched_tokens ({scheduler.max_num_batched_tokens}), "
        f"vllm.max_num_seqs ({scheduler.max_num_seqs}) or scoring.num_logprobs "
        f"({spec.num_logprobs})"
    )


def doubt_of_shared_states(anew: CapturedRows, again: CapturedRows, dtype: str) -> str | None:
    """Why hidden states from the prefix cache cannot be relied on; None where they can.

    Args:
        anew: computed without that cache.
        again: of the same tokens, with it.
    """
    one, other = anew.hidden_states, again.hidden_states
    assert one is not None and other is not None, "they were asked for"
    if not again.num_cached_tokens:
        return "the canary found none of its tokens in the prefix cache, so it shows nothing"
    if not np.abs(one - other).max() <= STATE_TOLERANCES[dtype] * np.abs(one).max():
        return "hidden states from the prefix cache are not those computed anew"
    return None


def canary_ids(length: int, vocabulary: int, number: int = 0) -> list[int]:
    """Token ids of a canary; two numbers below the vocabulary share no prefix."""
    return [(7 * i + 3 + number) % vocabulary for i in range(length)]


def full_step(length: int, vocabulary: int, max_step_tokens: int, max_seqs: int) -> list[list[int]]:
    """Sequences of the longest length, as many as fill one step of the engine and one more.

    Args:
        max_step_tokens: `max_num_batched_tokens`.
        max_seqs: `max_num_seqs`.
    """
    count = min(max_seqs, math.ceil(max_step_tokens / length) + 1)
    return [canary_ids(length, vocabulary, number) for number in range(count)]


def refuse_difference(name: str, first: Canary, other: Canary) -> None:
    """Compares a replica with the first one of its teacher.

    Raises:
        TeacherError: they run another version, dtype or quantisation, or their log-probabilities
            are on average farther apart than the tolerance of the dtype.
    """
    for key in ("engine_version", "dtype", "quantization"):
        if first.engine[key] != other.engine[key]:
            raise TeacherError(
                f"{name}: replicas differ in {key}: {first.engine[key]} and {other.engine[key]}; "
                "one cache cannot hold both"
            )
    ours, theirs = _values(first), _values(other)
    if ours.shape != theirs.shape:
        raise TeacherError(
            f"{name}: replicas return {ours.shape} and {theirs.shape} values of one canary"
        )
    difference = np.abs(ours - theirs)
    tolerance = MEAN_TOLERANCES[str(first.engine["dtype"])]
    mean = float(difference.mean())
    if not mean <= tolerance:
        position, column = np.unravel_index(int(difference.argmax()), difference.shape)
        what = "gold token" if column == 0 else f"entry {column} of the head"
        raise TeacherError(
            f"{name}: replicas disagree on the same canary: log-probabilities are {mean:.4g} nats "
            f"apart on average, the tolerance for {first.engine['dtype']} is {tolerance}. Farthest "
            f"at position {position}, {what}: {ours[position, column]:.5f} on "
            f"{first.engine['device']} and {theirs[position, column]:.5f} on "
            f"{other.engine['device']}. Check that all nodes see the same model files and that "
            "their devices are sound"
        )


def _values(canary: Canary) -> np.ndarray:
    """float64[P, 1 + K]."""
    both = np.concatenate([canary.gold_logprobs[:, None], canary.head_logprobs], axis=1)
    return np.maximum(both.astype(np.float64), LOWEST_LOGPROB)
