"""The student model, and the one module that DeepSpeed gets: transformer body, LM head and losses
in one forward.

The head is applied inside the losses, a chunk of positions at a time, and its weight is read inside
the forward of this module: that is where ZeRO-3 gathers it, tied to the embeddings or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.config.student import StudentConfig
from pipeline.errors import TrainingError
from students.initial_weights import load_initial_weights
from students.losses.distillation import distillation_loss, position_figures, weighted_total
from students.losses.divergences import LossTerm
from students.losses.hidden_states import HiddenStatesLosses
from students.losses.outcomes import figure_names
from students.micro_batch import MicroBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOGIT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest difference of two ways to the same logits, relative to the largest logit."""
HEAD_SETTINGS = {
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "lm_head_multiplier": (None, 1, 1.0),
}
"""Settings of the head in Hugging Face configs that the losses do not follow, with the values under
which they do nothing. Soft-capped logits are followed.
"""


def build_student(config: StudentConfig, seed: int) -> PreTrainedModel:
    """The student on the CPU in its training dtype; random weights depend on the seed alone, not on
    the rank.

    Raises:
        TrainingError: the architecture does not compute its logits as LM head times last hidden
            state, or the weights to start from do not fit it.
    """
    source = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    options = {"dtype": DTYPES[config.dtype], "attn_implementation": config.attn_implementation}
    try:
        model_config = AutoConfig.from_pretrained(config.model, **source)
        refuse_head_settings(model_config.to_dict())
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
        raise TrainingError(f"cannot load the student {config.model!r}: {error}") from error
    if config.initial_weights is not None:
        load_initial_weights(model, config.initial_weights, config.trust_remote_code)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def refuse_head_settings(settings: dict) -> None:
    """Refuses architectures whose logits are more than LM head times hidden state, soft-capped or
    not.

    Raises:
        TrainingError: naming the setting.
    """
    for name, plain in HEAD_SETTINGS.items():
        if settings.get(name) not in plain:
            raise TrainingError(
                f"the student's config sets {name}={settings[name]}: the losses compute logits as "
                "LM head times last hidden state, without that step. Choose another student, or "
                "set it to nothing if you train from scratch."
            )


