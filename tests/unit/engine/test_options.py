"""Options of the installed vLLM: names are read from its source, it judges the values."""

import dataclasses

import pytest
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs

from pipeline.errors import ConfigError
from teachers.engine.options import check_sampling_values, declared_fields


def test_the_names_in_the_source_are_those_of_the_classes() -> None:
    arguments = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert declared_fields("engine/arg_utils.py", "EngineArgs", "AsyncEngineArgs") == {
        name for name in arguments if not name.startswith("_")
    }
    assert declared_fields("sampling_params.py", "SamplingParams") == {
        name for name in SamplingParams.__struct_fields__ if not name.startswith("_")
    }


@pytest.mark.parametrize("block", [{"temperature": -1.0}, {"top_p": 1.5}, {"top_k": "many"}])
def test_a_value_that_vllm_refuses_is_refused(block: dict[str, object]) -> None:
    check_sampling_values({"max_tokens": 8, "temperature": 0.5})
    with pytest.raises(ConfigError, match="vLLM refuses the sampling parameter "):
        check_sampling_values({"max_tokens": 8} | block)
