"""The student model, and the one module that DeepSpeed gets: transformer body, LM head and losses
in one forward.

The LM head is applied inside the losses, a chunk of positions at a time, and its weight is read
inside the forward of this module: that is where ZeRO-3 gathers it, tied to the embeddings or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.config.student import StudentConfig
from pipeline.errors import TrainingError
from students.initial_weights import load_initial_weights
from students.losses.chunk import figure_names
from students.losses.distillation import distillation_loss, position_figures, weighted_total
from students.losses.divergences import DistributionLoss
from students.losses.hidden_states import HiddenStatesLosses
from students.micro_batch import MicroBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest difference between two ways to the same logits, relative to the largest logit."""
LM_HEAD_SETTINGS = {
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "lm_head_multiplier": (None, 1, 1.0),
}
"""Settings of the LM head in Hugging Face configs that the losses do not follow, with the values
that change nothing. The losses do follow soft-capped logits.
"""


def build_student(config: StudentConfig, seed: int) -> PreTrainedModel:
    """The student on the CPU in its training dtype; random weights depend on the seed alone, not on
    the rank.

    Raises:
        TrainingError: the student cannot be loaded, its logits are not LM head times last hidden
            state, or the weights to start from do not fit it.
    """
    source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    options = {"dtype": DTYPES[config.dtype], "attn_implementation": config.attn_implementation}
    try:
        model_config = AutoConfig.from_pretrained(config.model, **source)
        refuse_lm_head_settings(model_config.to_dict())
        if config.initialization == "pretrained" and config.initial_weights is None:
            model = AutoModelForCausalLM.from_pretrained(
                config.model, use_safetensors=True, **source, **options
            )
        else:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                trust = config.trust_remote_code
                # drawn in float32 and then cast, so that the dtype does not change the draw
                model = AutoModelForCausalLM.from_config(
                    model_config, trust_remote_code=trust, **options | {"dtype": torch.float32}
                ).to(options["dtype"])
    except (OSError, ImportError) as error:
        raise TrainingError(f"student.model {config.model!r} cannot be loaded: {error}") from error
    if config.initial_weights is not None:
        load_initial_weights(model, config.initial_weights, config.trust_remote_code)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


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


class StudentModule(nn.Module):
    """A causal language model with its losses; the export takes `model` alone."""

    def __init__(
        self,
        model: PreTrainedModel,
        losses: tuple[DistributionLoss, ...],
        hidden_states_losses: HiddenStatesLosses | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.losses = losses
        # the attribute's name is part of the parameters' names in checkpoints
        self.features = hidden_states_losses
        self.softcap = logit_softcap(model)

    @property
    def figure_names(self) -> tuple[str, ...]:
        """Names of the figures that `forward` measures; last the losses on hidden states."""
        on_hidden_states = () if self.features is None else self.features.losses
        return (*figure_names(self.losses), *(loss.name for loss in on_hidden_states))

    def total(self, figures: torch.Tensor) -> torch.Tensor:
        """The weighted sum of all losses among figures of shape [F] or [F, P]."""
        known = len(figure_names(self.losses))
        total = weighted_total(figures[:known], self.losses)
        if self.features is not None:
            for loss, values in zip(self.features.losses, figures[known:], strict=True):
                total = total + loss.weight * values
        return total

    def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The fields of `LossSums` in training mode, of `PositionFigures` in evaluation mode.
        Figures of losses on hidden states follow the others.

        Returns a plain tuple, since ZeRO-3 hangs the gather for the backward pass on output tensors
        and looks for them in tuples, lists and dictionaries only.
        """
        layers = () if self.features is None else self.features.layers
        hidden_TH, by_layer = body_layers(self.model, batch.input_ids, batch.position_ids, layers)
        hidden_PH = hidden_TH[batch.logit_indices]
        # read here and not kept: ZeRO-3 gathers a parameter that is read inside the forward of this
        # module
        lm_head = lm_head_of(self.model)
        arguments = (hidden_PH, lm_head.weight, lm_head.bias, batch.targets, self.losses)
        values_EP = hidden_PH.new_zeros(0, len(hidden_PH), dtype=torch.float32)
        if self.features is not None:
            assert batch.hidden_states is not None, "such a training's batches have hidden states"
            at_positions = {layer: by_layer[layer][batch.logit_indices] for layer in layers}
            values_EP = self.features(at_positions, batch.hidden_states)
        if not self.training:
            measured = position_figures(*arguments, softcap=self.softcap)
            return torch.cat([measured.figures, values_EP]), measured.argmax_ids
        sums = distillation_loss(*arguments, softcap=self.softcap)
        values_E, total = values_EP.sum(dim=1), sums.total
        on_hidden_states = () if self.features is None else self.features.losses
        for loss, value in zip(on_hidden_states, values_E, strict=True):
            total = total + loss.weight * value
        return total, torch.cat([sums.figures, values_E.detach()])


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


def load_model(
    folder: str | Path, trust_remote_code: bool = False, device: str = "cpu"
) -> PreTrainedModel:
    """The model in a Hugging Face folder, in its own dtype, for inference."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code, use_safetensors=True
    )
    nn.Module.to(model, torch.device(device))
    return model.eval()


