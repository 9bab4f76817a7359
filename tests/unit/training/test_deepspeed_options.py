"""The `deepspeed:` block: DeepSpeed itself would ignore unknown keys."""

from pathlib import Path
from typing import Any

import pytest

from jobs.stages.prepare import prepare
from pipeline.config import deepspeed
from pipeline.config.load import load_config
from pipeline.errors import ConfigError
from students.deepspeed_options import ReadKeys, check_deepspeed_options

ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = ROOT / "examples/quickstart/config.yaml"
ZERO = "deepspeed.zero_optimization"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "zero_optimisation={stage: 3}",
            "zero_optimisation is unknown to DeepSpeed; did you mean 'zero_optimization'?",
        ),
        ("zero_optimization.stagee=1", "stagee is unknown to DeepSpeed; did you mean 'stage'?"),
        (
            "zero_optimization.offload_optimizer={devise: cpu}",
            f"{ZERO}.offload_optimizer.devise is unknown to DeepSpeed; did you mean 'device'?",
        ),
        ("zero_optimization=3", f"{ZERO} must be a mapping, found 3"),
        ("zero_optimization=null", f"{ZERO} must be a mapping, found None"),
        ("zero_optimization.offload_param=cpu", "offload_param must be a mapping, found 'cpu'"),
        ("checkpoint=3", "deepspeed.checkpoint must be a mapping, found 3"),
        ("zero_optimization.stage=4", f"{ZERO}.stage must be 0, 1, 2 or 3, found 4"),
        ("zero_optimization.stage=two", f"{ZERO}.stage must be 0, 1, 2 or 3, found 'two'"),
        ("zero_optimization.stage=1.0", f"{ZERO}.stage must be 0, 1, 2 or 3, found 1.0"),
        ("zero_optimization.stage=true", f"{ZERO}.stage must be 0, 1, 2 or 3, found True"),
        ("bfloat16={enabled: true}", "deepspeed.bfloat16 is not accepted: student.dtype sets it"),
        ("7=1", "deepspeed.7 is unknown"),
    ],
)
def test_what_deepspeed_would_ignore_is_refused_at_load(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, [f"training.deepspeed.{override}"])
    assert message in str(caught.value)


GOOD = [
    {},
    {"zero_optimization": {"stage": 0}},
    {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": 5e8,
            "stage3_param_persistence_threshold": 0,
            "offload_optimizer": {"device": "cpu", "pin_memory": False},
            "offload_param": {"device": "none"},
        }
    },
    {"zero_optimization": {"stage": 1, "offload_optimizer": None}},
    {"activation_checkpointing": {"partition_activations": True}},
    {"checkpoint": {"tag_validation": "Ignore", "parallel_write": {"pipeline_stage": True}}},
    {"data_types": {"grad_accum_dtype": "fp32"}},
    {"steps_per_print": 100, "wall_clock_breakdown": True, "communication_data_type": "fp32"},
    {"flops_profiler": {"enabled": True, "profile_step": 3}},
    {"tensorboard": {"enabled": True, "output_path": "logs"}},
    {"timers": {"throughput": {"enabled": False}}},
    {"aio": {"use_gds": True}},  # of the machine that trains, which is another
    {"datastates_ckpt": {"host_cache_size": 3}},
]


@pytest.mark.parametrize("block", GOOD, ids=str)
def test_what_deepspeed_takes_is_taken(block: dict[str, Any]) -> None:
    deepspeed.check_deepspeed(block)
    check_deepspeed_options(block)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"zero_optimization": {"overlap_comm": "so"}}, "overlap_comm: .*boolean.*found 'so'"),
        ({"zero_optimization": {"reduce_bucket_size": 0}}, "reduce_bucket_size: .*greater than 0"),
        (
            {"zero_optimization": {"offload_param": {"device": "disk"}}},
            r"offload_param\.device: .*'none', 'cpu' or 'nvme', found 'disk'",
        ),
        ({"tensorboard": {"enable": True}}, r"tensorboard\.enable: "),
        ({"communication_data_type": "fp8"}, "Invalid communication_data_type"),
        ({"checkpoint": {"tag_validation": "x"}}, "invalid tag_validation"),
        ({"activation_checkpointing": 3}, "DeepSpeed refuses training.deepspeed"),
        (
            {"activation_checkpointing": {"partition_activation": True}},
            r"activation_checkpointing\.partition_activation is unknown to DeepSpeed; "
            "did you mean 'partition_activations'",
        ),
        ({"checkpoint": {"tag_validaton": "Fail"}}, "did you mean 'tag_validation'"),
    ],
)
def test_what_deepspeed_refuses_or_ignores_is_refused(block: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_deepspeed_options(block)


def test_the_first_stage_asks_deepspeed(tmp_path: Path) -> None:
    wrong = "training.deepspeed.zero_optimization.overlap_comm=so"
    config = load_config(QUICKSTART, [f"storage.root={tmp_path}", wrong])
    with pytest.raises(ConfigError, match="overlap_comm"):
        prepare(config)


def test_the_names_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime import config
    from deepspeed.runtime.zero import offload_config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    block = ReadKeys({"train_micro_batch_size_per_gpu": 1})
    config.DeepSpeedConfig(block)  # pyright: ignore[reportArgumentType]
    refused = {*deepspeed.OWNED_DEEPSPEED_KEYS, *config._REMOVED_TOP_LEVEL_CONFIG_KEYS}
    # Another layout of the workers, which divides the batch otherwise than is done here.
    refused.add("sequence_parallel_size")
    assert block.read - refused == deepspeed.TOP_LEVEL

    for model, names in (
        (DeepSpeedZeroConfig, deepspeed.ZERO_OPTIMIZATION),
        (offload_config.DeepSpeedZeroOffloadParamConfig, deepspeed.OFFLOAD_PARAM),
        (offload_config.DeepSpeedZeroOffloadOptimizerConfig, deepspeed.OFFLOAD_OPTIMIZER),
    ):
        aliases = {field.alias for field in model.model_fields.values() if field.alias}
        assert {*model.model_fields, *aliases} == names
