"""Dropout and jitter of a model's config: said, and switched off in training alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from pipeline.config.student import StudentConfig
from students.architecture.build import build_student
from students.architecture.noise import active_noise
from tests.support.architectures import ARCHITECTURES
from tests.support.students import save_config

NOISY: dict[str, dict[str, float]] = {
    "GPT-2": {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3},
    "GPT-J": {"resid_pdrop": 0.1, "embd_pdrop": 0.2, "attn_pdrop": 0.3},
    "Seed-OSS": {"residual_dropout": 0.1, "attention_dropout": 0.2},
    "OPT": {"dropout": 0.1, "attention_dropout": 0.2, "layerdrop": 0.1},
    "Falcon": {"hidden_dropout": 0.1, "attention_dropout": 0.2},
    "Mixtral": {"router_jitter_noise": 0.3},
}


def built(name: str, folder: Path, settings: dict[str, float], **options: Any) -> PreTrainedModel:
    (architecture,) = [each for each in ARCHITECTURES if each.name == name]
    model = str(save_config(architecture, folder, **settings))
    attention: Any = architecture.attention
    student = StudentConfig(
        model=model, initialization="random", attn_implementation=attention, **options
    )
    return build_student(student, seed=0).train()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 40)[None], use_cache=False).logits


@pytest.mark.parametrize(("name", "settings"), NOISY.items(), ids=NOISY)
def test_noise_is_named_and_switched_off(
    name: str, settings: dict[str, float], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = built(name, tmp_path, settings)
    assert active_noise(model) == settings
    assert not torch.equal(logits(model), logits(model))
    still = built(name, tmp_path, settings, dropout=False)
    assert active_noise(still) == {}
    assert torch.equal(logits(still), logits(still))
    assert torch.equal(logits(still), logits(model.eval()))
    written = AutoConfig.from_pretrained(tmp_path)
    assert {key: getattr(written, key) for key in settings} == settings


def test_a_model_without_noise_has_none_to_name(tmp_path: Path) -> None:
    assert active_noise(built("Llama", tmp_path, {})) == {}


def test_what_shapes_the_exported_model_stays(tmp_path: Path) -> None:
    jitter = {"router_jitter_noise": 0.01, "input_jitter_noise": 0.1}
    model = built("PhiMoE", tmp_path, jitter, dropout=False)
    assert active_noise(model) == {"router_jitter_noise": 0.01}
