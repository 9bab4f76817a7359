"""The skeleton: a student that cannot be trained is refused before anything is paid for."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from pipeline.config.student import StudentConfig
from pipeline.errors import TrainingError
from students.architecture.build import build_student
from students.architecture.checks import check_architecture
from students.architecture.skeleton import check_skeleton
from tests.support.architectures import ARCHITECTURES, FLOAT32, NO_CHECKPOINTING, Architecture
from tests.support.students import save_config

BY_NAME = {each.name: each for each in ARCHITECTURES}
OTHERWISE = {FLOAT32: {"dtype": "bfloat16"}, NO_CHECKPOINTING: {"gradient_checkpointing": True}}
"""Options of a student that go against what an architecture needs."""
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
MIXED = {"sliding_window": 4096, "num_hidden_layers": 48, "hidden_size": 3840, "head_dim": 256}


def student(folder: Path, **options: Any) -> StudentConfig:
    start = {"model": str(folder), "initialization": "random"}
    return StudentConfig.model_validate(start | options)


def saved(kind: str, folder: Path, **settings: Any) -> Path:
    AutoConfig.for_model(kind, **settings).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "architecture", [each for each in ARCHITECTURES if not each.refused], ids=lambda each: each.name
)
def test_the_skeleton_judges_as_the_matrix_does(architecture: Architecture, tmp_path: Path) -> None:
    small = {"initializer_range": 0.02}  # at which the whole model hides what it lets through
    folder = save_config(architecture, tmp_path, **small)
    dtype = "float32" if FLOAT32 in architecture.needs else "bfloat16"
    options = student(folder, dtype=dtype, attn_implementation=architecture.attention)
    check_skeleton(options, packing=False)
    if architecture.packs:
        check_skeleton(options, packing=True)
        return
    with pytest.raises(TrainingError, match=r"see one another.*set training\.packing: false"):
        check_skeleton(options, packing=True)


@pytest.mark.parametrize(
    ("kind", "settings", "depth"),
    [
        ("llama", LLAMA_70B, 2),
        ("gemma3_text", MIXED, 6),
        ("mixtral", LLAMA_70B | {"num_hidden_layers": 56}, 2),
        ("zamba2", {}, 7),
        ("bamba", {}, 2),
    ],
)
def test_large_students_are_tried_small_with_every_kind_of_layer(
    kind: str, settings: dict[str, Any], depth: int, tmp_path: Path, caplog
) -> None:
    caplog.set_level(logging.INFO)
    check_skeleton(student(saved(kind, tmp_path, **settings), dtype="bfloat16"), packing=False)
    (line,) = [each.message for each in caplog.records if "copy of" in each.message]
    assert f"a copy of {depth} layers" in line
    assert float(line.split(" M weights")[0].split()[-1]) < 50


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Mamba", r"set student\.attn_implementation: eager"),
        ("gpt-oss", r"set student\.attn_implementation: eager"),
        ("BLOOM", r"set student\.attn_implementation: eager"),
        ("BERT", r"not supported, choose another student\.model"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_setting_to_change(
    name: str, message: str, tmp_path: Path
) -> None:
    folder = save_config(BY_NAME[name], tmp_path)
    with pytest.raises(TrainingError, match=message) as caught:
        check_skeleton(student(folder), packing=False)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "setting"), [(each.name, setting) for each in ARCHITECTURES for setting in each.needs]
)
def test_a_setting_that_an_architecture_needs_is_named(
    name: str, setting: str, tmp_path: Path
) -> None:
    options = {"attn_implementation": BY_NAME[name].attention} | OTHERWISE[setting]
    with pytest.raises(TrainingError, match=f": set {setting}$"):
        check_skeleton(student(save_config(BY_NAME[name], tmp_path), **options), packing=False)


def test_rounding_that_a_deep_copy_amplifies_is_no_leak(tmp_path: Path) -> None:
    """Gemma 3n has its last kind of layer after the twentieth."""
    sizes = {"intermediate_size": 64, "hidden_size": 64, "head_dim": 16, "num_attention_heads": 4}
    tables = {"vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16}
    check_skeleton(student(saved("gemma3n_text", tmp_path, **sizes, **tables)), packing=False)


@pytest.mark.parametrize(
    "name", [each.name for each in ARCHITECTURES if "index_topk" in each.config]
)
def test_a_choice_between_equal_keys_is_no_leak(name: str, tmp_path: Path) -> None:
    """With two heads the index is 0 for every fourth key, and nothing is left out of 2048."""
    architecture = BY_NAME[name]
    folder = save_config(architecture, tmp_path, index_n_heads=2, index_topk=2048)
    options = student(folder, attn_implementation=architecture.attention)
    check_skeleton(options, packing=architecture.packs)


def test_a_student_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    options = student(save_config(BY_NAME["Gemma 3"], tmp_path, use_bidirectional_attention=True))
    with pytest.raises(TrainingError, match="lets tokens see those that follow"):
        check_skeleton(options, packing=False)
    with pytest.raises(TrainingError, match="lets tokens see those that follow"):
        check_architecture(build_student(options, seed=0), packing=True)


def test_a_model_of_another_kind_is_refused_in_one_sentence(tmp_path: Path) -> None:
    folder = saved("t5", tmp_path)
    with pytest.raises(TrainingError, match="no causal language model for its config") as caught:
        check_skeleton(student(folder), packing=False)
    assert len(str(caught.value)) < 500
    assert "GPT2Config" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"initialization": "random"}, r"remove quantization_config from its config\.json"),
        ({"initialization": "pretrained"}, "choose a copy of it whose weights are not quantised"),
    ],
)
@pytest.mark.parametrize("method", ["fp8", "gptq", "mxfp4"])
def test_a_quantised_student_is_refused(
    method: str, options: dict[str, str], remedy: str, tmp_path: Path
) -> None:
    folder = save_config(BY_NAME["Llama"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match=remedy):
        check_skeleton(student(folder, **options), packing=False)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        # chunks begin anew with each sequence, and not so in a packed row
        ("Llama 4", {"attention_chunk_size": 8192}),
        # blocks of keys are cut from the row, and chosen by positions in the sequence
        ("MiniMax-M3", {"index_block_size": 128, "index_topk_blocks": 16}),
        # a key stands for several tokens of a row
        (
            "DeepSeek-V4",
            {
                "layer_types": ["heavily_compressed_attention"] * 2,
                "compress_rates": {"heavily_compressed_attention": 128},
                "sliding_window": 128,
            },
        ),
    ],
)
def test_windows_that_hide_in_short_texts_are_exceeded(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_config(BY_NAME[name], tmp_path, **settings)
    options = student(folder, attn_implementation=BY_NAME[name].attention)
    check_architecture(build_student(options, seed=0), packing=True)
    check_skeleton(options, packing=False)
    with pytest.raises(TrainingError, match=r"set training\.packing: false"):
        check_skeleton(options, packing=True)


@pytest.mark.parametrize(
    ("dtype", "message"), [("bfloat16", r": set student\.dtype: float32$"), ("float32", None)]
)
def test_a_step_that_fails_at_a_small_size_fails_at_any(
    dtype: str, message: str | None, tmp_path: Path, caplog
) -> None:
    """xLSTM mixes formats in sequences of a chunk and more, and is large where nothing shrinks."""
    caplog.set_level(logging.INFO)
    options = student(saved("xlstm", tmp_path), dtype=dtype, attn_implementation="eager")
    if message is not None:
        with pytest.raises(TrainingError, match=message):
            check_skeleton(options, packing=False)
        return
    check_skeleton(options, packing=False)
    assert any("a copy of 2 layers" in each.message for each in caplog.records)
