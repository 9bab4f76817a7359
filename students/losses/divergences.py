"""Losses on the student's next-token distribution: one parameter object each.

A divergence has its value and its gradient in closed form, on a position's outcomes: its kept ids
and, last, one bucket for all other ids. All that is computed here has the size of the outcomes, not
of the vocabulary. `outcomes.py` forms outcomes from logits, `chunk.py` brings the gradient back to
the logits.

A new loss needs a class here, a line in `LOSSES`, a model in `pipeline/config/losses.py` whose
fields have the same names, and an oracle in `tests/support/loss_reference.py`; nothing else.

Legend: S sets of outcomes, C positions, O outcomes (kept ids, then the bucket).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outcomes:
    """Target p and student q on the same outcomes.

    Attributes:
        log_p_SCO: -inf where the target gives nothing.
        log_q_SCO: -inf where an outcome does not exist: an unused slot, or a bucket without ids.
    """

    log_p_SCO: Tensor
    log_q_SCO: Tensor

    def tempered(self, temperature: float) -> Outcomes:
        """Both sides to the power 1 / temperature, normalised over the outcomes."""
        return Outcomes(
            torch.log_softmax(self.log_p_SCO / temperature, dim=-1),
            torch.log_softmax(self.log_q_SCO / temperature, dim=-1),
        )

    def with_least_tail(self, mass: float) -> Outcomes:
        """The same outcomes, with the target's bucket raised to `mass` if it is smaller and if the
        student has a bucket.
        """
        exists_SC = self.log_q_SCO[..., -1] > -torch.inf
        floor_SC = torch.full_like(self.log_p_SCO[..., -1], mass).log_()
        log_p_SCO = self.log_p_SCO.clone()
        raised_SC = torch.maximum(log_p_SCO[..., -1], floor_SC)
        log_p_SCO[..., -1] = torch.where(exists_SC, raised_SC, log_p_SCO[..., -1])
        return replace(self, log_p_SCO=log_p_SCO)


@dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """Cross-entropy with the tokens of the text; needs no teacher.

    Attributes:
        name: name under which its values are logged: always `cross_entropy`, which is measured
            whether listed or not.
        weight: factor in the total.
    """

    name: str
    weight: float


@dataclass(frozen=True, kw_only=True)
class Divergence(ABC):
    """A loss between the teachers' distribution and the student's.

    Attributes:
        name: name under which its values are logged.
        weight: factor in the total.
        temperature: temperature of target and student, see `value_and_gradient`.
    """

    diagnostics: ClassVar[tuple[str, ...]] = ()
    """Names of the figures of `diagnose`, which are logged as `<name of the loss>_<diagnostic>`."""

    name: str
    weight: float
    temperature: float = 1.0

    @property
    def is_linear(self) -> bool:
        """Whether the divergence from a mixture is the mixture of divergences, up to a constant."""
        return False

    def value_and_gradient(self, outcomes: Outcomes) -> tuple[Tensor, Tensor]:
        """The divergence between target and student at the loss's temperature.

        With T the temperature, target and student are put on the outcomes at temperature 1, both
        are raised to the power 1/T and normalised over the outcomes, and the divergence of these is
        multiplied by T squared, which keeps the size of its gradient (Hinton et al., arXiv
        1503.02531). Without a bucket, so when the kept ids are the whole vocabulary, this is
        exactly the divergence of softmaxes at temperature T. With a bucket, the bucket is tempered
        as a single outcome: its mass (sum p)^(1/T) stands for sum p^(1/T), which it understates for
        T > 1 and overstates for T < 1. At temperature 1 nothing is normalised: stored numbers are
        used as they are.

        Returns:
            [S, C] values in nats, and [S, C, O] their derivatives with respect to the student's
            log-probabilities of the outcomes, each taken as a free variable: with `G` their sum,
            the derivative with respect to the logit behind outcome o is `g_o - G q_o`.
        """
        outcomes = self._prepared(outcomes)
        tempered = outcomes if self.temperature == 1.0 else outcomes.tempered(self.temperature)
        numbers = []
        for log_x_SCO in (tempered.log_p_SCO, tempered.log_q_SCO):
            # a logarithm of 0 only ever stands beside a factor 0
            numbers += [log_x_SCO.exp(), torch.where(log_x_SCO > -torch.inf, log_x_SCO, 0.0)]
        value_SCO, gradient_SCO = self._by_outcome(*numbers)
        if self.temperature != 1.0:
            q_SCO = numbers[2]
            mean_SC1 = gradient_SCO.sum(dim=-1, keepdim=True)
            gradient_SCO = self.temperature * (gradient_SCO - q_SCO * mean_SC1)
            value_SCO = self.temperature**2 * value_SCO
        return value_SCO.sum(dim=-1), gradient_SCO

    def diagnose(self, outcomes: Outcomes) -> dict[str, Tensor]:
        """Figures by which the loss's approximations are judged: [C] for each of `diagnostics`."""
        return {}

    def _prepared(self, outcomes: Outcomes) -> Outcomes:
        """The outcomes that the divergence compares, before any temperature."""
        return outcomes

    @abstractmethod
    def _by_outcome(
        self, p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Value and gradient of every outcome; arguments of any one shape, with logarithms of 0
        given as 0.
        """


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Divergence):
    """KL(p || q) = sum p (log p - log q)."""

    @property
    def is_linear(self) -> bool:
        """See `Divergence`; tempering is not linear."""
        return self.temperature == 1.0

    def _by_outcome(
        self, p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor
    ) -> tuple[Tensor, Tensor]:
        return p * (log_p - log_q), -p


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Divergence):
    """KL(q || p) = sum q (log q - log p); MiniLLM, arXiv 2306.08543.

    Attributes:
        min_tail: least mass of a target's bucket; a stored 0 would make the divergence infinite.
    """

    diagnostics: ClassVar[tuple[str, ...]] = ("floored",)

    min_tail: float

    def diagnose(self, outcomes: Outcomes) -> dict[str, Tensor]:
        """`floored` is 1 where the target's bucket was raised to `min_tail`."""
        tail_C = outcomes.log_p_SCO[0, :, -1].exp()
        exists_C = outcomes.log_q_SCO[0, :, -1] > -torch.inf
        return {"floored": (exists_C & (tail_C < self.min_tail)).to(tail_C.dtype)}

    def _prepared(self, outcomes: Outcomes) -> Outcomes:
        return outcomes.with_least_tail(self.min_tail)

    def _by_outcome(
        self, p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor
    ) -> tuple[Tensor, Tensor]:
        ratio = log_q - log_p
        return q * ratio, q * (ratio + 1)


@dataclass(frozen=True, kw_only=True)
class JensenShannon(Divergence):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; GKD, arXiv
    2306.13649.

    Attributes:
        beta: the target's share in the mixture m, between 0 and 1.
    """

    beta: float

    def _by_outcome(
        self, p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor
    ) -> tuple[Tensor, Tensor]:
        beta = self.beta
        log_m = _log(beta * p + (1 - beta) * q)
        student = (1 - beta) * q * (log_q - log_m)
        return beta * p * (log_p - log_m) + student, student


@dataclass(frozen=True, kw_only=True)
class SkewKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q), or reversed KL(q || (1 - alpha) p + alpha q); DistiLLM,
    arXiv 2402.03898.

    Attributes:
        alpha: share of the first distribution that is mixed into the second.
        direction: `forward` from the target to the student, `reverse` the other way.
    """

    alpha: float
    direction: Literal["forward", "reverse"]

    def _by_outcome(
        self, p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor
    ) -> tuple[Tensor, Tensor]:
        alpha = self.alpha
        if self.direction == "forward":
            m = alpha * p + (1 - alpha) * q
            return p * (log_p - _log(m)), -(1 - alpha) * q * _share(p, m)
        m = (1 - alpha) * p + alpha * q
        ratio = log_q - _log(m)
        return q * ratio, q * (ratio + 1 - alpha * _share(q, m))


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Divergence):
    """Half of sum |p - q|, with derivative 0 where the two are equal; Wen et al., arXiv
    2307.15190.
    """

    def _by_outcome(
        self, p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor
    ) -> tuple[Tensor, Tensor]:
        difference = q - p
        return 0.5 * difference.abs(), 0.5 * difference.sign() * q


DistributionLoss = Divergence | CrossEntropy
LOSSES: dict[str, type[DistributionLoss]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jensen_shannon": JensenShannon,
    "skew_kl": SkewKL,
    "total_variation": TotalVariation,
    "cross_entropy": CrossEntropy,
}
"""The class of each `type` in the config."""


def loss_from_config(name: str, settings: Mapping[str, Any]) -> DistributionLoss:
    """The parameter object of a loss in the config.

    Args:
        name: name under which its values are logged.
        settings: the config's fields of the loss: `type`, `weight` and the parameters.
    """
    parameters = dict(settings)
    return LOSSES[parameters.pop("type")](name=name, **parameters)


def _log(m: Tensor) -> Tensor:
    return torch.where(m > 0, m, 1.0).log_()


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / torch.where(whole > 0, whole, 1.0)
