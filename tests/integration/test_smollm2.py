"""The real model of `examples/smollm2`: what its folder holds, and that it can answer."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


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
