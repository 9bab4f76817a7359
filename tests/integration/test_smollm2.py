"""The real model of `examples/smollm2`: what its folder holds, that it can answer, and that the
student made from it has its layers.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.support.real_model import EXAMPLE


@pytest.fixture(scope="module")
def make_models() -> Any:
    """`make_models.py` as a module; it imports `fetch.py` beside it."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        spec = importlib.util.spec_from_file_location("make_models", EXAMPLE / "make_models.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["make_models"] = module  # its dataclass looks itself up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLE))
    return module


def test_the_real_model_is_plain_bfloat16_and_answers(real_model: Path) -> None:
    assert "Apache License" in (real_model / "LICENSE").read_text()
    model = AutoModelForCausalLM.from_pretrained(real_model)
    assert model.dtype == torch.bfloat16 and model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    answer = tokenizer.decode(written[prompt["input_ids"].shape[1] :])
    assert "Paris" in answer and answer.endswith("<|im_end|>")


def test_the_student_has_every_weight_of_its_layers(
    make_models: Any, real_model: Path, tmp_path: Path
) -> None:
    assert make_models.even_layers(5, 3) == [0, 2, 4]
    chosen = make_models.even_layers(30, 24)
    assert len(set(chosen)) == 24 and (chosen[0], chosen[-1]) == (0, 29)
    make_models.make_student(real_model, tmp_path)
    ours, theirs = (load_file(f / "model.safetensors") for f in (tmp_path, real_model))
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == 24
    for name, weight in ours.items():
        parts = name.split(".")
        if "layers" in parts:
            place = parts.index("layers") + 1
            parts[place] = str(chosen[int(parts[place])])
        assert torch.equal(weight, theirs[".".join(parts)]), name
    assert len(theirs) - len(ours) == 6 * 9  # nine weights in each layer that is left out


def test_the_mathematician_learns_the_answers_alone(make_models: Any, real_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    found = make_models.examples(tokenizer, make_models.PROMPTS / "gsm8k_holdout.jsonl")
    first, labels = found[0], make_models.collate(found[:2])["labels"]
    answer = tokenizer.decode(labels[0][labels[0] != make_models.IGNORE_INDEX])
    assert answer.startswith("It takes 2/2=1 bolt of white fiber\n")
    assert answer.endswith("#### 3<|im_end|>")
    assert tokenizer.decode(first.ids[: first.start]).endswith("<|im_start|>assistant\n")
