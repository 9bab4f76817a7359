"""Teachers behind endpoints in a config: settings that are read, and messages of refusals."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.dry_run import dry_run_text
from pipeline.cache.kinds import hidden_states_of
from pipeline.config.load import dump_config, load_config, local_paths
from pipeline.config.run import Config
from pipeline.config.teachers import EndpointConfig, EndpointTeacherConfig, TeacherConfig
from pipeline.errors import ConfigError
from pipeline.run.identities import cache_identities
from pipeline.run.preparation import preparation_key
from pipeline.run.training_spec import used_teachers
from teachers.engine.arguments import ENDPOINT_PARAMETERS
from tests.support.command_line import QUICKSTART

PAGE = Path(__file__).resolve().parents[3] / "docs/teachers.md"
VLLM = "url: 'http://host:8000/v1', model: m, api: vllm, tokenizer: ./student"
TEXT = "url: 'https://host/v1/', model: m, api: openai, scores: false"
SCORING = f"teachers.third={{endpoint: {{{VLLM}}}, model_identity: m at 1}}"
WRITING = f"teachers.third={{endpoint: {{{TEXT}}}}}"
NARROW = ["scoring.num_logprobs=20", "scoring.selection={type: top_k, max_entries: 20}"]


def load(*overrides: str) -> Config:
    return load_config(QUICKSTART / "config.yaml", [*NARROW, *overrides])


def test_both_kinds_of_teachers_survive_a_round_trip(tmp_path: Path) -> None:
    config = load(SCORING)
    third = config.teachers["third"]
    assert isinstance(third, EndpointTeacherConfig)
    assert isinstance(config.teachers["words"], TeacherConfig)
    assert third.endpoint.tokenizer == str(QUICKSTART / "student")
    assert local_paths(config)["teachers.third.endpoint.tokenizer"] == third.endpoint.tokenizer
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_template_arguments_survive_a_round_trip_and_are_new_work(tmp_path: Path) -> None:
    told = WRITING.replace(TEXT, f"{TEXT}, template_arguments: {{thinking: false}}")
    student = ["student.template_arguments={thinking: null}", "student.template_date=2026-11-30"]
    config, path = load(told, *student), tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    keys = {preparation_key(load(*o)) for o in ([WRITING], [told], [WRITING, student[0]])}
    assert len(keys) == 3 and "template_arguments" not in dump_config(load(WRITING))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("{domains: [x]}", "either `model`.*or `endpoint`.*it has neither"),
        (f"{{model: m, endpoint: {{{TEXT}}}}}", "it has both"),
        (f"{{endpoint: {{{TEXT}}}, vllm: {{}}}}", r"\['vllm'\] belong to a teacher with `model`"),
        ("{model: m/n, model_identity: x}", r"\['model_identity'\] belong .* with `endpoint`"),
        (f"{{endpoint: {{{TEXT}}}, domain: []}}", "did you mean 'domains'"),
        (f"{{endpoint: {{{TEXT}, modle: x}}}}", "teachers.third.endpoint.modle.*'model'"),
        (f"{{endpoint: {{{VLLM}}}}}", "needs `model_identity`"),
        (f"{{endpoint: {{{TEXT.replace('false', 'true')}}}}}", "set `scores: false`"),
        (f"{{endpoint: {{{TEXT}, tokenizer: m/n}}}}", "leave `tokenizer` out"),
        ("{endpoint: {url: 'http://h/v1', model: m, api: vllm}}", "`tokenizer` must name"),
        ("{endpoint: {url: 'h:8000', model: m, api: vllm}}", "must be like http://host:8000/v1"),
        (f"{{endpoint: {{{TEXT}, api_key_env: lower}}}}", "name of an environment variable"),
        (f"{{endpoint: {{{TEXT}, max_concurrency: 0}}}}", "greater than or equal to 1"),
        (
            f"{{endpoint: {{{VLLM}, template_arguments: {{a: 1}}}}, model_identity: x}}",
            "rendered with student.template_arguments: leave template_arguments out",
        ),
        (f"{{endpoint: {{{TEXT}, template_arguments: {{tools: 1}}}}}}", "is set for every prompt"),
    ],
)
def test_a_teacher_that_makes_no_sense_is_refused(teacher: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(f"teachers.third={teacher}")


@pytest.mark.parametrize(
    "wrong",
    [
        f"{TEXT}, api_key_env: sk-SECRET-key",
        f"{TEXT}, api_key: sk-SECRET-key",
        "url: 'https://me:sk-SECRET-key@host/v1', model: m, api: openai, scores: false",
    ],
)
def test_a_key_that_stands_in_the_config_is_not_repeated(wrong: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load(f"teachers.third={{endpoint: {{{wrong}}}}}")
    assert "sk-SECRET" not in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [SCORING, "scoring.num_logprobs=32"],
            "returns at most 20: start the server with `--max-logprobs 32`",
        ),
        (
            [
                SCORING,
                "training.losses=[{type: hidden_state, weight: 1, teacher: third, "
                "layers: {1: 1}, measure: mse, projection: learned}]",
            ],
            "hidden states of teacher 'third', which an endpoint does not give",
        ),
        (
            [WRITING, "combine.weights={type: static, teachers: {words: 1, third: 1}}"],
            r"combine.weights.teachers gives a weight to \['third'\], which do not score",
        ),
        (
            [WRITING, "synthesis.filters=[{type: perplexity, teacher: third, max: 9}]"],
            "needs cached rows of 'third', which does not score",
        ),
        (
            [
                WRITING.replace(TEXT, f"{TEXT}, api_key_env: MY_SERVER"),
                "cluster.env_vars={MY_SERVER: sk-SECRET}",
            ],
            "cluster.env_vars holds MY_SERVER, the key of teacher 'third'",
        ),
        (
            [
                f"teachers={{third: {{endpoint: {{{TEXT}}}}}}}",
                "combine.weights={type: confidence, per: token, temperature: 1}",
            ],
            "no teacher scores",
        ),
    ],
)
def test_what_an_endpoint_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        load(*overrides)
    assert "sk-SECRET" not in str(refused.value)


def test_the_endpoints_of_the_page_load() -> None:
    blocks = re.findall(r"```yaml\n(teachers:.*?)```", PAGE.read_text(), flags=re.DOTALL)
    several = [yaml.safe_load(block)["teachers"] for block in blocks if "endpoint:" in block]
    scoring = []
    for teachers in several:
        config = load(*(f"teachers.{name}={json.dumps(value)}" for name, value in teachers.items()))
        scoring.append(config.scoring_teachers)
    assert scoring == [["arithmetic", "words", "large"], ["arithmetic", "words"]]


def test_every_field_is_on_the_page() -> None:
    for field in EndpointConfig.model_fields:
        assert f"`{field}`" in PAGE.read_text(), field


def test_a_server_that_gives_more_is_believed() -> None:
    wide = SCORING.replace(VLLM, f"{VLLM}, max_logprobs: 64")
    assert load(wide, "scoring.num_logprobs=64").scoring.num_logprobs == 64


def test_a_teacher_that_only_writes_has_no_cache_and_no_weight() -> None:
    identities: dict[str, Any] = {n: {"weights": n} for n in ("arithmetic", "words", "third")}
    for overrides, scoring in (([WRITING], False), ([SCORING], True)):
        config = load(*overrides, "combine.weights={type: confidence, per: token, temperature: 1}")
        recipes = cache_identities(config, identities, "hash")
        assert ("third" in recipes) is scoring
        assert ("third" in used_teachers(config)) is scoring
        assert hidden_states_of("third") not in recipes


def test_the_cache_of_an_endpoint_depends_on_the_model_identity_and_not_on_the_address() -> None:
    identities = {"third": {"endpoint": "m at 1", "api": "vllm"}}
    recipe = cache_identities(load(SCORING), identities, "hash")["third"]
    assert recipe["model"] == identities["third"] and recipe["vllm"] == {}
    moved = SCORING.replace("http://host:8000", "http://elsewhere:1").replace(
        VLLM.split(", ")[-1], VLLM.split(", ")[-1] + ", max_concurrency: 3, max_retries: 0"
    )
    assert preparation_key(load(SCORING)) == preparation_key(load(moved))
    other = SCORING.replace("m at 1", "m at 2")
    assert preparation_key(load(SCORING)) != preparation_key(load(other))


def test_the_dry_run_shows_whom_it_asks(tmp_path: Path) -> None:
    shown = dry_run_text(load(WRITING, f"storage.root={tmp_path}"))
    assert "teacher third: 1 x 0.5 CPU, 32 requests at once to https://host/v1, which only" in shown
    assert "each of 2 teachers" in shown


def test_parameters_that_servers_ignore_silently_are_refused_before_anything_runs(
    tmp_path: Path,
) -> None:
    for kind, honoured in ((WRITING, "openai"), (SCORING, "vllm")):
        answer = "{type: answer, by: third, sampling: {max_tokens: 9, %s: %s}}"
        for key, value, is_fine in (
            ("top_p", 0.9, True),
            ("top_k", 5, honoured == "vllm"),
            ("bad_words", "[x]", False),
            ("watermarking", "true", False),
        ):
            config = load(
                kind, f"storage.root={tmp_path}", f"synthesis.recipes=[{answer % (key, value)}]"
            )
            if is_fine:
                dry_run_text(config)
                continue
            with pytest.raises(ConfigError, match=f"sampling.{key}"):
                dry_run_text(config)
    assert ENDPOINT_PARAMETERS["openai"] < ENDPOINT_PARAMETERS["vllm"]
