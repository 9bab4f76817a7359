"""The arguments of an engine on a CPU."""

import pytest

from pipeline.errors import TeacherError
from teachers.engine.arguments import cpu_arguments, engine_arguments
from teachers.protocol import EngineSpec


def arguments(has_inner_state: bool, share_prefixes: bool = True, **vllm: object) -> dict:
    spec = EngineSpec("model", 80, vllm=vllm, num_logprobs=8, share_prefixes=share_prefixes)
    return cpu_arguments(spec, engine_arguments(spec), has_inner_state)


def test_prompts_are_whole_and_cached_in_short_blocks() -> None:
    chosen = arguments(has_inner_state=False)
    assert chosen["enable_prefix_caching"] is True
    assert (chosen["block_size"], chosen["enable_chunked_prefill"]) == (32, False)
    assert arguments(False, block_size=64)["block_size"] == 64
    assert "block_size" not in arguments(False, share_prefixes=False)
    assert "enable_chunked_prefill" not in arguments(False, max_num_batched_tokens=32)


def test_layers_with_a_state_have_no_prefix_cache() -> None:
    chosen = arguments(has_inner_state=True)
    assert chosen["enable_prefix_caching"] is False
    assert "block_size" not in chosen
    with pytest.raises(TeacherError, match=r"enable_prefix_caching is true.*: leave it out"):
        arguments(True, enable_prefix_caching=True)


def test_an_engine_that_only_writes_never_takes_the_default_of_vllm_for_such_layers() -> None:
    writer = EngineSpec("model", 80)
    assert "enable_prefix_caching" not in engine_arguments(writer)
    chosen = cpu_arguments(writer, engine_arguments(writer), has_inner_state=True)
    assert chosen["enable_prefix_caching"] is False
