"""Engine arguments and sampling parameters: the user's keys, our keys, our defaults.

This module imports no vLLM: `teachers/engine/options.py` passes the names that the installed vLLM
knows.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Set
from typing import Any

from pipeline.config.teachers import RequestChanges
from pipeline.errors import ConfigError, TeacherError
from pipeline.messages import closest, short
from teachers.protocol import EngineSpec

OWNED_ENGINE_ARGUMENTS = {
    "model": "the teacher's `model` sets it",
    "revision": "the teacher's `revision` sets it",
    "trust_remote_code": "the teacher's `trust_remote_code` sets it",
}
HIDDEN_STATES_ARGUMENTS = ("speculative_config", "kv_transfer_config")
CAPTURED = "the score stage captures distributions, not the writing of an answer"
OWNED_SAMPLING_PARAMETERS = {
    "n": "samples_per_prompt sets it",
    "seed": "it is derived from the config's seed, for each prompt and sample",
    "logprobs": CAPTURED,
    "prompt_logprobs": CAPTURED,
    "flat_logprobs": CAPTURED,
    "detokenize": "answers are taken as token ids",
    "output_kind": "only finished answers are used",
    "stop": "it needs text, but answers are taken as token ids; use stop_token_ids",
    "bad_words": "it needs a tokenizer in the engine, which has none; use logit_bias",
    "structured_outputs": "it needs a tokenizer in the engine, which has none",
    "logprob_token_ids": CAPTURED,
    "prompt_logprob_token_ids": CAPTURED,
    "prompt_logprob_start": CAPTURED,
    "trace_decode_token_ids": "it gives the answer, which models shall write",
    "output_text_buffer_length": "vLLM sets it for each request",
    "skip_clone": "vLLM sets it for each request",
}

OPENAI_PARAMETERS = frozenset(
    {"frequency_penalty", "logit_bias", "max_tokens", "presence_penalty", "temperature", "top_p"}
)
COMPLETION_PARAMETERS = OPENAI_PARAMETERS | {
    "allowed_token_ids",
    "ignore_eos",
    "min_p",
    "min_tokens",
    "repetition_detection",
    "repetition_penalty",
    "stop_token_ids",
    "thinking_token_budget",
    "top_k",
}
SIZES = frozenset(
    {
        *("data_parallel_size", "max_model_len", "max_num_batched_tokens", "max_num_seqs"),
        *("pipeline_parallel_size", "tensor_parallel_size"),
    }
)
"""Engine arguments that say how much of something there is."""
CPU_BLOCK_SIZE = 32  # tokens; vLLM's own 128 would cache nothing of a short prompt
ENDPOINT_PARAMETERS = {"vllm": COMPLETION_PARAMETERS, "openai": OPENAI_PARAMETERS}
"""Sampling parameters that each kind of endpoint honours; servers silently ignore all others."""


def check_names(place: str, block: dict[str, Any], known: Set[str], owned: dict[str, str]) -> None:
    """Checks the keys of a block that is passed on unchanged.

    Args:
        place: name of the block, for the message.
        block: the block.
        known: keys that vLLM knows.
        owned: keys that we set, each with the reason why the user cannot.

    Raises:
        ConfigError: a key is unknown (the closest known key is named) or set by us.
    """
    for key in block:
        if key in owned:
            raise ConfigError(f"{place}.{key} is not accepted: {owned[key]}")
        if key not in known:
            close = difflib.get_close_matches(key, sorted(known - owned.keys()), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{place}.{key} is unknown to the installed vLLM{hint}")


def check_engine_sampling(block: dict[str, Any], known: Set[str], samples_per_prompt: int) -> None:
    """Checks a `sampling:` block as far as possible without vLLM.

    Args:
        block: the `sampling:` block.
        known: parameters that vLLM knows.
        samples_per_prompt: number of answers to each prompt.

    Raises:
        ConfigError: a key is unknown or ours, `max_tokens` is missing, or greedy sampling is asked
            for several answers.
    """
    check_names("sampling", block, known, OWNED_SAMPLING_PARAMETERS)
    most = block.get("max_tokens")
    if not isinstance(most, int) or isinstance(most, bool):
        raise ConfigError(
            f"sampling.max_tokens must be a whole number, not {short(repr(most))}: set the largest "
            "length of an answer in tokens"
        )
    if most < 1:
        raise ConfigError(f"sampling.max_tokens is {most}: set it to 1 or more")
    _check_numbers("sampling", block)
    if block.get("temperature") == 0 and samples_per_prompt > 1:
        raise ConfigError(
            f"sampling.temperature is 0, so the {samples_per_prompt} answers to a prompt would be "
            "the same: raise it, or set samples_per_prompt to 1"
        )


def _check_numbers(place: str, value: Any) -> None:
    """Refuses what would make every probability not-a-number.

    Raises:
        ConfigError: a value is not-a-number, or infinite but for a bias of minus infinity.
    """
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            _check_numbers(f"{place}.{key}", item)
        return
    is_ban = value == -math.inf and place.startswith("sampling.logit_bias.")
    if isinstance(value, float) and not math.isfinite(value) and not is_ban:
        raise ConfigError(f"{place} is {value}, with which nothing can be drawn: give a number")


def check_endpoint_sampling(block: dict[str, Any], api: str) -> None:
    """Checks that an endpoint would honour every key of a `sampling:` block.

    Raises:
        ConfigError: the endpoint would ignore a key.
    """
    for key in block:
        if key not in ENDPOINT_PARAMETERS[api]:
            raise ConfigError(
                f"an endpoint with `api: {api}` ignores sampling.{key}: leave it out; the endpoint "
                f"honours {', '.join(sorted(ENDPOINT_PARAMETERS[api]))}, and takes fields of its "
                "own from endpoint.request.extra"
            )
        if isinstance(block[key], dict) and any(
            isinstance(value, float) and not math.isfinite(value) for value in block[key].values()
        ):
            raise ConfigError(
                f"sampling.{key} is {short(repr(block[key]))}, and requests to an endpoint are "
                "JSON, which has no infinity: write -100, the strongest bias"
            )


def check_request_changes(changes: RequestChanges, api: str) -> None:
    """Checks that an endpoint's `request` changes fields that requests have.

    Raises:
        ConfigError: no request has the field; the closest one is named.
    """
    known = ENDPOINT_PARAMETERS[api] | {"seed"}
    for kind, names in {"rename": changes.rename, "omit": changes.omit}.items():
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"endpoint.request.{kind}: no request has a field {name!r}; "
                    f"{closest(name, known)}"
                )


def check_sizes(block: dict[str, Any]) -> None:
    """Checks that the sizes in a `vllm:` block are numbers of something.

    Raises:
        ConfigError: a size is no whole number above 0.
    """
    for key in SIZES & block.keys():
        size = block[key]
        is_automatic = size is None or (key == "max_model_len" and size == -1)
        if not is_automatic and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ConfigError(
                f"vllm.{key} must be a whole number above 0, not {short(repr(size))}: correct it, "
                "or leave it out"
            )


def check_capture(block: dict[str, Any], num_logprobs: int) -> None:
    """Checks that a `vllm:` block does not contradict the capture.

    Raises:
        ConfigError: `max_logprobs` is below the capture width, or `logprobs_mode` is not
            `raw_logprobs`.
    """
    width = block.get("max_logprobs", -1)
    if not isinstance(width, int):
        raise ConfigError(
            f"vllm.max_logprobs must be a whole number, not {short(repr(width))}: leave it out"
        )
    if width != -1 and width < num_logprobs:
        raise ConfigError(
            f"vllm.max_logprobs ({width}) is below scoring.num_logprobs ({num_logprobs}); "
            "leave vllm.max_logprobs out"
        )
    mode = block.get("logprobs_mode", "raw_logprobs")
    if mode != "raw_logprobs":
        raise ConfigError(
            f"vllm.logprobs_mode is {mode!r}, but the cache holds raw_logprobs, at temperature 1; "
            "leave it out"
        )


def check_hidden_states(block: dict[str, Any]) -> None:
    """Checks that a `vllm:` block leaves room for the capture of hidden states.

    Raises:
        ConfigError: the block sets an argument of that capture, or an engine on several nodes,
            whose workers would write hidden states to disks that the actor cannot read.
    """
    for key in HIDDEN_STATES_ARGUMENTS:
        if key in block:
            raise ConfigError(
                f"vllm.{key} is not accepted: a loss needs hidden states, whose capture sets it"
            )
    if block.get("distributed_executor_backend") == "ray":
        raise ConfigError(
            "vllm.distributed_executor_backend is ray, but a loss needs hidden states, which are "
            "captured within one node only: leave it out, or drop the loss"
        )


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """Builds the arguments of an engine: the user's, and our defaults for those not named.

    Our defaults: `max_model_len` is the longest sequence + 1; `gpu_memory_utilization` is 0.85,
    since prompt log-probabilities are not in vLLM's memory profile; `skip_tokenizer_init` is on,
    since only token ids are exchanged; `disable_log_stats` is on; `distributed_executor_backend` is
    `uni` for one device and `mp` for several; `seed` is the seed of the specification. An engine
    that scores also has `max_logprobs`, the capture width, `logprobs_mode` `raw_logprobs`, and
    prefix caching if sequences share prompts.

    Raises:
        TeacherError: `vllm.max_model_len` is below the longest sequence + 1.
    """
    max_model_len = spec.vllm.get("max_model_len")
    if isinstance(max_model_len, int) and 0 < max_model_len < spec.min_model_len:
        raise TeacherError(
            f"{spec.model}: vllm.max_model_len ({max_model_len}) is below the longest sequence + 1 "
            f"({spec.min_model_len}): raise it, leave it out, or lower "
            "synthesis.max_sequence_tokens"
        )
    sizes = [spec.vllm.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline")]
    defaults: dict[str, Any] = {
        "max_model_len": spec.min_model_len,
        "gpu_memory_utilization": 0.85,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "distributed_executor_backend": "uni" if max(sizes) == 1 else "mp",
        "seed": spec.seed,
    }
    if spec.num_logprobs:
        defaults |= {
            "max_logprobs": spec.num_logprobs,
            "logprobs_mode": "raw_logprobs",
            "enable_prefix_caching": spec.share_prefixes,
        }
    owned = {
        "model": spec.model,
        "revision": spec.revision,
        "trust_remote_code": spec.trust_remote_code,
    }
    return defaults | spec.vllm | owned


def cpu_arguments(
    spec: EngineSpec, chosen: dict[str, Any], has_inner_state: bool
) -> dict[str, Any]:
    """Completes the arguments of an engine on a CPU, where vLLM 0.32 cannot do all that it can do
    on a GPU.

    Args:
        chosen: arguments from `engine_arguments`.
        has_inner_state: layers of the model carry a state from token to token, as those of Mamba
            and other hybrids do. vLLM keeps a prefix cache of states by cutting prompts, and its
            kernels for CPUs fail at that.

    Raises:
        TeacherError: the `vllm:` block asks for the prefix cache of a model with such layers.
    """
    if has_inner_state:
        if spec.vllm.get("enable_prefix_caching"):
            raise TeacherError(
                f"{spec.model}: vllm.enable_prefix_caching is true, but some layers carry a state "
                "from token to token, and vLLM cannot cache that on a CPU: leave it out"
            )
        chosen = chosen | {"enable_prefix_caching": False}
    if chosen.get("enable_prefix_caching"):
        chosen = {"block_size": CPU_BLOCK_SIZE} | chosen
    if "max_num_batched_tokens" not in chosen:
        # A step that cuts a prompt with a seed in two kills vLLM 0.32's engine on a CPU.
        chosen = {"enable_chunked_prefill": False} | chosen
    return chosen
