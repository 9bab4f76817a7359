"""The LM head of a model, and the step that follows it on the way to the logits.

The step is measured and not looked up: architectures keep it under many names and on several levels
of their configs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import TrainingError
from students.losses.inputs import LogitStep

TOKENS = 16
POWERS = range(-14, 21)
"""Exponents of 2 of probed outputs: factors of these are exact, the smallest shows the slope of a
soft-cap and the largest its size.
"""
ROUNDING = 16
"""Roundings that a measured number may differ by: a soft-cap takes three operations and a tanh."""


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


@torch.no_grad()
def logit_step(model: PreTrainedModel) -> LogitStep:
    """The step from the LM head's outputs to the logits, measured.

    Body and LM head hand out chosen numbers during one call of the model's own forward. No weight
    is read, so the size and the device of the model do not matter.

    Raises:
        TrainingError: the losses do not compute such a step, or the model's forward does not go
            through its body and its LM head.
    """
    lm_head, name = lm_head_of(model), type(model).__name__
    device = "cpu" if lm_head.weight.is_meta else lm_head.weight.device
    hidden_1TH = _powers((1, TOKENS, lm_head.in_features), device).to(lm_head.weight.dtype)
    outputs_1TV = _outputs((1, TOKENS, lm_head.out_features), device)
    received: list[Tensor] = []

    def head(hidden: Tensor) -> Tensor:
        received.append(hidden)
        return outputs_1TV.clone()  # some models cap in place

    ids = torch.zeros((1, TOKENS), dtype=torch.int64, device=device)
    bodies = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    with ExitStack() as stack:
        for body in bodies:  # some models call their decoder past its wrapper
            stack.enter_context(_forward_of(body, lambda *_, **__: _Fed(hidden_1TH)))
        stack.enter_context(_forward_of(lm_head, head))
        stack.enter_context(torch.enable_grad())
        logits = model(input_ids=ids, use_cache=False).logits
    if len(received) != 1 or received[0].shape != hidden_1TH.shape:
        raise _unsupported(f"{name} does not compute its logits by its LM head from its body")
    if logits.shape != outputs_1TV.shape:
        raise _unsupported(
            f"{name} has {lm_head.out_features} rows in its LM head and {logits.shape[-1]} logits"
        )
    before = _fit(hidden_1TH, received[0])
    after = _fit(outputs_1TV, logits)
    if before is None or before.softcap is not None:
        raise _unsupported(f"{name} changes hidden states between its body and its LM head")
    if before.factor != 1 and lm_head.bias is not None:
        raise _unsupported(f"{name} scales hidden states before an LM head with a bias")
    if after is None:
        raise _unsupported(f"{name} changes its logits by more than a factor and a soft-cap")
    if received[0].requires_grad or logits.requires_grad:
        raise _unsupported(f"{name} trains its logits by weights beside its body and its LM head")
    config = model.config.to_dict()
    rounding = max(_rounding(received[0]), _rounding(logits))
    factor = _as_written(before.factor * after.factor, config, rounding)
    return LogitStep(factor, after.softcap and _as_written(after.softcap, config, rounding))


class _Fed(dict[Any, Any]):
    """The output of a body that gives last hidden states and nothing else."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        super().__init__(last_hidden_state=last_hidden_state)

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int | slice):
            return (self.last_hidden_state,)[key]
        return super().__getitem__(key)


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward of a module for a while."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _powers(shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """Signed powers of 2 in turn, from 1/8 to 8: every dtype holds them."""
    places = torch.arange(math.prod(shape), device=device)
    return (2.0 ** (places % 7 - 3) * (1 - 2 * (places % 2))).view(shape)


def _outputs(shape: tuple[int, ...], device: torch.device | str) -> Tensor:
    """float32 outputs of an LM head: signed powers of 2, and numbers between 0.1 and 100."""
    between = 10 ** torch.linspace(-1, 2, 128 - len(POWERS), dtype=torch.float64)
    values = torch.cat([2.0 ** torch.tensor(POWERS, dtype=torch.float64), between])
    values = (values * (1 - 2 * (torch.arange(128) % 2))).float().to(device)
    _, tokens, vocabulary = shape
    rows = torch.arange(tokens, device=device)[:, None] * 37
    return values[(rows + torch.arange(vocabulary, device=device)) % 128].view(shape)


def _rounding(found: Tensor) -> float:
    """Relative rounding of numbers that were computed from float32 or in their own dtype."""
    return ROUNDING * max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)


def _fit(given: Tensor, found: Tensor) -> LogitStep | None:
    """The step that makes the found numbers of the given ones; None if there is none."""
    rounding = _rounding(found)
    x, y = given.double().flatten(), found.double().flatten()
    factor = float((y / x)[x.abs() == x.abs().min()].median())
    if factor == 0 or not math.isfinite(factor):
        return None
    if torch.allclose(y, factor * x, rtol=rounding, atol=0):
        return LogitStep(factor)
    softcap = float(y.abs().max())
    if torch.allclose(y, softcap * torch.tanh(factor * x / softcap), rtol=rounding, atol=0):
        return LogitStep(factor, softcap)
    return None


def _as_written(value: float, settings: dict[str, Any], rounding: float) -> float:
    """The number that the config has in place of a measured one, or its inverse."""
    numbers = [1.0]
    for setting in [*settings.values(), *(settings.get("text_config") or {}).values()]:
        if isinstance(setting, int | float) and setting:
            numbers += [float(setting), 1 / float(setting)]
    nearest = min(numbers, key=lambda number: abs(number - value))
    return nearest if math.isclose(value, nearest, rel_tol=rounding) else value


def _unsupported(reason: str) -> TrainingError:
    return TrainingError(
        f"{reason}, which the losses do not follow: this architecture is not supported, choose "
        "another student.model"
    )
