"""Checks of engine arguments and sampling parameters against the installed vLLM.

`teachers/engine/arguments.py` has the checks that need no vLLM, and the keys that are ours.
"""

from __future__ import annotations

import ast
from collections.abc import Set
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
    known = declared_fields("engine/arg_utils.py", "EngineArgs", "AsyncEngineArgs")
    arguments.check_names("vllm", block, known, arguments.OWNED_ENGINE_ARGUMENTS)
    arguments.check_capture(block, num_logprobs)
    if hidden_states:
        arguments.check_hidden_states(block)


def check_sampling_parameters(
    block: dict[str, Any], samples_per_prompt: int = 1, endpoint_apis: Set[str] = frozenset()
) -> None:
    """Checks a `sampling:` block, all but the values that vLLM itself judges.

    Args:
        block: the `sampling:` block.
        samples_per_prompt: number of answers to each prompt.
        endpoint_apis: kinds of the endpoints that the block is sent to.

    Raises:
        ConfigError: vLLM does not know a key (the closest one is named), a key is ours,
            `max_tokens` is missing (vLLM's default of 16 would cut answers), greedy sampling is
            asked for several answers, or an endpoint would ignore a key.
    """
    known = declared_fields("sampling_params.py", "SamplingParams")
    arguments.check_engine_sampling(block, known, samples_per_prompt)
    for api in sorted(endpoint_apis):
        arguments.check_endpoint_sampling(block, api)


def check_sampling_values(block: dict[str, Any]) -> None:
    """Lets vLLM judge the values of a `sampling:` block; this imports vLLM, which takes seconds.

    Raises:
        ConfigError: vLLM refuses a value.
    """
    from vllm import SamplingParams
    from vllm.exceptions import VLLMError

    try:
        SamplingParams(**block)
    except (VLLMError, TypeError, ValueError) as error:
        raise ConfigError(f"vLLM refuses the sampling parameters {block}: {error}") from error


@cache
def declared_fields(file: str, *classes: str) -> frozenset[str]:
    """Public fields that classes of the installed vLLM declare.

    They are read from the source, since importing vLLM takes seconds.

    Args:
        file: path of the module inside the package.
    """
    package = find_spec("vllm")
    assert package is not None and package.origin is not None, "the lock file installs vLLM"
    tree = ast.parse(Path(package.origin).parent.joinpath(file).read_text(encoding="utf-8"))
    return frozenset(
        line.target.id
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        if not line.target.id.startswith("_")
    )
