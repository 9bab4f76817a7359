"""Many architectures as students, beside transformers: small random weights, every parameter's
gradient.

A bound is not guessed. The same weights in the next wider format give what is true up to rounding,
and a student's gradients may differ from it about as much as those of transformers do, which
computes each sequence alone. The factor of two leaves room for sums in another order.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from pipeline.config.student import StudentConfig
from pipeline.errors import TrainingError
from pipeline.rope import length_bounds
from students.architecture.build import build_student, load_model
from students.architecture.checks import check_architecture
from students.data.packing import pack, plan_groups
from students.losses.divergences import CrossEntropy, ForwardKL
from students.micro_batch import MicroBatch
from students.model import StudentModule
from tests.support.architectures import (
    ARCHITECTURES,
    FLOAT32,
    NO_CHECKPOINTING,
    Architecture,
)
from tests.support.students import distance, example, gradients, loss_alone, save_config

TEXT_WEIGHT = 0.5
LOSSES = (
    ForwardKL(name="forward_kl", weight=1.0),
    CrossEntropy(name="cross_entropy", weight=TEXT_WEIGHT),
)
EXAMPLES = [example(37, 1), example(23, 2), example(5, 3)]
"""Longer than every window and chunk of the configs."""
NOISE = 2.0
TRAINED = [each for each in ARCHITECTURES if not each.refused]
REFUSED = [each for each in ARCHITECTURES if each.refused]


@pytest.fixture(params=TRAINED, ids=lambda each: each.name)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return request.param


def options(architecture: Architecture, folder: Path, **others: Any) -> StudentConfig:
    """The section `student` of a config."""
    start = {"model": str(folder), "initialization": "random"}
    attention = {"attn_implementation": architecture.attention}
    return StudentConfig.model_validate(start | attention | others)


def wider(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in the next wider format."""
    dtype = {torch.bfloat16: torch.float32, torch.float32: torch.float64}[model.dtype]
    other: Any = copy.deepcopy(model)
    if dtype == torch.float64 and other._can_set_experts_implementation():
        other.set_experts_implementation("eager")  # the others know no float64
    return other.to(dtype)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        pytest.param(each, dtype, id=f"{each.name}-{dtype}")
        for each in TRAINED
        for dtype in ("float32", "bfloat16")
        if dtype == "float32" or FLOAT32 not in each.needs
    ],
)
def test_gradients_are_those_of_each_sequence_alone(
    architecture: Architecture, dtype: str, tmp_path: Path
) -> None:
    # A choice of experts jumps where two are almost equal, and in bfloat16 they often are.
    every = {"num_experts_per_tok": architecture.config.get("num_experts")}
    others = every if dtype == "bfloat16" and "num_experts_per_tok" in architecture.config else {}
    folder = save_config(architecture, tmp_path, **others)
    model = build_student(options(architecture, folder, dtype=dtype), seed=0).train()
    truth_model = wider(model)
    truth = gradients(truth_model, loss_alone(truth_model, EXAMPLES, TEXT_WEIGHT))
    alone = gradients(model, loss_alone(model, EXAMPLES, TEXT_WEIGHT))
    bound = NOISE * distance(alone, truth)
    module = StudentModule(model, LOSSES).train()
    lengths, bounds = [len(each.input_ids) for each in EXAMPLES], length_bounds(model.config)
    for padded in [False, True] if architecture.packs else [True]:
        for recomputed in [False] if NO_CHECKPOINTING in architecture.needs else [False, True]:
            if recomputed:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            (rows,) = plan_groups(lengths, 3 * max(lengths), 1, padded, 1, bounds)
            together = [MicroBatch.of(pack([EXAMPLES[i] for i in row], padded)) for row in rows]
            total = torch.stack([module(batch)[0] for batch in together]).sum()
            assert distance(gradients(model, total), truth) <= bound
            model.gradient_checkpointing_disable()


def test_a_student_packs_its_sequences_or_is_refused(
    architecture: Architecture, tmp_path: Path
) -> None:
    model = build_student(options(architecture, save_config(architecture, tmp_path)), seed=0)
    check_architecture(model, packing=False)
    if architecture.packs:
        check_architecture(model, packing=True)
        return
    with pytest.raises(TrainingError, match=r"see one another.*set training\.packing: false"):
        check_architecture(model, packing=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_weights_are_the_same_student(
    architecture: Architecture, dtype: str, tmp_path: Path
) -> None:
    folder = save_config(architecture, tmp_path / "config")
    model = build_student(options(architecture, folder, dtype=dtype), seed=0)
    exported = tmp_path / "exported"
    model.save_pretrained(exported)
    pretrained = {"model": str(exported), "initialization": "pretrained", "dtype": dtype}
    again = {"initial_weights": str(exported), "dtype": dtype}
    for other in (
        load_model(exported),
        build_student(options(architecture, exported, **pretrained), seed=1),
        build_student(options(architecture, folder, **again), seed=1),
    ):
        assert_same(other, model)


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Compares all parameters and buffers, those too that are not saved."""
    found, expected = (
        {**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model, other)
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("architecture", REFUSED, ids=lambda each: each.name)
def test_what_cannot_be_trained_is_refused(architecture: Architecture, tmp_path: Path) -> None:
    student = options(architecture, save_config(architecture, tmp_path))
    with pytest.raises(TrainingError, match=architecture.refused):
        check_architecture(build_student(student, seed=0), packing=True)
