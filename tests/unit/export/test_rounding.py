"""Rounding explains draws of the measured noise, however long their tail, and nothing else."""

import math

import numpy as np
import pytest

from pipeline.report.rounding import Agreement, NoisyLogprobs

SEQUENCES, TOKENS = 8, 60


def draw(generator: np.random.Generator, size: float) -> dict[str, np.ndarray]:
    """Differences as bfloat16 makes them: each token has its own scale, most of them small."""
    scales = np.random.default_rng(0).lognormal(-1, 1, (SEQUENCES, TOKENS))
    shared = generator.normal(size=(SEQUENCES, 1))  # a sequence's tokens share some of it
    values = size * scales * (0.9 * generator.normal(size=scales.shape) + 0.1 * shared)
    return {str(s): row for s, row in enumerate(values)}


def logprobs(differences: dict[str, np.ndarray]) -> dict[str, list[float]]:
    return {name: (-2.0 + row).tolist() for name, row in differences.items()}


def compared(seed: int, size: float = 0.02, shift: float = 0.0) -> Agreement:
    """Another computation with noise of some size, in units of 0.02 nats measured, and a shift."""
    generator = np.random.default_rng(seed)
    exact = {str(s): np.zeros(TOKENS) for s in range(SEQUENCES)}
    noisy = NoisyLogprobs(logprobs(exact), [logprobs(draw(generator, 0.02)) for _ in range(3)])
    other = {name: row + shift for name, row in draw(generator, size).items()}
    return noisy.agreement(logprobs(other))


def test_noise_of_the_measured_size_holds_and_four_times_that_does_not() -> None:
    assert all(compared(seed).holds for seed in range(500))
    assert not any(compared(seed, size=0.08).holds for seed in range(100))
    assert compared(0, size=0.0).holds


def test_the_largest_difference_decides_nothing() -> None:
    """One token in 480 that differs by 25 times the mean is the tail of the noise."""
    agreement = compared(3)
    generator = np.random.default_rng(3)
    exact = {str(s): np.zeros(TOKENS) for s in range(SEQUENCES)}
    noisy = NoisyLogprobs(logprobs(exact), [logprobs(draw(generator, 0.02)) for _ in range(3)])
    other = draw(generator, 0.02)
    other["0"][0] = 25 * agreement.noise
    assert noisy.agreement(logprobs(other)).holds


def test_a_shift_is_seen_that_the_mean_size_hides() -> None:
    noise = compared(0).noise
    found = [compared(seed, shift=1.6 * noise) for seed in range(100)]
    assert not any(agreement.holds for agreement in found)
    assert all(agreement.mean_difference <= agreement.bound for agreement in found)


def test_rounding_of_the_figures_alone_is_no_difference() -> None:
    """A computation without noise still has figures that are float32."""
    values = {"a": [-5.0, -7.0]}
    noisy = NoisyLogprobs(values, [values])
    assert noisy.agreement({"a": [-5.0 - 4.8e-7, -7.0]}).holds
    assert not noisy.agreement({"a": [-5.001, -7.0]}).holds


def test_a_sure_model_rounds_only_where_its_logits_are_subtracted() -> None:
    """Perturbed inputs move no log-probability near 0; a log-sum-exp of 16 is rounded all the
    same, to steps of 1.9e-6."""
    values, off = {"a": [-1e-7, -2e-7]}, {"a": [-1e-7, -1.9e-6]}
    terms = {"a": [16.0, 16.0]}
    assert NoisyLogprobs(values, [values], terms).agreement(off).holds
    assert not NoisyLogprobs(values, [values]).agreement(off).holds
    assert not NoisyLogprobs(values, [values], terms).agreement({"a": [-1e-5, -2e-7]}).holds


def test_figures_are_means_over_the_tokens_of_the_other_computation() -> None:
    noisy = NoisyLogprobs({"a": [-1.0, -2.0], "b": [-3.0]}, [{"a": [-1.5, -2.5], "b": [-3.0]}])
    agreement = noisy.agreement({"a": [-1.25, -1.75]})
    assert (agreement.sequences, agreement.tokens) == (1, 2)
    assert (agreement.mean_difference, agreement.signed_difference) == (0.25, 0.0)
    assert agreement.noise == 0.5
    # 2 (0.5 + 4 * 0); 2 * 4 * sqrt(1) / 2 + (2 * 0.5)^2 / 2
    assert agreement.bound == pytest.approx(1.0, abs=1e-6)
    assert agreement.signed_bound == pytest.approx(4.5, abs=1e-6)


def test_a_figure_that_is_no_number_is_not_overlooked() -> None:
    values = {"a": [-1.0, -2.0]}
    assert not NoisyLogprobs(values, [values]).agreement({"a": [-1.0, math.nan]}).holds
