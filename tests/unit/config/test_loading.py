"""Configuration: shipped files load, mistakes are named, paths become absolute, round trips are
equal.
"""

from pathlib import Path

import pytest

from pipeline.config.base import Section
from pipeline.config.load import dump_config, load_config
from pipeline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = ROOT / "examples/quickstart/config.yaml"
SHIPPED = sorted((ROOT / "examples").glob("*/*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


def test_paths_are_absolute_against_the_config_file() -> None:
    config = load_config(QUICKSTART)
    assert config.storage.root == str(QUICKSTART.parent / "output")
    assert config.teachers["words"].model == str(QUICKSTART.parent / "teachers/words")
    assert config.prompts.sources[0].path == str(QUICKSTART.parent / "prompts.jsonl")


def test_a_hub_id_is_left_alone() -> None:
    config = load_config(QUICKSTART, ["teachers.words.model=Qwen/Qwen3-8B"])
    assert config.teachers["words"].model == "Qwen/Qwen3-8B"


def test_a_folder_without_a_dot_is_not_taken_for_a_hub_id() -> None:
    with pytest.raises(ConfigError, match=r"write \./teachers/words for the folder"):
        load_config(QUICKSTART, ["teachers.words.model=teachers/words"])


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(QUICKSTART, ["storage.root=~/runs", "student.model=~/models/small"])
    assert config.storage.root == "/home/somebody/runs"
    assert config.student.model == "/home/somebody/models/small"


def test_an_override_changes_one_place_of_a_yaml_anchor_alone() -> None:
    config = load_config(QUICKSTART, ["teachers.words.vllm.max_num_seqs=3"])
    assert config.teachers["words"].vllm["max_num_seqs"] == 3
    assert config.teachers["arithmetic"].vllm["max_num_seqs"] == 128
    assert config.student.vllm["max_num_seqs"] == 128


def test_overrides_reach_lists_and_nested_keys() -> None:
    config = load_config(
        QUICKSTART,
        ["training.steps=70", "training.losses.0.weight=0.5", "prompts.sources.0.limit=9"],
    )
    assert (config.training.steps, config.training.losses[0].weight) == (70, 0.5)
    assert config.prompts.sources[0].limit == 9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stepz=3", "unknown key 'training.stepz'; did you mean 'steps'?"),
        ("scoring.selection.max_entrys=3", "did you mean 'max_entries'?"),
        ("teachers.words.modle=x", "did you mean 'model'?"),
        ("steps", "not of the form key=value"),
        ("training.steps=[1", "the value is not valid YAML"),
        ("training.steps.x=3", "plain value"),
        ("training.losses.7.weight=3", "not an index"),
        ("training.steps=many", "unable to parse string as an integer, found 'many'"),
        ("scoring.num_logprobs=4", "exceeds num_logprobs"),
        ("scoring.selection.max_entries=300", "255"),
        ("training.deepspeed={train_batch_size: 8}", "training.sequences_per_step sets the batch"),
        ("prompts.validation_fraction=0.1", "every source has a `split`"),
        ("scoring.features.dimensions=8", "no loss needs any"),
        ("synthesis.max_sequence_tokens=257", "exceeds training.tokens_per_micro_batch (256)"),
        ("training.warmup_steps=5000", "must be less than steps"),
        ("combine.weights.domains.words={nobody: 1.0}", "the teachers are"),
        ("combine.weights.domains.words={words: 0}", "above 0"),
        ("teachers.words.domains=[arithmetic]", "claimed by teachers"),
        ("name=a/b", "name"),
        ("storage.root=s3://bucket/x", "models_root must be a folder"),
        (
            "storage={root: 's3://bucket/x?region=eu-central-1', models_root: /mnt/models}",
            "storage.root is 's3://bucket/x?***'",
        ),
        ("storage={root: 's3://b/x?scheme=http', models_root: /m}", "AWS_ENDPOINT_URL"),
        ("prompts.sources.0.path=s3://b/x.jsonl#part", "write 's3://b/x.jsonl'"),
        (
            "teachers.words.vllm.tensor_parallel_size=4",
            "teachers.words.vllm with tensor_parallel_size: 4 runs 4 processes",
        ),
        (
            "teachers.words={model: a/b, vllm: {tensor_parallel_size: 2, pipeline_parallel_size: "
            "2}, resources: {num_gpus: 2}}",
            "teachers.words.resources.num_gpus is 2: set num_gpus: 4 there",
        ),
        (
            "teachers.words={model: a/b, resources: {num_gpus: 2}}",
            "no parallel size runs 1 process, on a GPU of its own",
        ),
        ("student.attn_implementation=flash_attention_2", "set dtype: bfloat16, or choose sdpa"),
        (
            "evaluation.resources={num_gpus: 2}",
            "student.vllm with no parallel size",
        ),
    ],
)
def test_a_mistake_is_one_clear_message(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(QUICKSTART, [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("block", "resources"),
    [
        ("{}", "{num_gpus: 0.5}"),
        ("{tensor_parallel_size: 2}", "{num_cpus: 2}"),
        ("{tensor_parallel_size: 2, data_parallel_size: 2}", "{num_gpus: 4}"),
        ("{tensor_parallel_size: 8, distributed_executor_backend: ray}", "{num_gpus: 0}"),
    ],
)
def test_resources_that_hold_an_engine_are_accepted(block: str, resources: str) -> None:
    words = f"{{model: a/b, domains: [words], vllm: {block}, resources: {resources}}}"
    assert load_config(QUICKSTART, [f"teachers.words={words}"]).teachers["words"].replicas == 1


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_config(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    for content in (b"a: [", b"a: \xff"):
        broken.write_bytes(content)
        with pytest.raises(ConfigError, match="not valid YAML"):
            load_config(broken)


@pytest.mark.parametrize("call", ["stat", "open"])
def test_a_file_that_may_not_be_read_is_told(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is made here, since root may read everything; `stat` fails in a closed folder."""

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    path = tmp_path / "config.yaml"
    path.write_text("name: x\n")
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="Permission denied") as e:
        patch.setattr(Path, call, refuse)
        load_config(path)
    assert str(path) in str(e.value)


def sections(base: type[Section]) -> list[type[Section]]:
    """All sections of the config, at any depth of inheritance."""
    direct = base.__subclasses__()
    return [*direct, *(deeper for section in direct for deeper in sections(section))]


def test_every_field_has_help() -> None:
    assert len(sections(Section)) > 50
    without = [
        f"{section.__name__}.{name}"
        for section in sections(Section)
        for name, field in section.model_fields.items()
        if not field.description and name != "type"
    ]
    assert without == []