class StudentModule(nn.Module):
    """A causal language model with its losses; `model` is what is exported."""

    def __init__(
        self,
        model: PreTrainedModel,
        terms: tuple[LossTerm, ...],
        features: HiddenStatesLosses | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.terms = terms
        self.features = features
        self.softcap = logit_softcap(model)

    @property
    def figure_names(self) -> tuple[str, ...]:
        """Of all that `forward` measures; last the losses on hidden states."""
        own = () if self.features is None else self.features.terms
        return (*figure_names(self.terms), *(term.name for term in own))

    def total(self, figures: torch.Tensor) -> torch.Tensor:
        """The weighted sum of all losses among figures of shape [F] or [F, P]."""
        known = len(figure_names(self.terms))
        total = weighted_total(figures[:known], self.terms)
        if self.features is not None:
            for term, values in zip(self.features.terms, figures[known:], strict=True):
                total = total + term.weight * values
        return total

    def forward(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The fields of `LossSums` in training mode, of `PositionFigures` in evaluation mode.
        Figures of losses on hidden states follow the others.

        A plain tuple, since ZeRO-3 hangs the gather for the backward pass on output tensors and
        looks for them in tuples, lists and dictionaries only.
        """
        layers = () if self.features is None else self.features.layers
        hidden_TH, states = body_states(self.model, batch.input_ids, batch.position_ids, layers)
        hidden_PH = hidden_TH[batch.logit_indices]
        # read here and not kept: ZeRO-3 gathers a parameter that is read inside the forward of this
        # module
        head = output_head(self.model)
        arguments = (hidden_PH, head.weight, head.bias, batch.targets, self.terms)
        values_EP = hidden_PH.new_zeros(0, len(hidden_PH), dtype=torch.float32)
        if self.features is not None:
            assert batch.features is not None, "batches of such a training carry states"
            at_positions = {layer: states[layer][batch.logit_indices] for layer in layers}
            values_EP = self.features(at_positions, batch.features)
        if not self.training:
            found = position_figures(*arguments, softcap=self.softcap)
            return torch.cat([found.figures, values_EP]), found.argmax_ids
        sums = distillation_loss(*arguments, softcap=self.softcap)
        values_E, total = values_EP.sum(dim=1), sums.total
        for term, value in zip(self.features.terms if self.features else (), values_E, strict=True):
            total = total + term.weight * value
        return total, torch.cat([sums.figures, values_E.detach()])


def output_head(model: PreTrainedModel) -> nn.Linear:
    """The LM head.

    Raises:
        TrainingError: the model has none, or one that is not a plain matrix.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise TrainingError(
            f"{type(model).__name__} has {type(head).__name__} where a linear LM head is needed: "
            "this architecture is not supported"
        )
    return head


def logit_softcap(model: PreTrainedModel) -> float | None:
    """The bound of a model whose logits are `softcap tanh(logits / softcap)`."""
    return model.config.to_dict().get("final_logit_softcapping") or None


def load_model(
    folder: str | Path, trust_remote_code: bool = False, device: str = "cpu"
) -> PreTrainedModel:
    """A model of a Hugging Face folder in its own dtype, for inference."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code, use_safetensors=True
    )
    nn.Module.to(model, torch.device(device))
    return model.eval()


def body_hidden_states(
    model: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """[R T, H]: last hidden states, see `body_states`."""
    return body_states(model, input_ids, position_ids, ())[0]


def body_states(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor | None,
    layers: Sequence[int],
) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """[R T, H]: last hidden states of one packed row, or of padded rows one after another; and by
    layer those of `layers`, as transformers counts them.

    For a packed row transformers builds the block-diagonal mask from `position_ids`, but only
    without a cache of keys and values: with `use_cache=True` its sequences would see one another.
    """
    body: nn.Module = model.base_model
    places = {} if position_ids is None else {"position_ids": position_ids}
    wanted = {"output_hidden_states": True} if layers else {}
    output = body(input_ids=input_ids, use_cache=False, **places, **wanted)
    states = {layer: output.hidden_states[layer].flatten(0, 1) for layer in layers}
    return output.last_hidden_state.flatten(0, 1), states


@torch.no_grad()
def check_architecture(model: PreTrainedModel, packing: bool) -> None:
    """Checks on a few tokens that head times hidden, soft-capped if the model says so, gives the
    model's logits and that sequences that are computed together do not see one another.

    Raises:
        TrainingError: with the difference found.
    """
    was_training = model.training
    model.eval()
    head = output_head(model)
    first, second = (torch.arange(n, device=model.device) * 7 % head.out_features for n in (5, 4))
    alone = torch.cat(
        [model(input_ids=ids[None], use_cache=False).logits[0] for ids in (first, second)]
    )
    if packing:
        places = torch.cat([torch.arange(len(ids), device=model.device) for ids in (first, second)])
        hidden_TH = body_hidden_states(model, torch.cat([first, second])[None], places[None])
    else:
        rows = torch.stack([first, torch.nn.functional.pad(second, (0, 1))])
        hidden_TH = body_hidden_states(model, rows, None)[:-1]
    together, softcap = head(hidden_TH), logit_softcap(model)
    if softcap is not None:
        together = softcap * torch.tanh(together / softcap)
    difference = ((together - alone).abs().amax(dim=1) / alone.abs().max()).float().cpu()
    model.train(was_training)
    tolerance = LOGIT_TOLERANCE[model.dtype]
    if difference.max() <= tolerance:
        return
    place = f"by {difference.max():.3g} of the largest logit (tolerance {tolerance})"
    if difference[: len(first)].max() > tolerance:
        raise TrainingError(
            f"{type(model).__name__}: LM head times last hidden state differs from the model's own "
            f"logits {place}: this architecture is not supported"
        )
    raise TrainingError(
        f"{type(model).__name__} lets {'packed' if packing else 'padded'} sequences see one "
        f"another: logits differ {place} from those of the sequence alone: "
        + ("set training.packing: false" if packing else "this architecture is not supported")
    )
