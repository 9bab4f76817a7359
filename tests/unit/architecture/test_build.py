"""The student as it is built: its weights, and the number format of every tensor."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pipeline.config.student import StudentConfig
from pipeline.errors import TrainingError
from students.architecture.build import build_student
from students.architecture.dtypes import as_loaded
from students.architecture.initial_weights import fit_weights
from tests.support.tiny_models import tiny_llama

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES = {
    "llama": ({}, {"model.rotary_emb.inv_freq"}),
    "gemma3_text": (
        {"layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": True},
        {"model.rotary_emb.sliding_attention_inv_freq"},
    ),
    "deepseek_v3": (
        LATENT
        | EXPERTS
        | {"num_key_value_heads": 4, "v_head_dim": 8, "n_routed_experts": 64, "n_group": 1}
        | {"topk_group": 1, "first_k_dense_replace": 1},
        {"model.layers.1.mlp.gate.e_score_correction_bias"},
    ),
    "ernie4_5_moe": (
        {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
        {"model.layers.0.mlp.gate.weight"},
    ),
}
"""Settings of each `model_type`, and tensors that stay float32."""


def tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@pytest.fixture(params=ARCHITECTURES)
def architecture(request, tmp_path: Path) -> tuple[Path, set[str]]:
    """A folder with random weights, and the names of tensors that stay float32."""
    settings, kept = ARCHITECTURES[request.param]
    config = AutoConfig.for_model(request.param, **(SIZES | settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, value in tensors(model).items():
        if "e_score_correction_bias" in name:  # real ones lie as close together as this
            value.data = torch.linspace(6.82, 7.07, value.numel()).view_as(value)
    model.save_pretrained(tmp_path)
    return tmp_path, kept


def test_every_road_to_a_bfloat16_student_ends_at_what_transformers_loads(architecture) -> None:
    folder, kept = architecture
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    drawn = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    student = {"model": str(folder), "dtype": "bfloat16", "initialization": "random"}
    started = build_student(StudentConfig(**student, initial_weights=str(folder)), seed=0)
    for found in (as_loaded(drawn, torch.bfloat16), started):
        assert type(found) is type(expected)
        assert tensors(found).keys() == tensors(expected).keys()
        for name, value in tensors(expected).items():
            assert tensors(found)[name].dtype == value.dtype, name
            assert torch.equal(tensors(found)[name], value), name
    assert kept <= {n for n, x in tensors(started).items() if x.dtype == torch.float32}
    random = tensors(build_student(StudentConfig(**student), seed=0))
    assert {n: x.dtype for n, x in random.items()} == {
        n: x.dtype for n, x in tensors(expected).items()
    }


def test_the_dtype_changes_neither_the_draw_nor_the_attention(architecture) -> None:
    folder, _ = architecture
    made = {
        dtype: build_student(
            StudentConfig(
                model=str(folder), initialization="random", dtype=dtype, attn_implementation="eager"
            ),
            seed=3,
        )
        for dtype in ("float32", "bfloat16")
    }
    for name, value in tensors(made["float32"]).items():
        other = tensors(made["bfloat16"])[name]
        assert torch.equal(other, value.to(other.dtype)), name
    assert made["bfloat16"].config._attn_implementation == "eager"


def test_close_router_biases_survive_a_checkpoint_and_the_export(tmp_path: Path) -> None:
    settings, (bias, *_) = ARCHITECTURES["deepseek_v3"]
    config = AutoConfig.for_model("deepseek_v3", **(SIZES | settings))
    config.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    trained[bias] = torch.linspace(6.82, 7.07, 64)
    fit_weights(model, trained, "the checkpoint")
    as_loaded(model, torch.bfloat16).save_pretrained(tmp_path / "export")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype="auto")
    assert torch.equal(tensors(exported)[bias], trained[bias])


def test_a_pretrained_student_is_never_unpickled(tmp_path: Path) -> None:
    tiny = tiny_llama(11)
    tiny.save_pretrained(tmp_path)
    student = StudentConfig(model=str(tmp_path), initialization="pretrained")
    loaded = build_student(student, seed=0).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tiny.state_dict().items())
    (tmp_path / "model.safetensors").unlink()
    torch.save(tiny.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(TrainingError, match=r"student\.model .* cannot be loaded"):
        build_student(student, seed=0)
