"""Engine arguments and sampling parameters: the user's keys, our keys, our defaults.

Pure: `teachers/engine/vllm_teacher.py` brings in the names that the installed vLLM knows.
"""

from __future__ import annotations

import difflib
from collections.abc import Set
from typing import Any

from pipeline.errors import ConfigError, TeacherError
from teachers.protocol import EngineSpec

OWNED_ENGINE_ARGUMENTS = {
    "model": "the teacher's `model` sets it",
    "revision": "the teacher's `revision` sets it",
    "trust_remote_code": "the teacher's `trust_remote_code` sets it",
}
STATE_CAPTURE_ARGUMENTS = ("speculative_config", "kv_transfer_config")
CAPTURED = "distributions are captured by scoring, not while an answer is written"
OWNED_SAMPLING_PARAMETERS = {
    "n": "samples_per_prompt sets it",
    "seed": "the config's seed sets it, another one for every prompt and sample",
    "logprobs": CAPTURED,
    "prompt_logprobs": CAPTURED,
    "flat_logprobs": CAPTURED,
    "detokenize": "answers are taken as token ids",
    "output_kind": "only finished answers are used",
    "stop": "it needs text, and answers are taken as token ids; use stop_token_ids",
    "bad_words": "it needs a tokenizer in the engine, which ignores it silently; use logit_bias",
    "structured_outputs": "it needs a tokenizer in the engine",
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
ENDPOINT_PARAMETERS = {"vllm": COMPLETION_PARAMETERS, "openai": OPENAI_PARAMETERS}
"""By kind of endpoint the SamplingParams that it honours; servers ignore others without a word."""


def check_names(place: str, block: dict[str, Any], known: Set[str], owned: dict[str, str]) -> None:
    """Checks the keys of a block that is passed on verbatim.

    Raises:
        ConfigError: a key is unknown (the closest known one is named) or set by us.
    """
    for key in block:
        if key in owned:
            raise ConfigError(f"{place}.{key} is not accepted: {owned[key]}")
        if key not in known:
            close = difflib.get_close_matches(key, sorted(known - owned.keys()), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{place}.{key} is unknown to the installed vLLM{hint}")


def check_sampling(block: dict[str, Any], known: Set[str], samples_per_prompt: int) -> None:
    """Checks a `sampling:` block as far as that goes without vLLM.

    Raises:
        ConfigError: a key is unknown or ours, `max_tokens` is missing, or greedy sampling is asked
            for several answers.
    """
    check_names("sampling", block, known, OWNED_SAMPLING_PARAMETERS)
    if not isinstance(block.get("max_tokens"), int):
        raise ConfigError(f"sampling.max_tokens must be a number, got {block.get('max_tokens')!r}")
    if block.get("temperature") == 0 and samples_per_prompt > 1:
        raise ConfigError(
            f"sampling.temperature is 0, so {samples_per_prompt} answers to a prompt would be alike"
        )


def check_endpoint_sampling(block: dict[str, Any], api: str) -> None:
    """Checks that an endpoint would honour a `sampling:` block.

    Raises:
        ConfigError: it has no parameter of that name.
    """
    for key in block:
        if key not in ENDPOINT_PARAMETERS[api]:
            raise ConfigError(
                f"sampling.{key} is nothing that an endpoint with api {api} honours; it takes "
                f"{', '.join(sorted(ENDPOINT_PARAMETERS[api]))}"
            )


def check_capture(block: dict[str, Any], num_logprobs: int) -> None:
    """Checks that a `vllm:` block does not contradict the capture.

    Raises:
        ConfigError: `max_logprobs` is below the capture width, or `logprobs_mode` is another than
            ours.
    """
    width = block.get("max_logprobs", -1)
    if width != -1 and width < num_logprobs:
        raise ConfigError(
            f"vllm.max_logprobs ({width}) is below scoring.num_logprobs ({num_logprobs}); "
            "leave it out"
        )
    mode = block.get("logprobs_mode", "raw_logprobs")
    if mode != "raw_logprobs":
        raise ConfigError(
            f"vllm.logprobs_mode is {mode!r}; targets need raw_logprobs, at temperature 1"
        )


def check_hidden_states(block: dict[str, Any]) -> None:
    """Checks that a `vllm:` block leaves room for the capture of hidden states.

    Raises:
        ConfigError: it sets what that capture needs, or an engine on several nodes, whose workers
            would write states where nobody reads them.
    """
    for key in STATE_CAPTURE_ARGUMENTS:
        if key in block:
            raise ConfigError(f"vllm.{key} is not accepted: a loss needs hidden states, set by it")
    if block.get("distributed_executor_backend") == "ray":
        raise ConfigError(
            "vllm.distributed_executor_backend is ray, but a loss needs hidden states, which are "
            "captured within one node only"
        )


def engine_arguments(spec: EngineSpec) -> dict[str, Any]:
    """The arguments that an engine is built from: the user's, and ours where the user names none.

    Ours: `max_model_len` the longest sequence + 1; `gpu_memory_utilization` 0.85, for prompt
    log-probabilities are not in vLLM's memory profile; `skip_tokenizer_init`, for token ids are the
    truth; `disable_log_stats`; `distributed_executor_backend` `uni` for one device and `mp` for
    several; `seed`. When scoring also `max_logprobs` the capture width, `logprobs_mode`
    `raw_logprobs`, and prefix caching where sequences share prompts.

    Raises:
        TeacherError: `vllm.max_model_len` is below the longest sequence + 1.
    """
    max_model_len = spec.vllm.get("max_model_len")
    if isinstance(max_model_len, int) and 0 < max_model_len < spec.min_model_len:
        raise TeacherError(
            f"{spec.model}: vllm.max_model_len ({max_model_len}) is below the longest sequence + 1 "
            f"({spec.min_model_len}); raise it, leave it out, or drop longer ones by "
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
