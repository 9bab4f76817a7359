"""The LM head of a model, and what follows it on the way to the logits."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from pipeline.errors import TrainingError

LM_HEAD_SETTINGS = {
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "lm_head_multiplier": (None, 1, 1.0),
}
"""Settings of the LM head in Hugging Face configs that the losses do not follow, with the values
that change nothing. The losses do follow soft-capped logits.
"""


def refuse_lm_head_settings(settings: dict) -> None:
    """Refuses architectures whose logits are more than LM head times hidden state, soft-capped or
    not.

    Raises:
        TrainingError: a setting adds a step that the losses do not compute; the message names it.
    """
    for name, neutral in LM_HEAD_SETTINGS.items():
        if settings.get(name) not in neutral:
            raise TrainingError(
                f"the student's model config sets {name}={settings[name]}, but the losses compute "
                "logits as LM head times last hidden state, without that step: choose another "
                f"student.model, or remove {name} from its config if you train from scratch"
            )


def lm_head_of(model: PreTrainedModel) -> nn.Linear:
    """The LM head of a model.

    Raises:
        TrainingError: the model has no LM head, or one that is not a plain matrix.
    """
    lm_head = model.get_output_embeddings()
    if not isinstance(lm_head, nn.Linear):
        raise TrainingError(
            f"the student {type(model).__name__} has {type(lm_head).__name__} as LM head, but the "
            "losses need a linear one: this architecture is not supported, choose another "
            "student.model"
        )
    return lm_head


def logit_softcap(model: PreTrainedModel) -> float | None:
    """The bound of a model whose logits are `softcap tanh(logits / softcap)`; None of others."""
    return model.config.to_dict().get("final_logit_softcapping") or None
