"""Students whose LM head is more than a matrix."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from pipeline.errors import TrainingError
from students.architecture.checks import check_architecture
from students.architecture.head import logit_softcap, refuse_lm_head_settings
from students.data.examples import Example
from students.data.packing import pack
from students.losses.divergences import CrossEntropy, ReverseKL
from students.micro_batch import MicroBatch
from students.model import StudentModule
from tests.support.loss_reference import reference_loss

VOCABULARY = 11


@pytest.fixture
def gemma():
    """Weights so large that the cap of 3 bends most logits."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.4,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=None,
    )
    return Gemma2ForCausalLM(config)


def test_soft_capped_logits_are_those_of_the_model_in_values_and_gradients(gemma):
    assert logit_softcap(gemma) == 3.0
    check_architecture(gemma, packing=True)
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
    StudentModule(gemma, losses)(batch)[0].backward()
    found = {name: p.grad.clone() for name, p in gemma.named_parameters()}
    gemma.zero_grad()
    logits = gemma(input_ids=ids[None], use_cache=False).logits[0, 1:5]
    assert logits.abs().max() > 2
    sum(loss.weight * reference_loss(loss, logits, batch.targets) for loss in losses).backward()
    for name, parameter in gemma.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_other_settings_of_the_lm_head_are_still_refused():
    refuse_lm_head_settings({"final_logit_softcapping": 30.0, "logit_scale": 1.0})
    with pytest.raises(TrainingError, match=r"logit_scale=0\.5.* choose another student\.model"):
        refuse_lm_head_settings({"logit_scale": 0.5})
