"""Students whose LM head is more than a matrix."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from pipeline.errors import TrainingError
from students.architecture.body import body_of
from students.architecture.checks import check_architecture
from students.architecture.head import logit_step
from students.data.examples import Example
from students.data.packing import pack
from students.losses.divergences import CrossEntropy, ReverseKL
from students.losses.inputs import LogitStep
from students.micro_batch import MicroBatch
from students.model import StudentModule
from tests.support.loss_reference import reference_loss
from tests.support.tiny_models import tiny_llama

VOCABULARY = 11
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.4,
    "pad_token_id": 0,
}
GEMMA4 = {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 4}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 4}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
STEPS = {
    "llama": ({}, LogitStep()),
    "opt": ({"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}, LogitStep()),
    "gemma2": ({"final_logit_softcapping": 3.0}, LogitStep(softcap=3.0)),
    "gemma4_text": (GEMMA4 | {"final_logit_softcapping": 2.5}, LogitStep(softcap=2.5)),
    "granite": ({"logits_scaling": 6.0}, LogitStep(1 / 6)),
    "cohere": ({"logit_scale": 0.0625}, LogitStep(0.0625)),
    "hyperclovax": ({"logits_scaling": 0.3}, LogitStep(0.3)),
    "falcon_h1": (MAMBA | {"lm_head_multiplier": 0.0390625}, LogitStep(0.0390625)),
    "minicpm3": (
        LATENT | {"num_key_value_heads": 2, "v_head_dim": 8, "dim_model_base": 8},
        LogitStep(0.5),
    ),
    "recurrent_gemma": ({"lru_width": 16, "logits_soft_cap": 20.0}, LogitStep(softcap=20.0)),
    "xlstm": ({"num_heads": 2, "output_logit_soft_cap": 30.0}, LogitStep(softcap=30.0)),
}
"""Settings of each `model_type`, and the step that they stand for."""


def make(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Weights so large that soft-caps bend most logits."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | STEPS[kind][0]))
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", STEPS)
def test_the_step_is_measured_whatever_the_config_calls_it(kind, dtype) -> None:
    assert logit_step(make(kind, dtype)) == STEPS[kind][1]


def test_the_step_of_a_multimodal_model_is_that_of_its_text_part() -> None:
    text = SIZES | GEMMA4 | {"final_logit_softcapping": 2.5}
    config = AutoConfig.for_model("gemma4", text_config=text, vision_config=None, audio_config=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert "final_logit_softcapping" not in config.to_dict()
    assert logit_step(model) == LogitStep(softcap=2.5)


class Rescaled(LlamaForCausalLM):
    """A Llama with another step behind its LM head."""

    step: Any = staticmethod(lambda logits: 4 * torch.tanh(0.3 * logits / 4))

    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = self.step(output.logits)
        return output


def test_a_factor_and_a_soft_cap_are_found_together() -> None:
    step = logit_step(Rescaled(tiny_llama(VOCABULARY).config))
    assert step.factor == pytest.approx(0.3, rel=1e-5)
    assert step.softcap == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda logits: logits[..., :9], "11 rows in its LM head and 9 logits"),
        (lambda logits: logits + torch.arange(11), "more than a factor and a soft-cap"),
        (lambda logits: logits.clamp(-50, 50), "more than a factor and a soft-cap"),
        (lambda logits: torch.log_softmax(logits, -1), "more than a factor and a soft-cap"),
        (lambda logits: logits * nn.Parameter(torch.tensor(1.7)), "weights beside its body"),
    ],
    ids=["fewer logits", "bias", "clamp", "softmax", "trained temperature"],
)
def test_another_step_is_refused(step, message: str) -> None:
    model = Rescaled(tiny_llama(VOCABULARY).config)
    model.step = step
    with pytest.raises(TrainingError, match=f"{message}.* choose another student"):
        logit_step(model)


def test_a_head_with_layers_before_its_matrix_is_refused() -> None:
    config = AutoConfig.for_model("bert", **(SIZES | {"is_decoder": True}))
    with pytest.raises(TrainingError, match="changes hidden states between its body and its LM"):
        logit_step(AutoModelForCausalLM.from_config(config))


def test_a_model_is_itself_again_after_the_measurement() -> None:
    model, ids = make("gemma2"), torch.tensor([[1, 5, 2]])
    before = model(input_ids=ids).logits
    logit_step(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not [name for name, m in model.named_modules() if "forward" in m.__dict__]


def test_the_body_is_found_where_its_name_is_not_the_prefix() -> None:
    sizes = {"num_local_experts": 2, "intermediate_size_mlp": 24, "num_experts_per_tok": 1}
    config = AutoConfig.for_model("llama4_text", **(SIZES | sizes))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert model.base_model is model
    assert body_of(model) is model.model
    check_architecture(model, packing=True)


@pytest.mark.parametrize("kind", ["gemma2", "granite", "falcon_h1", "minicpm3"])
def test_logits_are_those_of_the_model_in_values_and_gradients(kind: str) -> None:
    model = make(kind)
    check_architecture(model, packing=kind != "falcon_h1")
    ids = torch.tensor([1, 5, 2, 9, 4, 3])
    generator = torch.Generator().manual_seed(1)
    teacher = torch.log_softmax(torch.randn(1, 4, VOCABULARY, generator=generator), -1)
    logprobs, token_ids = teacher.topk(5, -1)
    tail = 1 - logprobs.exp().sum(-1)
    example = Example(
        ids.int().numpy(),
        torch.tensor([1, 2, 3, 4]).numpy(),
        ids[2:].numpy(),
        token_ids.int().numpy(),
        logprobs.half().numpy(),
        tail.half().numpy(),
        torch.ones(1, 4).numpy(),
    )
    losses = (
        ReverseKL(name="reverse_kl", weight=0.5, temperature=2.0, min_tail=1e-4),
        CrossEntropy(name="cross_entropy", weight=1.0),
    )
    batch = MicroBatch.of(pack([example]))
    module = StudentModule(model, losses)
    module(batch)[0].backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(input_ids=ids[None], use_cache=False).logits[0, 1:5]
    sum(loss.weight * reference_loss(loss, logits, batch.targets) for loss in losses).backward()
    assert logits.abs().max() > (2 if kind == "gemma2" else 0.1)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)
    measured, argmax_ids = module.eval()(batch)
    gold = torch.log_softmax(logits, -1)[range(4), ids[2:]]
    torch.testing.assert_close(measured[0], -gold.detach(), rtol=1e-4, atol=1e-5)
    assert argmax_ids.tolist() == logits.argmax(-1).tolist()


def test_a_body_that_ends_in_float32_trains_in_bfloat16() -> None:
    config = AutoConfig.for_model("mamba", **(SIZES | {"state_size": 4}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    check_architecture(model, packing=False)
