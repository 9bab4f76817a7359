"""Routers of mixture-of-experts models: the balance loss that their configs ask for."""

from __future__ import annotations

from transformers import PretrainedConfig

from pipeline.errors import TrainingError

SHARES = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
"""Names of the balance loss's weight in configs: most models, JetMoe, DBRX."""


def refuse_ignored_balance(config: PretrainedConfig) -> None:
    """Refuses a config by which transformers would add a loss that is not computed here.

    Raises:
        TrainingError: the config asks for the routers' balance loss.
    """
    settings = config.get_text_config()
    if not getattr(settings, "output_router_logits", False):
        return
    owners = [settings, getattr(settings, "ffn_config", None)]
    found = {name: getattr(o, name) for o in owners for name in SHARES if hasattr(o, name)}
    if found and not any(found.values()):
        return
    share = " and ".join(f"{name}: {value:g}" for name, value in found.items()) or "its weight"
    raise TrainingError(
        "the student's config sets output_router_logits, so that transformers adds the balance "
        f"loss of the routers ({share}), and no loss here computes it: use a copy of student.model "
        "whose config sets output_router_logits to false"
    )
