"""LongRoPE: which factors a teacher is served with, and that its name says so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config, Phi3ForCausalLM

from pipeline.config.teachers import TeacherConfig
from pipeline.errors import TeacherError
from pipeline.layout import Layout
from teachers.preflight.identity import model_identity
from teachers.protocol import EngineSpec
from teachers.rope import check_context, first_context, uses_long_factors, with_long_factors


def phi3() -> Phi3Config:
    return Phi3Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        initializer_range=0.15,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 16,
            "long_factor": [4.0] * 16,
            "original_max_position_embeddings": 32,
            "partial_rotary_factor": 1.0,
        },
    )


def test_the_configured_context_chooses_the_factors() -> None:
    assert first_context(phi3()) == 32 and first_context(LlamaConfig()) is None
    assert not uses_long_factors({}, phi3())
    assert not uses_long_factors({"max_model_len": 32}, phi3())
    assert uses_long_factors({"max_model_len": 33}, phi3())
    assert not uses_long_factors({"max_model_len": 4096}, LlamaConfig())


def test_sequences_do_not_choose_the_factors() -> None:
    def check(longest: int, config: Any = None, **vllm: int) -> None:
        check_context(EngineSpec("phi", longest, vllm=dict(vllm)), config or phi3())

    check(32)
    check(100, max_model_len=128)
    check(100, LlamaConfig())
    with pytest.raises(TeacherError, match=r"needs 33 tokens.*set vllm\.max_model_len above"):
        check(33)


def test_only_the_long_factors_enter_the_identity(tmp_path: Path) -> None:
    folder = tmp_path / "phi"
    Phi3ForCausalLM(phi3()).save_pretrained(folder)
    layout = Layout(str(tmp_path), "run")
    plain = model_identity(TeacherConfig(model=str(folder)), layout)
    short, long = (
        model_identity(TeacherConfig(model=str(folder), vllm={"max_model_len": most}), layout)
        for most in (32, 64)
    )
    assert short == plain and long == plain | {"rope": "long"}


def test_the_comparison_gives_short_sequences_the_long_factors() -> None:
    """A short text equals the beginning of a long one, for which transformers has these factors."""
    ids = torch.randint(3, 96, (1, 60), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    plain = Phi3ForCausalLM(phi3()).eval()
    changed = Phi3ForCausalLM(with_long_factors(phi3())).eval()
    changed.load_state_dict(plain.state_dict())
    with torch.no_grad():
        long = plain(ids).logits[0, :20]
        assert (changed(ids[:, :20]).logits[0] - long).abs().max() < 1e-4
        assert (plain(ids[:, :20]).logits[0] - long).abs().max() > 0.05
