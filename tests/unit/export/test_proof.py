"""The proof of an export: it passes on the trained student, and sees each fault of a folder."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.errors import TrainingError
from pipeline.records import TokenSequence
from pipeline.report.rounding import NoisyLogprobs
from students.architecture.body import body_hidden_states
from students.architecture.build import load_model
from students.architecture.dtypes import float_buffers
from students.export.proof import refuse_other_buffers, refuse_other_weights
from students.reference import noisy_logprobs

VOCABULARY, LAYERS, DTYPES = 128, 6, (torch.float32, torch.bfloat16)
LENGTHS = (60, 57, 44, 31, 30, 22)


def sequences() -> list[TokenSequence]:
    generator = np.random.default_rng(0)
    return [
        TokenSequence(
            str(length),
            generator.integers(0, VOCABULARY, length).astype(np.int32),
            ((1, length),),
            "p",
            "words",
            ("t",),
            "stop",
        )
        for length in LENGTHS
    ]


def trained_logprobs(model: LlamaForCausalLM) -> dict[str, list[float]]:
    """As a training computes them: all sequences packed into one row."""
    texts = [torch.from_numpy(s.input_ids.astype(np.int64)) for s in sequences()]
    places = torch.cat([torch.arange(len(ids)) for ids in texts])[None]
    with torch.no_grad():
        logits = model.lm_head(body_hidden_states(model, torch.cat(texts)[None], places)).float()
    logprobs = torch.log_softmax(logits, dim=-1).split([len(ids) for ids in texts])
    return {
        sequence.sequence_id: part[:-1].gather(1, ids[1:, None])[:, 0].tolist()
        for sequence, part, ids in zip(sequences(), logprobs, texts, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class Exported:
    """A student as it was trained and exported, and its noise."""

    folder: Path
    trained: dict[str, list[float]]
    noisy: NoisyLogprobs

    def load(self) -> Any:
        return load_model(self.folder)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Six layers whose weights and norms are far from their start, as after a training."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.15,
    )
    model: Any = LlamaForCausalLM(config).eval()
    for name, value in model.named_parameters():
        if "norm" in name:
            value.data = 1 + 0.3 * torch.randn(value.shape)
    folder = tmp_path_factory.mktemp("export")
    for value in model.parameters():  # leaves the rotary frequencies in float32
        value.data = value.data.to(request.param)
    model.save_pretrained(folder)
    return Exported(
        folder, trained_logprobs(model), noisy_logprobs(load_model(folder), sequences())
    )


def test_training_and_export_differ_by_rounding_alone(exported: Exported) -> None:
    agreement = exported.noisy.agreement(exported.trained)
    assert agreement.holds
    assert agreement.tokens == sum(LENGTHS) - len(LENGTHS)
    # packed and alone, two forwards do differ
    assert 0 < agreement.mean_difference < 1.5 * agreement.noise


def halve_a_layer(model: Any) -> None:
    for value in model.model.layers[LAYERS // 2].parameters():
        value.data *= 0.5


def swap_norms(model: Any) -> None:
    layer = model.model.layers[LAYERS // 2]
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    first.weight, second.weight = second.weight, first.weight


def raise_epsilon(model: Any) -> None:
    for layer in model.model.layers:
        layer.input_layernorm.variance_epsilon = 0.3


def turn_slower(model: Any) -> None:
    model.model.rotary_emb.inv_freq *= 0.9


def leave_out_a_layer(model: Any) -> None:
    model.model.layers = model.model.layers[:-1]


FAULTS = (halve_a_layer, swap_norms, raise_epsilon, turn_slower, leave_out_a_layer)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_computes_otherwise_is_seen(
    exported: Exported, fault: Callable[[Any], None]
) -> None:
    model = exported.load()
    fault(model)
    assert not noisy_logprobs(model, sequences()).agreement(exported.trained).holds


def test_a_soft_cap_that_the_folder_lacks_is_seen(exported: Exported) -> None:
    """Logits reach 4 here; the training's were capped at 3."""
    model = exported.load()
    model.lm_head.register_forward_hook(lambda *a: 3 * torch.tanh(a[-1] / 3))
    capped = noisy_logprobs(model, sequences()).values
    assert not exported.noisy.agreement(capped).holds


def test_rounded_rotary_frequencies_are_seen(exported: Exported) -> None:
    """By their dtype, since the rounding of bfloat16 hides them in texts as short as these."""
    model, probe = exported.load(), {"buffers": float_buffers(exported.load())}
    spec: Any = SimpleNamespace(
        folder="runs/r/student", config=SimpleNamespace(training=SimpleNamespace(packing=True))
    )
    refuse_other_buffers(spec, model, probe, exported.folder)
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16()
    with pytest.raises(TrainingError) as refusal:
        refuse_other_buffers(spec, model, probe, exported.folder)
    assert "inv_freq is bfloat16, and was float32 in training; do not" in str(refusal.value)
    assert "runs/r/student are kept: give student.model the config" in str(refusal.value)
    assert str(refusal.value).endswith("train under another `name` with training.packing: false")
    with pytest.raises(TrainingError, match=r"install transformers 4\.0\.0, which trained them"):
        refuse_other_buffers(spec, model, probe | {"transformers": "4.0.0"}, exported.folder)
    refuse_other_buffers(spec, model, {"gold_logprobs": {}}, exported.folder)
    if model.dtype == torch.float32:
        assert not noisy_logprobs(model, sequences()).agreement(exported.trained).holds


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_compared_bit_by_bit(tied: bool, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    model: Any = LlamaForCausalLM(config)
    masters = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert ("lm_head.weight" in masters) is not tied
    model.bfloat16().save_pretrained(tmp_path)
    path = tmp_path / "weights"
    save_file(masters, path)
    refuse_other_weights(load_model(tmp_path), path, tmp_path)

    def refusal(changed: dict[str, torch.Tensor]) -> str:
        save_file(changed, path)
        with pytest.raises(TrainingError) as told:
            refuse_other_weights(load_model(tmp_path), path, tmp_path)
        return str(told.value)

    first = "model.embed_tokens.weight"
    other = masters[first].clone()
    other[3, 5] *= 1 + 2**-7
    assert f"{first} differs in 1 of 512 values; do not use" in refusal(masters | {first: other})
    absent = {name: value for name, value in masters.items() if name != first}
    assert f"{first} is not among the trained weights" in refusal(absent)
    assert "more.weight is missing" in refusal(masters | {"more.weight": torch.ones(1)})
    norm = "model.norm.weight"
    assert f"{norm} has shape (16,), not (1,)" in refusal(masters | {norm: torch.ones(1)})
    if tied:  # a training that had a matrix of its own
        assert "lm_head.weight differs in 512" in refusal(masters | {"lm_head.weight": other + 1})
