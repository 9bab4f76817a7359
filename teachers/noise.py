"""Noise: how far apart rounding alone can move log-probabilities that the same weights give.

Kernels, devices and batches sum in different orders and so round differently. A tolerance that is
derived from the number format, the depth of the model and the size of the log-probabilities holds
for a toy and for a real model alike. Means are compared and not the worst token, since the worst
of many values has no bound that would tell rounding from a fault.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

ROUNDOFF = {"float32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Unit roundoff by the dtype of an engine: the largest relative error of one rounding. float32
counts as TF32, to which attention kernels for GPUs round the inputs of their products.
"""
UNKNOWN_LAYERS = 64
"""Layers that are assumed of a model whose depth nobody tells, as that behind an endpoint."""
MULTIPLE = 3.0
"""Mean differences are accepted up to this multiple of the expected noise. For 30 layers the
expectation is 1.5 times the noise that was measured (`docs/measurements.md`).
"""


def relative_noise(engine: Mapping[str, Any]) -> float:
    """Root mean square of the relative error of a final hidden state.

    Each of L layers adds twice to the residual stream, and the sum is rounded each time. A rounding
    with unit roundoff u has an error of `u / sqrt(3)` in the root mean square, and the errors of
    independent roundings add in squares: `u * sqrt(2 L / 3)`.

    Args:
        engine: metadata of the engine, with its `dtype` and `num_layers`.
    """
    num_layers = engine.get("num_layers") or UNKNOWN_LAYERS
    return ROUNDOFF[engine["dtype"]] * math.sqrt(2 * num_layers / 3)


def expected_noise(engine: Mapping[str, Any], logprobs: np.ndarray) -> float:
    """Mean absolute error in nats that rounding causes in log-probabilities.

    A log-probability follows from the hidden state by a product and is in error relative to its
    own size, which its root mean square over all values stands for. The mean absolute value of a
    normal error is `sqrt(2 / pi)` of its root mean square.

    Args:
        engine: metadata of the engine, with its `dtype` and `num_layers`.
        logprobs: log-probabilities of any shape; infinite ones are left out.
    """
    finite = logprobs[np.isfinite(logprobs)].astype(np.float64)
    size = math.sqrt(np.square(finite).mean()) if finite.size else 0.0
    return math.sqrt(2 / math.pi) * relative_noise(engine) * size


def mean_tolerance(engine: Mapping[str, Any], logprobs: np.ndarray, measured: float = 0.0) -> float:
    """Mean difference in nats up to which two engines are taken to have the same weights.

    The noises of the two add in squares.

    Args:
        engine: metadata of one engine, with its `dtype` and `num_layers`.
        logprobs: log-probabilities that are compared, of any shape.
        measured: noise of one engine, where it was measured; counts where it exceeds the
            expectation.
    """
    return MULTIPLE * math.sqrt(2) * max(expected_noise(engine, logprobs), measured)


def state_tolerance(engine: Mapping[str, Any]) -> float:
    """Largest difference of two captures of one hidden state, relative to its largest value.

    The largest value of a state is not below its root mean square, and six times the root mean
    square of a normal error is exceeded by one value of 5e8.

    Args:
        engine: metadata of the engine, with its `dtype` and `num_layers`.
    """
    return 6 * math.sqrt(2) * relative_noise(engine)
