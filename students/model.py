"""The one module that DeepSpeed gets: transformer body, LM head and losses in one forward.

The LM head is applied inside the losses, a chunk of positions at a time, and its weight is read
inside the forward of this module: that is where ZeRO-3 gathers it, tied to the embeddings or not.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from students.architecture.body import body_layers
from students.architecture.head import lm_head_of, logit_step
from students.losses.chunk import figure_names
from students.losses.distillation import distillation_loss, position_figures, weighted_total
from students.losses.divergences import DistributionLoss
from students.losses.hidden_states import HiddenStatesLosses
from students.micro_batch import MicroBatch


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
        self.step = logit_step(model)  # before DeepSpeed partitions the LM head

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
            measured = position_figures(*arguments, step=self.step)
            return torch.cat([measured.figures, values_EP]), measured.argmax_ids
        sums = distillation_loss(*arguments, step=self.step)
        values_E, total = values_EP.sum(dim=1), sums.total
        on_hidden_states = () if self.features is None else self.features.losses
        for loss, value in zip(on_hidden_states, values_E, strict=True):
            total = total + loss.weight * value
        return total, torch.cat([sums.figures, values_E.detach()])
