"""The balance loss of routers, which transformers adds by a model's config."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from pipeline.config.student import StudentConfig
from pipeline.errors import TrainingError
from students.architecture.build import build_student, read_config
from students.architecture.skeleton import check_skeleton

ASKS = {"output_router_logits": True}


def student(folder: Path, kind: str, **settings: Any) -> StudentConfig:
    AutoConfig.for_model(kind, **settings).save_pretrained(folder)
    return StudentConfig(model=str(folder), initialization="random")


@pytest.mark.parametrize(
    ("kind", "settings", "share"),
    [
        ("qwen3_moe", {"router_aux_loss_coef": 0.5}, "router_aux_loss_coef: 0.5"),
        ("jetmoe", {"aux_loss_coef": 0.25}, "aux_loss_coef: 0.25"),
        ("dbrx", {"ffn_config": {"moe_loss_weight": 0.125}}, "moe_loss_weight: 0.125"),
    ],
)
def test_a_balance_loss_that_nothing_computes_is_refused(
    tmp_path: Path, kind: str, settings: dict[str, Any], share: str
) -> None:
    asking = student(tmp_path, kind, **ASKS | settings)
    expected = rf"\({share}\).* sets output_router_logits to false"
    with pytest.raises(TrainingError, match=expected):
        check_skeleton(asking, packing=False)
    with pytest.raises(TrainingError, match=expected):
        build_student(asking, 0)


@pytest.mark.parametrize(
    "kind", ["llama", "mixtral", "qwen3_moe", "olmoe", "gpt_oss", "phimoe", "jetmoe", "dbrx"]
)
def test_published_defaults_ask_for_none(tmp_path: Path, kind: str) -> None:
    read_config(student(tmp_path, kind))


def test_without_a_share_there_is_nothing_to_add(tmp_path: Path) -> None:
    read_config(student(tmp_path, "mixtral", **ASKS, router_aux_loss_coef=0.0))
