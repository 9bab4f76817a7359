"""Tiny models made on the spot; a test module takes the fixtures with `pytest_plugins`."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 96
EOS = 2


def save_tiny_llama(folder: Path, seed: int) -> None:
    """A random Llama of 2 layers whose weights are large enough for peaked distributions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=EOS,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    save_tiny_llama(folder, seed=0)
    return folder
