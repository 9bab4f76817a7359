"""Rotary settings in a model's config, as transformers writes them."""

from __future__ import annotations

from typing import Any


def rope_settings(config: Any) -> list[dict[str, Any]]:
    """Rotary settings of a model's layers: one set for all, or one for each type of layer.

    Args:
        config: config of the model, or of its text part, from transformers.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    nested = [each for each in parameters.values() if isinstance(each, dict)]
    return nested or [parameters]


def longest_context(config: Any) -> int | None:
    """Most tokens that a model has positions for, as far as its config tells; engines take no more.

    Args:
        config: config of the model, or of its text part, from transformers.
    """
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    factors = [each.get("factor") or 1.0 for each in rope_settings(config)]
    return int(most * max([1.0, *factors]))


def length_bounds(config: Any) -> tuple[int, ...]:
    """Most tokens of the sequences that get LongRoPE's short factors; longer ones get the long
    factors. Empty for models without LongRoPE; several, in ascending order, if their layers differ.

    Args:
        config: config of the model, or of its text part, from transformers.
    """
    key, text = "original_max_position_embeddings", config.get_text_config()
    found = [each for each in rope_settings(config) if each.get("rope_type") == "longrope"]
    return tuple(sorted({int(each.get(key) or getattr(text, key)) for each in found}))