def body_hidden_states(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """[R T, H]: last hidden states, see `body_layers`."""
    return body_layers(model, input_ids, position_ids, ())[0]


def body_layers(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    layers: Sequence[int],
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """[R T, H]: last hidden states of one packed row, or of padded rows one after another; and the
    hidden states after each of `layers`, as transformers counts them.

    For a packed row transformers builds the block-diagonal mask from `position_ids`, but only
    without a cache of keys and values: with `use_cache=True` its sequences would see one another.
    """
    body: nn.Module = model.base_model
    options: dict[str, Any] = {} if position_ids is None else {"position_ids": position_ids}
    if layers:
        options["output_hidden_states"] = True
    output = body(input_ids=input_ids, use_cache=False, **options)
    by_layer = {layer: output.hidden_states[layer].flatten(0, 1) for layer in layers}
    return output.last_hidden_state.flatten(0, 1), by_layer


@torch.no_grad()
def check_architecture(model: PreTrainedModel, packing: bool) -> None:
    """Checks on a few tokens that LM head times last hidden state, soft-capped as in the model,
    gives the model's logits, and that sequences that are computed together do not see one another.

    Raises:
        TrainingError: logits differ; the message has the difference.
    """
    was_training = model.training
    model.eval()
    lm_head = lm_head_of(model)
    vocabulary = lm_head.out_features
    first, second = (torch.arange(n, device=model.device) * 7 % vocabulary for n in (5, 4))
    alone = torch.cat(
        [model(input_ids=ids[None], use_cache=False).logits[0] for ids in (first, second)]
    )
    if packing:
        places = torch.cat([torch.arange(len(ids), device=model.device) for ids in (first, second)])
        hidden_TH = body_hidden_states(model, torch.cat([first, second])[None], places[None])
    else:
        rows = torch.stack([first, torch.nn.functional.pad(second, (0, 1))])
        hidden_TH = body_hidden_states(model, rows, None)[:-1]
    together, softcap = lm_head(hidden_TH), logit_softcap(model)
    if softcap is not None:
        together = softcap * torch.tanh(together / softcap)
    difference = ((together - alone).abs().amax(dim=1) / alone.abs().max()).float().cpu()
    model.train(was_training)
    tolerance = LOGIT_TOLERANCE[model.dtype]
    if difference.max() <= tolerance:
        return
    size = f"by {difference.max():.3g} of the largest logit (tolerance {tolerance})"
    unsupported = "this architecture is not supported, choose another student.model"
    if difference[: len(first)].max() > tolerance:
        raise TrainingError(
            f"LM head times last hidden state of {type(model).__name__} differs from the model's "
            f"own logits {size}: {unsupported}"
        )
    raise TrainingError(
        f"{type(model).__name__} lets {'packed' if packing else 'padded'} sequences see one "
        f"another, since their logits differ from those of each sequence alone {size}: "
        + ("set training.packing: false" if packing else unsupported)
    )
