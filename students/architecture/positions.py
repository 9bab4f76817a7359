"""Positions that depend on the length of what is computed together.

transformers chooses the rotary frequencies of LongRoPE (arXiv 2402.13753) and of dynamic NTK
scaling for a whole batch, by its largest position. A sequence shall have those that it has alone,
as transformers computes it, whatever its neighbours. So micro-batches never mix the two sides of
LongRoPE's bound, and dynamic scaling, whose frequencies are others for every length, is refused
above the length where it begins.
"""

from __future__ import annotations

from typing import Any

from pipeline.errors import ConfigError
from pipeline.rope import rope_settings


def refuse_dynamic_scaling(model_config: Any, longest: int | None) -> None:
    """Refuses sequences so long that dynamic NTK scaling would change their frequencies.

    Args:
        longest: most tokens of a sequence; None if nothing bounds them.

    Raises:
        ConfigError: sequences may be longer than `max_position_embeddings` of such a model.
    """
    if all("dynamic" not in str(each.get("rope_type")) for each in rope_settings(model_config)):
        return
    bound = int(model_config.get_text_config().max_position_embeddings)
    if longest is None or longest > bound:
        raise ConfigError(
            f"synthesis.max_sequence_tokens is {longest}, but the student's config has rope_type "
            f"dynamic: above its max_position_embeddings ({bound}) the positions of a sequence "
            "depend on the longest sequence that is computed beside it; lower "
            f"synthesis.max_sequence_tokens to at most {bound}, or use a copy of the student with "
            "another rope_type, such as yarn"
        )
