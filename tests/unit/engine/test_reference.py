"""The comparison with transformers: its text, its reasons not to, and what it finds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from teachers.engine import reference
from teachers.protocol import CapturedRows, EngineSpec
from tests.integration.models import VOCABULARY, save_tiny_llama

ENGINE: dict[str, Any] = {"dtype": "float32", "num_layers": 2, "quantization": None}
IDS = [(5 * i + 2) % VOCABULARY for i in range(40)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_llama(folder, seed=0)
    return folder


def spec(folder: Path, **vllm: Any) -> EngineSpec:
    return EngineSpec(model=str(folder), min_model_len=64, vllm=vllm, num_logprobs=16)


def rows_of(folder: Path, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> CapturedRows:
    """Rows as an engine gives them, whose logits are `scale` times those of the model."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        logits = scale * model(torch.tensor([IDS])).logits[0, :-1].float()  # pyright: ignore
    logs = logits.log_softmax(-1)
    top = logs.topk(16)
    gold = logs.gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]
    return CapturedRows(top.indices.int().numpy(), top.values.numpy(), gold.numpy())


@pytest.mark.parametrize(
    ("config", "most", "length"),
    [
        ({}, 4096, 128),
        ({}, 40, 40),
        ({"sliding_window": 512, "text_config": {"attention_chunk_size": 1024}}, 4096, 1088),
        ({"sliding_window": 512, "text_config": {"attention_chunk_size": 1024}}, 700, 576),
        ({"sliding_window": 4096, "use_sliding_window": True}, 8192, 128),
    ],
)
def test_the_text_is_longer_than_the_windows_that_can_be_afforded(
    config: dict, most: int, length: int
) -> None:
    assert reference.num_tokens(config, most) == length


def test_an_engine_of_the_same_model_is_within_the_noise(llama: Path) -> None:
    found = reference.compare(spec(llama), ENGINE, IDS, rows_of(llama))
    assert found.reason is None and found.num_tokens == len(IDS)
    assert found.mean < 1e-5 < found.tolerance < 0.05
    rounded = rows_of(llama, torch.bfloat16)
    found = reference.compare(spec(llama), ENGINE | {"dtype": "bfloat16"}, IDS, rounded)
    assert found.mean == pytest.approx(found.noise, rel=0.01) and found.noise > 1e-3
    assert found.tolerance == pytest.approx(3 * found.noise)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_without_its_scale_and_other_weights_are_found(
    llama: Path, tmp_path: Path, dtype: str
) -> None:
    save_tiny_llama(tmp_path, seed=1)
    engine, here = ENGINE | {"dtype": dtype}, spec(llama)
    for wrong in (rows_of(llama, scale=1.25), rows_of(tmp_path)):
        found = reference.compare(here, engine, IDS, wrong)
        assert found.mean > 2 * found.tolerance and found.largest > found.mean


def test_a_masked_token_agrees_with_nothing_but_a_masked_one(llama: Path) -> None:
    rows = rows_of(llama)
    rows.gold_logprobs[3] = -np.inf
    found = reference.compare(spec(llama), ENGINE, IDS, rows)
    assert found.mean > found.tolerance and found.largest > 1000


def test_what_cannot_be_compared_is_said(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reason(folder: Path = llama, engine: dict = ENGINE, **vllm: Any) -> str:
        found = reference.reason_not_to_compare(spec(folder, **vllm), engine, 128, VOCABULARY)
        return str(found)

    assert reason() == "None"
    assert "quantised" in reason(engine=ENGINE | {"quantization": "fp8"})
    assert "quantised" in reason(kv_cache_dtype="fp8")
    assert "no local safetensors" in reason(tmp_path)
    monkeypatch.setattr(reference, "free_memory_bytes", lambda: 2**20)
    assert "0.0 GiB of the node's memory, and 50% of the free 0.0 GiB" in reason()
    (tmp_path / "config.json").write_text('{"model_type": "nobody_knows"}')
    found = reference.compare(spec(tmp_path), ENGINE, IDS, rows_of(llama))
    assert str(found).startswith("not compared with transformers: transformers fails at it")


def test_memory_is_counted_within_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "CGROUP", tmp_path)
    whole = reference.free_memory_bytes()
    assert whole > 2**20
    for name, text in (
        ("max", "max\n"),
        ("current", "5000"),
        ("stat", "anon 1\ninactive_file 100"),
    ):
        (tmp_path / f"memory.{name}").write_text(text)
    assert reference.free_memory_bytes() == pytest.approx(whole, rel=0.5)
    (tmp_path / "memory.max").write_text("9000\n")
    assert reference.free_memory_bytes() == 9000 - (5000 - 100)
