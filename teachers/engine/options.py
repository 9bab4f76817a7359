"""Checks of engine arguments and sampling parameters against the installed vLLM.

`teachers/engine/arguments.py` has the checks that need no vLLM, and the keys that are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import VLLMError

from pipeline.errors import ConfigError
from teachers.engine import arguments


def check_engine_arguments(
    block: dict[str, Any], num_logprobs: int = 0, hidden_states: bool = False
) -> None:
    """Checks a `vllm:` block before any hardware is asked for.

    Args:
        block: the `vllm:` block of a teacher or of the student.
        num_logprobs: capture width; 0 if the engine only generates.
        hidden_states: hidden states are captured too.

    Raises:
        ConfigError: vLLM does not know a key (the closest one is named), a key is ours, or a value
            contradicts the capture.
    """
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    arguments.check_names("vllm", block, known, arguments.OWNED_ENGINE_ARGUMENTS)
    arguments.check_capture(block, num_logprobs)
    if hidden_states:
        arguments.check_hidden_states(block)


def check_sampling_parameters(
    block: dict[str, Any], samples_per_prompt: int = 1, endpoint_apis: Set[str] = frozenset()
) -> None:
    """Checks a `sampling:` block before any hardware is asked for.

    Args:
        block: the `sampling:` block.
        samples_per_prompt: number of answers to each prompt.
        endpoint_apis: kinds of the endpoints that the block is sent to.

    Raises:
        ConfigError: vLLM does not know a key (the closest one is named), a key is ours,
            `max_tokens` is missing (vLLM's default of 16 would cut answers), vLLM refuses a value,
            greedy sampling is asked for several answers, or an endpoint would ignore a key.
    """
    known = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    arguments.check_engine_sampling(block, known, samples_per_prompt)
    for api in sorted(endpoint_apis):
        arguments.check_endpoint_sampling(block, api)
    try:
        SamplingParams(**block)
    except (VLLMError, TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses the sampling parameters {block}: {error}") from error
