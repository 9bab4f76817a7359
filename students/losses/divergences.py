"""Every response-based loss on a position's outcomes: its value, and its gradient in closed form.

A position's outcomes are its kept ids and, last, one bucket for all other ids. What is computed
here has the size of the outcomes, not of the vocabulary; `students/losses/outcomes.py` forms them
from logits and brings their gradient back to the logits.

Legend: S sets of outcomes, C positions, O outcomes (kept ids, then the bucket).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossTerm:
    """One loss of the list; the fields are those of the config.

    Attributes:
        name: under which its values are logged.
        type: a key of `DIVERGENCES`, or `cross_entropy`.
        weight: its factor in the total.
        temperature: of target and student, see `value_and_gradient`.
        beta: of `jensen_shannon`: the target's share in the mixture, between 0 and 1.
        alpha: of `skew_kl`: how much of the first distribution is mixed into the second.
        direction: of `skew_kl`: `forward` from the target to the student, `reverse` the other way.
        min_tail: of `reverse_kl`: the least mass of a target's bucket.
    """

    name: str
    type: str
    weight: float
    temperature: float = 1.0
    beta: float = 0.5
    alpha: float = 0.5
    direction: str = "forward"
    min_tail: float = 0.0

    @property
    def uses_teachers(self) -> bool:
        return self.type != "cross_entropy"

    @property
    def is_linear(self) -> bool:
        """Whether the divergence from a mixture is the mixture of divergences, up to a constant."""
        return self.type == "forward_kl" and self.temperature == 1.0


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
        """A target's bucket of less than `mass`, where the student has one, raised to it."""
        exists_SC = self.log_q_SCO[..., -1] > -torch.inf
        floor_SC = torch.full_like(self.log_p_SCO[..., -1], mass).log_()
        log_p_SCO = self.log_p_SCO.clone()
        raised_SC = torch.maximum(log_p_SCO[..., -1], floor_SC)
        log_p_SCO[..., -1] = torch.where(exists_SC, raised_SC, log_p_SCO[..., -1])
        return replace(self, log_p_SCO=log_p_SCO)


def value_and_gradient(term: LossTerm, outcomes: Outcomes) -> tuple[Tensor, Tensor]:
    """A divergence between target and student at a temperature.

    With T the temperature, target and student are put on the outcomes at temperature 1, both are
    raised to the power 1/T and normalised over the outcomes, and the divergence of these is
    multiplied by T squared, which keeps the size of its gradient (Hinton et al., arXiv 1503.02531).
    Without a bucket, so when the kept ids are the whole vocabulary, this is exactly the divergence
    of softmaxes at temperature T. With one, the bucket is tempered as a single outcome: its mass
    (sum p)^(1/T) stands for sum p^(1/T), which it understates for T > 1 and overstates for T < 1.
    At temperature 1 nothing is normalised: stored numbers are used as they are.

    Returns:
        [S, C] values in nats, and [S, C, O] their derivatives with respect to the student's
        log-probabilities of the outcomes, each taken as a free variable: with `G` their sum, the
        derivative with respect to the logit behind outcome o is `g_o - G q_o`.
    """
    if term.type == "reverse_kl":
        outcomes = outcomes.with_least_tail(term.min_tail)
    tempered = outcomes if term.temperature == 1.0 else outcomes.tempered(term.temperature)
    numbers = []
    for log_x_SCO in (tempered.log_p_SCO, tempered.log_q_SCO):
        # a logarithm of 0 only ever stands beside a factor 0
        numbers += [log_x_SCO.exp(), torch.where(log_x_SCO > -torch.inf, log_x_SCO, 0.0)]
    value_SCO, gradient_SCO = DIVERGENCES[term.type](*numbers, term)
    if term.temperature != 1.0:
        q_SCO = numbers[2]
        mean_SC1 = gradient_SCO.sum(dim=-1, keepdim=True)
        gradient_SCO = term.temperature * (gradient_SCO - q_SCO * mean_SC1)
        value_SCO = term.temperature**2 * value_SCO
    return value_SCO.sum(dim=-1), gradient_SCO


def forward_kl(
    p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, term: LossTerm
) -> tuple[Tensor, Tensor]:
    """KL(p || q) = sum p (log p - log q)."""
    return p * (log_p - log_q), -p


def reverse_kl(
    p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, term: LossTerm
) -> tuple[Tensor, Tensor]:
    """KL(q || p) = sum q (log q - log p); MiniLLM, arXiv 2306.08543."""
    ratio = log_q - log_p
    return q * ratio, q * (ratio + 1)


def jensen_shannon(
    p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, term: LossTerm
) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; GKD, arXiv
    2306.13649.
    """
    beta = term.beta
    log_m = _log(beta * p + (1 - beta) * q)
    student = (1 - beta) * q * (log_q - log_m)
    return beta * p * (log_p - log_m) + student, student


def skew_kl(
    p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, term: LossTerm
) -> tuple[Tensor, Tensor]:
    """KL(p || alpha p + (1 - alpha) q), or reversed KL(q || (1 - alpha) p + alpha q); DistiLLM,
    arXiv 2402.03898.
    """
    alpha = term.alpha
    if term.direction == "forward":
        m = alpha * p + (1 - alpha) * q
        return p * (log_p - _log(m)), -(1 - alpha) * q * _share(p, m)
    m = (1 - alpha) * p + alpha * q
    ratio = log_q - _log(m)
    return q * ratio, q * (ratio + 1 - alpha * _share(q, m))


def total_variation(
    p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor, term: LossTerm
) -> tuple[Tensor, Tensor]:
    """Half of sum |p - q|, with derivative 0 where the two are equal; Wen et al., arXiv
    2307.15190.
    """
    difference = q - p
    return 0.5 * difference.abs(), 0.5 * difference.sign() * q


DIVERGENCES: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    function.__name__: function
    for function in (forward_kl, reverse_kl, jensen_shannon, skew_kl, total_variation)
}
"""Each takes p, log p, q, log q of any shape, logarithms of 0 given as 0, and gives value and
gradient of every outcome.
"""


def _log(m: Tensor) -> Tensor:
    return torch.where(m > 0, m, 1.0).log_()


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / torch.where(whole > 0, whole, 1.0)
