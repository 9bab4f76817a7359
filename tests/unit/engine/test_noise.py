"""The noise that is expected of rounding, beside noise that was seen."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from teachers.noise import MULTIPLE, expected_noise, mean_tolerance, state_tolerance

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def logprobs(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits[0].float().log_softmax(-1)


@pytest.mark.parametrize("num_layers", [2, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_that_rounds_is_as_noisy_as_expected(dtype: str, num_layers: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        initializer_range=0.15,
    )
    exact = LlamaForCausalLM(config).eval()
    exact.load_state_dict({k: v.to(DTYPES[dtype]) for k, v in exact.state_dict().items()})
    ids = torch.randint(0, 96, (1, 64))
    expected = logprobs(exact, ids)
    top = expected.topk(8).indices
    rounded = LlamaForCausalLM._from_config(config, dtype=DTYPES[dtype]).eval()
    rounded.load_state_dict(exact.state_dict())
    difference = (logprobs(rounded, ids) - expected).gather(1, top).abs().mean().item()
    engine = {"dtype": dtype, "num_layers": num_layers}
    noise = expected_noise(engine, expected.gather(1, top).numpy())
    assert noise / 4 < difference < MULTIPLE * noise


def test_a_real_model_is_as_noisy_as_expected() -> None:
    """30 layers in bfloat16, log-probabilities of a size of 5: on a canary, vLLM and transformers
    are both 0.045 nats from float32, and 0.055 from each other.
    """
    engine, values = {"dtype": "bfloat16", "num_layers": 30}, np.array([-5.0])
    assert 0.045 < expected_noise(engine, values) < 2 * 0.045
    assert 2 * 0.055 < mean_tolerance(engine, values) < 8 * 0.055


def test_noise_that_was_measured_counts_where_it_is_larger() -> None:
    engine, values = {"dtype": "float32", "num_layers": 2}, np.array([-3.0, -math.inf])
    expected = expected_noise(engine, values)
    assert mean_tolerance(engine, values, expected / 2) == mean_tolerance(engine, values)
    assert mean_tolerance(engine, values, 2 * expected) == 2 * mean_tolerance(engine, values)


def test_depth_and_format_decide_and_an_unknown_depth_is_taken_as_great() -> None:
    shallow, deep = ({"dtype": "bfloat16", "num_layers": n} for n in (8, 32))
    assert state_tolerance(deep) == pytest.approx(2 * state_tolerance(shallow))
    assert state_tolerance({"dtype": "bfloat16"}) > state_tolerance(deep)
    assert state_tolerance({"dtype": "float16", "num_layers": 32}) == state_tolerance(deep) / 8
