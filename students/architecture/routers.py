"""Routers of mixture-of-experts models: the balance loss that their configs ask for."""

from __future__ import annotations

from typing import Any

from pipeline.errors import ConfigError


def refuse_ignored_balance(model_config: Any) -> None:
    """Refuses a config by which transformers would add a loss that is not computed here.

    Raises:
        ConfigError: the config asks for the routers' balance loss.
    """
    settings = model_config.get_text_config()
    share = getattr(settings, "router_aux_loss_coef", None)
    if getattr(settings, "output_router_logits", False) and share:
        raise ConfigError(
            "the student's config sets output_router_logits, so that transformers adds "
            f"{share:g} (router_aux_loss_coef) times the balance loss of the routers, and no loss "
            "here computes it; use a copy of student.model whose config sets "
            "output_router_logits to false"
        )
