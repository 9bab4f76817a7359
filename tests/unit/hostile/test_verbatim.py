"""Verbatim blocks keep their keys and values on every way that a config takes."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import dump_config, load_config
from pipeline.config.run import Config
from pipeline.fingerprint import digest_json, exact_json
from pipeline.run.identities import sampling_of, scoring_identity, synthesis_identity
from tests.support.command_line import QUICKSTART
from tests.support.hostile import Case, check_answer

pytestmark = pytest.mark.timeout(30)

WRITER = (
    "teachers.third={{endpoint: {{url: http://h/v1, model: m, api: openai, scores: false, {}}}}}"
)
PLACES = {
    "teachers.words.vllm": "{}",
    "student.vllm": "{}",
    "training.deepspeed.aio": "{}",
    "evaluation.sampling": "{{max_tokens: 8, extra_args: {}}}",
    "synthesis.recipes.0.sampling": "{{max_tokens: 8, extra_args: {}}}",
    "synthesis.recipes.0.sampling_of": "{{words: {{extra_args: {}}}}}",
}
VALUES = [
    Case("whole number as key", "{a: {5: x}}"),
    Case("text of a number as key", "{a: {'5': x}}"),
    Case("negative number as key", "{a: {-5: x}}"),
    Case("fraction as key", "{a: {5.5: x}}"),
    Case("truth as key", "{a: {true: x}}"),
    Case("text of a truth as key", "{a: {'true': x}}"),
    Case("nothing as key", "{a: {~: x}}"),
    Case("infinity as key", "{a: {.inf: x}}"),
    Case("infinity", "{a: .inf}"),
    Case("minus infinity", "{a: -.inf}"),
    Case("text of infinity", "{a: '.inf'}"),
    Case("text inf", "{a: inf}"),
    Case("not a number", "{a: .nan}"),
    Case("text nan", "{a: nan}"),
    Case("nothing", "{a: null}"),
    Case("text of nothing", "{a: 'null'}"),
    Case("empty text", "{a: ''}"),
    Case("truth", "{a: true}"),
    Case("text of a truth", "{a: 'true'}"),
    Case("one", "{a: 1}"),
    Case("text of one", "{a: '1'}"),
    Case("float of one half", "{a: 0.5}"),
    Case("small float", "{a: 1.0e-300}"),
    Case("float without a point", "{a: 1e-3, b: 5e8, c: -1E+6}"),
    Case("text of a float", "{a: '1e-3', b: 'e5', c: 1e}"),
    Case("text of a date", "{a: '2026-11-30'}"),
    Case("text of a time", "{a: '12:30'}"),
    Case("text of an octal number", "{a: '010'}"),
    Case("63 bits", f"{{a: {2**63 - 1}}}"),
    Case("list", "{a: [1, [2, {3: .inf}]]}"),
    Case("empty list", "{a: []}"),
    Case("empty mapping", "{a: {}}"),
    Case("text of a mapping", "{a: '{}'}"),
    Case("emoji", "{a: 😀}"),
    Case("lines", '{a: "x\\ny\\tz"}'),
    Case("escape", '{a: "\\e[0m"}'),
    Case("no-break space", '{a: "\\_"}'),
]


def load(*overrides: str) -> Config:
    return load_config(QUICKSTART / "config.yaml", list(overrides))


def at(config: Config, place: str) -> Any:
    value = config.model_dump()
    for key in place.split("."):
        value = value[int(key) if isinstance(value, list) else key]
    return value


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", VALUES, ids=str)
def test_a_block_comes_back_as_it_is_written(case: Case, place: str, tmp_path: Path) -> None:
    """The config that travels with a job is read again; `repr` tells types and not-a-number."""
    config = check_answer(case, lambda: load(f"{place}={PLACES[place].format(case.given)}"))
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert repr(at(load_config(path), place)) == repr(at(config, place))


def test_every_value_has_an_identity_of_its_own() -> None:
    """Over all places, since a JSON value must tell what the blocks tell apart."""
    for place, form in PLACES.items():
        configs = [load(f"{place}={form.format(case.given)}") for case in VALUES]
        digests = {digest_json(config.model_dump(mode="json")) for config in configs}
        assert len(digests) == len(VALUES), place


def test_caches_and_answers_of_different_values_have_different_names() -> None:
    names = set()
    for case in VALUES:
        config = load(
            f"teachers.words.vllm={case.given}",
            f"synthesis.recipes.0.sampling_of={{words: {{extra_args: {case.given}}}}}",
        )
        recipe = config.synthesis.recipes[0]
        cache = scoring_identity(config, "words", {}, "")
        answers = synthesis_identity(config, recipe, "words", {}, "")
        assert sampling_of(recipe, "words")["extra_args"] is not None
        names |= {digest_json(cache), digest_json(answers)}
    assert len(names) == 2 * len(VALUES)


def test_what_json_holds_is_its_own_identity() -> None:
    """So that the names of finished caches stay."""
    value = {"a": [1, 0.5, None, True, "x", {"b": {}}], "c": -(10**18), "!d": ""}
    assert exact_json(value) == value
    assert exact_json({5: [float("-inf")]}) == {"!int 5": [{"!float": "-inf"}]}


EXTRA = [
    Case("infinity", "{a: .inf}", ("extra must hold what JSON holds", "inf")),
    Case("deep infinity", "{a: [{b: -.inf}]}", ("extra must hold what JSON holds",)),
    Case("not a number", "{a: .nan}", ("extra must hold what JSON holds", "nan")),
    Case("number as key", "{a: {5: x}}", ("extra must hold what JSON holds", "{5: 'x'}")),
    Case("truth as key", "{a: {true: x}}", ("extra must hold what JSON holds",)),
    Case("date", "{a: 2026-11-30}", ("a is a date in YAML", "quotes")),
    Case("text", "{reasoning_effort: low}"),
    Case("nested", "{a: {b: [1, 0.5, null, true]}}"),
    Case("texts of numbers as keys", "{logit_bias: {'5': -100}}"),
]
ARGUMENTS = [
    Case("infinity", "{a: .inf}", ("a is inf, which JSON does not know",)),
    Case("deep infinity", "{a: [{b: -.inf}]}", ("which JSON does not know",)),
    Case("not a number", "{a: .nan}", ("a is nan, which JSON does not know",)),
    Case("number as key", "{a: {5: x}}", ("a is {5: 'x'}, which JSON does not know",)),
    Case("date", "{a: 2026-11-30}", ("a is a date in YAML",)),
    Case("no name", "{a b: 1}", ("cannot be a variable",)),
    Case("number as name", "{5: 1}", ("cannot be a variable",)),
    Case("nothing as name", "{~: 1}", ("template_arguments",)),
    Case("truth", "{enable_thinking: false}"),
    Case("list", "{tags: [a, 1, null]}"),
]


@pytest.mark.parametrize("case", EXTRA, ids=str)
def test_fields_of_a_request_are_json(case: Case) -> None:
    override = WRITER.format(f"request: {{extra: {case.given}}}")
    check_answer(case, lambda: load(override))


@pytest.mark.parametrize("case", ARGUMENTS, ids=str)
def test_arguments_of_a_template_are_json(case: Case) -> None:
    check_answer(case, lambda: load(f"student.template_arguments={case.given}"))
