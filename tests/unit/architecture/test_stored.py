"""Weights on disk that do not fit the config beside them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.config.student import StudentConfig
from pipeline.errors import TrainingError
from students.architecture.build import build_student
from students.architecture.stored import check_stored
from teachers.preflight.weights import stored_shapes
from tests.support.architectures import ARCHITECTURES, Architecture
from tests.support.tiny_models import save_tiny_llama

MLP = "model.layers.0.mlp.up_proj.weight"
Weights = dict[str, np.ndarray]


def student(folder: Path) -> StudentConfig:
    return StudentConfig(model=str(folder), initialization="pretrained")


def check(folder: Path) -> None:
    check_stored(student(folder), stored_shapes(str(folder), None))


def without_mlp(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if name != MLP}


def without_head(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if name != "lm_head.weight"}


def narrower(weights: Weights) -> Weights:
    return weights | {MLP: weights[MLP][:8].copy()}


def fewer_rows(weights: Weights) -> Weights:
    return {n: v[:30].copy() if len(v) == 32 else v for n, v in weights.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_mlp, rf"lack 1 tensors of its config.json, .* at random \({MLP}\)"),
        (without_head, r"lack 1 tensors .* \(lm_head.weight\)"),
        (narrower, rf"{MLP} has shape \(8, 16\), the model's \(16, 16\)"),
        (fewer_rows, r"embed_tokens.weight has shape \(30, 16\), the model's \(32, 16\)"),
    ],
)
def test_weights_of_another_model_are_refused_before_and_in_the_training(
    change: Callable[[Weights], Weights], message: str, tmp_path: Path
) -> None:
    folder = save_tiny_llama(tmp_path, 32)
    check(folder)
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match=message):
        check(folder)
    with pytest.raises(TrainingError, match=r"lack 1 tensors|cannot be loaded"):
        build_student(student(folder), 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda each: each.kind)
def test_what_transformers_writes_is_accepted(architecture: Architecture, tmp_path: Path) -> None:
    config = AutoConfig.for_model(architecture.kind, **architecture.config)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    check(tmp_path)


def test_the_weights_of_a_body_alone_are_left_to_the_training(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path, 32)
    path = folder / "model.safetensors"
    weights = {n.removeprefix("model."): v for n, v in load_file(path).items() if "head" not in n}
    save_file(weights, path, metadata={"format": "pt"})
    check(folder)
    with pytest.raises(TrainingError, match=r"lack 1 tensors .* \(lm_head.weight\)"):
        build_student(student(folder), 0)
