"""The balance loss of routers, which transformers adds by a model's config."""

import pytest
from transformers import AutoConfig

from pipeline.errors import ConfigError
from students.architecture.routers import refuse_ignored_balance


def test_a_balance_loss_that_nothing_computes_is_refused() -> None:
    asks = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
    with pytest.raises(ConfigError, match=r"adds 0\.5 .* set.* output_router_logits to false"):
        refuse_ignored_balance(AutoConfig.for_model("qwen3_moe", **asks))


@pytest.mark.parametrize("kind", ["llama", "mixtral", "qwen3_moe", "olmoe", "gpt_oss", "phimoe"])
def test_published_defaults_ask_for_none(kind: str) -> None:
    refuse_ignored_balance(AutoConfig.for_model(kind))


def test_without_a_share_there_is_nothing_to_add() -> None:
    silent = {"output_router_logits": True, "router_aux_loss_coef": 0.0}
    refuse_ignored_balance(AutoConfig.for_model("mixtral", **silent))
