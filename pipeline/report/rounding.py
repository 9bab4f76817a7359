"""Whether two computations of the same log-probabilities differ by rounding alone.

No two computations of a model round alike: kernels add in another order, packed sequences go
through other masks, an engine fuses operations. A fixed tolerance is met by no model of another
depth, and the largest of many differences grows with their number. So the noise is measured on the
model at hand: its inputs are perturbed in the last place of its dtype, after which every operation
rounds anew (Monte Carlo arithmetic: D. S. Parker, UCLA CSD-970002, 1997).
Differences between two correct computations are draws of that noise.

With d the differences at T tokens, n those of the perturbed computations, and F = `NOISE_FACTOR`:

    mean |d| <= F (mean |n| + z std |n| / sqrt T)
    |mean d| <= F z s + (F rms n)^2 / 2

where s is the standard error of mean n, from the sums of whole sequences, since the tokens of a
sequence share their noise. The last term bounds a bias that noise itself has: log-softmax of logits
with errors of variance v is lower by at most v / 2 on average, in second order. Both bounds are
raised by the rounding of the last subtraction, of a log-sum-exp from a logit in float32: where a
model is sure of a token, that is all that rounding does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict

GoldLogprobs = Mapping[str, Sequence[float]]
"""Log-probabilities of the tokens at every position of each sequence, in nats, by its id."""
NOISE_FACTOR = 2.0
"""Most noise of a correct computation, in units of the measured noise: errors add up like a random
walk, so twice the noise is that of four times as many roundings.
"""
STANDARD_ERRORS = 4.0
"""z: with three perturbed computations of eight sequences (24 degrees of freedom of Student's t)
the signed mean of a correct computation lies beyond its bound by chance in one of 30 million cases,
and in one of 1,900 if its noise is `NOISE_FACTOR` times the measured one.
"""
FLOAT32 = float(np.finfo(np.float32).eps)


class Agreement(BaseModel):
    """Comparison of two computations of the same log-probabilities, in nats."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    sequences: int
    tokens: int
    mean_difference: float
    """Mean size of the differences."""
    signed_difference: float
    """Mean of the differences with their signs."""
    noise: float
    """Mean size of the differences that rounding alone makes, as measured."""
    bound: float
    """Largest mean size that rounding explains."""
    signed_bound: float
    """Largest size of the mean with signs that rounding explains."""

    @property
    def holds(self) -> bool:
        """Whether rounding explains the differences; NaN is explained by nothing."""
        return (
            self.mean_difference <= self.bound and abs(self.signed_difference) <= self.signed_bound
        )

    def __str__(self) -> str:
        return (
            f"over {self.tokens} tokens of {self.sequences} sequences the log-probabilities differ "
            f"by {self.mean_difference:.2g} nats on average (at most {self.bound:.2g} by rounding, "
            f"whose noise is {self.noise:.2g}), and by {self.signed_difference:.2g} with their "
            f"signs (at most {self.signed_bound:.2g})"
        )


@dataclass(frozen=True)
class NoisyLogprobs:
    """Log-probabilities of a model, with their noise.

    Attributes:
        values: as the model computes them.
        perturbed: as it computes them from inputs that were perturbed in their last place; one or
            more, each with other perturbations.
        terms: size of the numbers whose differences the log-probabilities are, a logit and a
            log-sum-exp; their own size where it is not known.
    """

    values: GoldLogprobs
    perturbed: Sequence[GoldLogprobs]
    terms: GoldLogprobs | None = None

    def agreement(self, others: GoldLogprobs) -> Agreement:
        """Compares another computation of these sequences, or of some of them."""
        names = list(others)
        differences_T = np.concatenate([self._differences(others, name) for name in names])
        noise_ST = [
            np.stack([self._differences(p, name) for p in self.perturbed]) for name in names
        ]
        noise_DT = np.concatenate(noise_ST, axis=1)
        num_tokens, sizes_DT = len(differences_T), np.abs(noise_DT)
        variances_S = [np.square(noise.sum(axis=1)).mean() for noise in noise_ST]
        signed_error = np.sqrt(np.sum(variances_S)) / num_tokens
        terms = self.values if self.terms is None else self.terms
        sizes_T = np.abs(np.concatenate([np.asarray(terms[name], np.float64) for name in names]))
        rounding = FLOAT32 * float(sizes_T.mean())
        error = STANDARD_ERRORS * sizes_DT.std() / np.sqrt(num_tokens)
        bias = np.square(NOISE_FACTOR * noise_DT).mean() / 2
        return Agreement(
            sequences=len(names),
            tokens=num_tokens,
            mean_difference=float(np.abs(differences_T).mean()),
            signed_difference=float(differences_T.mean()),
            noise=float(sizes_DT.mean()),
            bound=float(NOISE_FACTOR * (sizes_DT.mean() + error) + rounding),
            signed_bound=float(NOISE_FACTOR * STANDARD_ERRORS * signed_error + bias + rounding),
        )

    def _differences(self, others: GoldLogprobs, name: str) -> np.ndarray:
        """float64[P]: differences of one sequence from `values`."""
        return np.subtract(others[name], self.values[name], dtype=np.float64)
