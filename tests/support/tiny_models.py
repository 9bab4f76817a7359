"""A Llama of a few kilobytes with random weights, for tests in which any model will do."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(vocabulary: int, **options: Any) -> LlamaForCausalLM:
    """A model whose random weights are the same each time; options go to its config."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **shape, **heads, **options))


def save_tiny_llama(folder: Path, vocabulary: int) -> Path:
    """Writes the model as a Hugging Face folder; returns the folder."""
    tiny_llama(vocabulary).save_pretrained(folder)
    return folder
