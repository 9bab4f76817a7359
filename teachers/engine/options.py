"""Checks of engine arguments and sampling parameters against the installed vLLM.

`teachers/engine/arguments.py` has the checks that need no vLLM, and the keys that are ours.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.messages import short
from teachers.engine import arguments

if TYPE_CHECKING:
    from vllm import SamplingParams

_FAULTS_OF_VALUES = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)
"""Errors of vLLM's code where it trusts a value to be of its type."""


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
    arguments.check_sizes(block)
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


def answer_parameters(sampling: dict[str, Any], end_ids: Sequence[int]) -> SamplingParams:
    """Parameters of a request for an answer; this imports vLLM, which takes seconds.

    Args:
        sampling: the `sampling:` block.
        end_ids: tokens that end answers. Without a tokenizer vLLM knows only those of the model's
            generation config.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    ends = () if sampling.get("ignore_eos") else end_ids
    fixed: dict[str, Any] = sampling | {
        "stop_token_ids": [*(sampling.get("stop_token_ids") or ()), *ends],
        "detokenize": False,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    return SamplingParams(**fixed)


@dataclass(frozen=True)
class ServedModel:
    """Stand-in for vLLM's config of a model, with all that its checks of a request read.

    Attributes:
        vocabulary: number of rows of the model's vocabulary.
        vllm: the `vllm:` block of its engines.
    """

    vocabulary: int
    vllm: Mapping[str, Any] = field(default_factory=dict)
    max_logprobs: int = 0
    is_diffusion: bool = False

    def get_vocab_size(self) -> int:
        """Rows of the vocabulary, under the name that vLLM has for it."""
        return self.vocabulary


def check_sampling_values(block: dict[str, Any], model: ServedModel | None = None) -> None:
    """Lets vLLM judge the values of a `sampling:` block; this imports vLLM, which takes seconds.

    A request goes through the same: its parameters are made, verified against the model, and sent
    to the engine's process, which would end at values of another type.

    Args:
        block: the `sampling:` block.
        model: model whose engines take the block; None if it is asked over HTTP, or not read yet.

    Raises:
        ConfigError: vLLM refuses a value; its key is named.
    """
    if (error := _refusal(block, model)) is None:
        return
    needed = {"max_tokens": block.get("max_tokens", 1)}
    for key, value in block.items():
        alone = _refusal(needed | {key: value}, model)
        if alone is not None:
            raise ConfigError(
                f"vLLM refuses the sampling parameter {key}: {short(repr(value), 200)}: "
                f"{short(alone, 500)}: correct it"
            )
    raise ConfigError(
        f"vLLM refuses the sampling parameters {short(repr(block), 500)} together: "
        f"{short(error, 500)}: correct them"
    )


def _refusal(block: dict[str, Any], model: ServedModel | None) -> str | None:
    """Reason for which vLLM would fail a request with a `sampling:` block; None if it would not."""
    import msgspec
    from vllm import SamplingParams
    from vllm.exceptions import VLLMError
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    try:
        parameters = answer_parameters(block, ())
        if model is not None:
            config: Any = model
            parameters.verify(config, model.vllm.get("speculative_config"), None, None)
            MsgpackDecoder(SamplingParams).decode(MsgpackEncoder().encode(parameters))
    except _FAULTS_OF_VALUES as error:
        return f"a value of another kind is needed ({error})"
    except (VLLMError, ValueError, msgspec.MsgspecError) as error:
        return str(error)
    reasons = {"reasoning_parser", "reasoning_config"}
    if model is not None and "thinking_token_budget" in block and not reasons & model.vllm.keys():
        return "it needs vllm.reasoning_parser, which tells thoughts from the rest"
    return None


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
