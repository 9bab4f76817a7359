"""LongRoPE: rotary embeddings with one set of factors for short and one for long sequences.

transformers chooses by the length of each sequence. An engine has one set for all, chosen by its
`max_model_len`: the long factors beyond the context that the model was first trained with. The
engines of a teacher must all choose alike, so only `vllm.max_model_len` can choose the long
factors, and the teacher's identity names them.
"""

from __future__ import annotations

from typing import Any

from pipeline.errors import TeacherError
from pipeline.rope import length_bounds, rope_settings
from teachers.protocol import EngineSpec


def first_context(config: Any) -> int | None:
    """Tokens beyond which the long factors apply; None for models without LongRoPE.

    Args:
        config: text config of the model from transformers.
    """
    return min(length_bounds(config), default=None)


def uses_long_factors(vllm: dict[str, Any], config: Any) -> bool:
    """Whether engines with a `vllm:` block compute with the long factors.

    Args:
        config: text config of the model from transformers.
    """
    context, most = first_context(config), vllm.get("max_model_len")
    return context is not None and isinstance(most, int) and most > context


def check_context(spec: EngineSpec, config: Any) -> None:
    """Refuses sequences that would choose the long factors unasked.

    Args:
        spec: specification of the engine.
        config: text config of the model from transformers.

    Raises:
        TeacherError: a sequence is longer than the first context of the model, and the `vllm:`
            block names no `max_model_len`.
    """
    context = first_context(config)
    if context is not None and "max_model_len" not in spec.vllm and spec.min_model_len > context:
        raise TeacherError(
            f"{spec.model}: the longest sequence needs {spec.min_model_len} tokens, and beyond "
            f"{context} the model has other rotary factors (LongRoPE), with which an engine would "
            "compute short sequences too: set vllm.max_model_len above that to use them for all "
            f"sequences, or synthesis.max_sequence_tokens below {context}"
        )


def with_long_factors(config: Any) -> Any:
    """Sets the long factors for sequences of every length, as an engine has them.

    Args:
        config: text config of the model from transformers, which is changed.
    """
    for rope in rope_settings(config):
        if rope.get("rope_type") == "longrope":
            rope["short_factor"] = rope["long_factor"]
    return config
