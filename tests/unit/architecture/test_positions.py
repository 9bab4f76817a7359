"""Rotary frequencies that depend on length: which models have them, and what is refused."""

import pytest
from transformers import AutoConfig

from pipeline.errors import ConfigError
from pipeline.rope import length_bounds
from students.architecture.positions import refuse_dynamic_scaling

LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
}


def test_longrope_has_the_bound_of_its_factors() -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 4, "original_max_position_embeddings": 16}
    phi = AutoConfig.for_model("phi3", **shape, rope_parameters=LONGROPE)
    assert length_bounds(phi) == (16,)
    refuse_dynamic_scaling(phi, longest=None)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text", "gemma3"])
def test_positions_of_other_models_do_not_depend_on_length(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    assert length_bounds(config) == ()
    refuse_dynamic_scaling(config, longest=None)


def test_dynamic_scaling_is_refused_where_it_begins() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = AutoConfig.for_model("llama", max_position_embeddings=16, rope_parameters=rope)
    assert length_bounds(config) == ()
    refuse_dynamic_scaling(config, longest=16)
    for longest in (17, None):
        with pytest.raises(ConfigError, match=rf"is {longest}, .* to at most 16, .* such as yarn"):
            refuse_dynamic_scaling(config, longest)
