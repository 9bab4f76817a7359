"""Sampling parameters that vLLM would fail a request with, or that would end an engine."""

import math
from pathlib import Path
from typing import Any

import pytest

from jobs.stages.preflight import check_options
from pipeline.config.load import dump_config, load_config
from pipeline.config.run import Config
from teachers.engine.options import ServedModel, answer_parameters, check_sampling_values
from tests.support.command_line import QUICKSTART
from tests.support.hostile import Case, check_answer

pytestmark = pytest.mark.timeout(60)  # the first import of vLLM takes half of it

VOCABULARY = 100
SERVED = ServedModel(VOCABULARY, {})

VALUES = [
    Case("logit bias by a text", {"logit_bias": {"5": -1.0}}, ("logit_bias: {'5': -1.0}", "kind")),
    Case("logit bias by a fraction", {"logit_bias": {1.5: -1.0}}, ("logit_bias: {1.5",)),
    Case("logit bias by nothing", {"logit_bias": {None: -1.0}}, ("logit_bias: {None",)),
    Case("logit bias of nothing", {"logit_bias": {5: None}}, ("logit_bias: {5: None}",)),
    Case("logit bias of a text", {"logit_bias": {5: "low"}}, ("logit_bias: {5: 'low'}",)),
    Case("logit bias outside", {"logit_bias": {100: 1.0}}, ("logit_bias", "[100]", "size: 100")),
    Case("logit bias below 0", {"logit_bias": {-1: 1.0}}, ("logit_bias", "[-1]")),
    Case("logit bias a list", {"logit_bias": [5]}, ("logit_bias: [5]",)),
    Case("logit bias a number", {"logit_bias": 5}, ("logit_bias: 5",)),
    Case("stop id outside", {"stop_token_ids": [100]}, ("stop_token_ids: [100]", "size: 100")),
    Case("stop id below 0", {"stop_token_ids": [-1]}, ("stop_token_ids: [-1]",)),
    Case("stop id a text", {"stop_token_ids": ["</s>"]}, ("stop_token_ids: ['</s>']",)),
    Case("stop id a fraction", {"stop_token_ids": [1.5]}, ("stop_token_ids: [1.5]",)),
    Case("stop ids a number", {"stop_token_ids": 5}, ("stop_token_ids: 5", "kind")),
    Case("stop ids a list of lists", {"stop_token_ids": [[5]]}, ("stop_token_ids: [[5]]",)),
    Case("no token allowed", {"allowed_token_ids": []}, ("allowed_token_ids: []", "empty")),
    Case("allowed id outside", {"allowed_token_ids": [5, 100]}, ("allowed_token_ids", "vocab")),
    Case("allowed id a text", {"allowed_token_ids": ["5"]}, ("allowed_token_ids: ['5']",)),
    Case("allowed ids a number", {"allowed_token_ids": 5}, ("allowed_token_ids: 5",)),
    Case("allowed id beyond 64 bits", {"allowed_token_ids": [2**70]}, ("allowed_token_ids",)),
    Case("temperature -1", {"temperature": -1}, ("temperature: -1", "non-negative")),
    Case("temperature 2.5", {"temperature": 2.5}, ("temperature: 2.5", "[0, 2]")),
    Case("temperature a text", {"temperature": "0.5"}, ("temperature: '0.5'", "kind")),
    Case("temperature nothing", {"temperature": None}, ("temperature: None", "kind")),
    Case("temperature a list", {"temperature": [0.5]}, ("temperature: [0.5]",)),
    Case("top_p 0", {"top_p": 0}, ("top_p: 0", "(0, 1]")),
    Case("top_p 5", {"top_p": 5}, ("top_p: 5",)),
    Case("top_p a text", {"top_p": "0.9"}, ("top_p: '0.9'",)),
    Case("top_k -5", {"top_k": -5}, ("top_k: -5",)),
    Case("top_k a fraction", {"top_k": 5.5}, ("top_k: 5.5",)),
    Case("top_k many", {"top_k": "many"}, ("top_k: 'many'",)),
    Case("min_p 2", {"min_p": 2}, ("min_p: 2", "[0, 1]")),
    Case("presence 3", {"presence_penalty": 3}, ("presence_penalty: 3",)),
    Case("frequency -3", {"frequency_penalty": -3}, ("frequency_penalty: -3",)),
    Case("repetition 0", {"repetition_penalty": 0}, ("repetition_penalty: 0",)),
    Case("repetition infinite", {"repetition_penalty": math.inf}, ("repetition_penalty: inf",)),
    Case("min_tokens -1", {"min_tokens": -1}, ("min_tokens: -1",)),
    Case("min_tokens above max_tokens", {"min_tokens": 9}, ("min_tokens: 9", "max_tokens=8")),
    Case("min_tokens a text", {"min_tokens": "1"}, ("min_tokens: '1'",)),
    Case("min_tokens a fraction", {"min_tokens": 1.5}, ("min_tokens: 1.5",)),
    Case("max_tokens 0", {"max_tokens": 0}, ("max_tokens: 0",)),
    Case("max_tokens a fraction", {"max_tokens": 8.5}, ("max_tokens: 8.5",)),
    Case("max_tokens beyond 64 bits", {"max_tokens": 2**70}, ("max_tokens",)),
    Case("ignore_eos a text", {"ignore_eos": "no"}, ("ignore_eos: 'no'", "bool")),
    Case("skip_special_tokens a number", {"skip_special_tokens": 5}, ("skip_special_tokens: 5",)),
    Case("no field of vLLM", {"temprature": 1}, ("temprature: 1", "temprature")),
    Case("budget of thoughts", {"thinking_token_budget": 5}, ("token_budget: 5", "parser")),
    Case("budget below 0", {"thinking_token_budget": -5}, ("thinking_token_budget: -5",)),
    Case("budget a text", {"thinking_token_budget": "5"}, ("thinking_token_budget: '5'",)),
    Case("repetition of nothing", {"repetition_detection": {"max_pattern_size": -1}},
         ("repetition_detection",)),
    Case("repetition without a count", {"repetition_detection": {"max_pattern_size": 4}},
         ("repetition_detection", "min_count")),
    Case("repetition with another key", {"repetition_detection": "often"},
         ("repetition_detection: 'often'",)),
    Case("arguments beyond 64 bits", {"extra_args": {"a": 2**70}}, ("extra_args", "2**64")),
    Case("arguments a list", {"extra_args": [1]}, ("extra_args: [1]",)),
    Case("interval 0", {"stream_interval": 0}, ("stream_interval: 0",)),
    Case("bias under speculation", ({"logit_bias": {5: 1.0}}, {"speculative_config": {"a": 1}}),
         ("logit_bias", "speculative")),
    Case("min_p under speculation", ({"min_p": 0.5}, {"speculative_config": {"a": 1}}),
         ("min_p", "speculative")),
]  # fmt: skip
GOOD = [
    Case("a ban", {"logit_bias": {5: -math.inf}}),
    Case("a bias of a whole number", {"logit_bias": {5: -100, 0: 1}}),
    Case("greedy", {"temperature": 0}),
    Case("greedy with top_p", {"temperature": 0.0, "top_p": 0.5}),
    Case("top_k off", {"top_k": -1}),
    Case("last token", {"stop_token_ids": [99], "allowed_token_ids": [0, 99]}),
    Case("no stop ids", {"stop_token_ids": None}),
    Case("until the end", {"ignore_eos": True, "min_tokens": 8}),
    Case("repetition", {"repetition_detection": {"max_pattern_size": 4, "min_count": 3}}),
    Case("arguments of a plugin", {"extra_args": {"a": [1, {"b": "c"}]}}),
    Case("budget with a parser", ({"thinking_token_budget": 5}, {"reasoning_parser": "qwen3"})),
]


def check(given: Any) -> Any:
    block, vllm = given if isinstance(given, tuple) else (given, {})
    check_sampling_values({"max_tokens": 8} | block, ServedModel(VOCABULARY, vllm))
    return answer_parameters({"max_tokens": 8} | block, [1])


@pytest.mark.parametrize("case", VALUES, ids=str)
def test_a_value_is_refused_with_its_key(case: Case) -> None:
    check_answer(case, lambda: check(case.given))


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_a_value_that_vllm_takes_is_taken(case: Case) -> None:
    check_answer(case, lambda: check(case.given))


BLOCKS = [
    Case("no max_tokens", "{temperature: 1}", ("evaluation", "sampling.max_tokens", "not None")),
    Case("max_tokens true", "{max_tokens: true}", ("sampling.max_tokens", "not True")),
    Case("max_tokens many", "{max_tokens: many}", ("sampling.max_tokens", "not 'many'")),
    Case("max_tokens 0", "{max_tokens: 0}", ("sampling.max_tokens is 0", "1 or more")),
    Case("max_tokens -1", "{max_tokens: -1}", ("sampling.max_tokens is -1",)),
    Case("temperature NaN", "{max_tokens: 8, temperature: .nan}", ("temperature is nan",)),
    Case("temperature infinite", "{max_tokens: 8, temperature: .inf}", ("temperature is inf",)),
    Case("bias NaN", "{max_tokens: 8, logit_bias: {5: .nan}}", ("logit_bias.5 is nan",)),
    Case("bias infinite", "{max_tokens: 8, logit_bias: {5: .inf}}", ("logit_bias.5 is inf",)),
    Case("deep NaN", "{max_tokens: 8, extra_args: {a: [.nan]}}", ("extra_args.a.0 is nan",)),
    Case("misspelt", "{max_tokens: 8, temprature: 1}", ("did you mean 'temperature'",)),
    Case("several answers", "{max_tokens: 8, n: 2}", ("samples_per_prompt sets it",)),
    Case("a seed", "{max_tokens: 8, seed: 2}", ("derived from the config's seed",)),
    Case("stop words", "{max_tokens: 8, stop: [x]}", ("use stop_token_ids",)),
    Case("bad words", "{max_tokens: 8, bad_words: [x]}", ("use logit_bias",)),
    Case("log-probabilities", "{max_tokens: 8, logprobs: 5}", ("captures distributions",)),
    Case("of certain tokens", "{max_tokens: 8, logprob_token_ids: [5]}", ("captures distrib",)),
    Case("of a prompt's", "{max_tokens: 8, prompt_logprob_token_ids: [[5]]}", ("captures",)),
    Case("a grammar", "{max_tokens: 8, structured_outputs: {regex: a}}", ("needs a tokenizer",)),
    Case("the answer itself", "{max_tokens: 8, trace_decode_token_ids: [5]}", ("shall write",)),
]


@pytest.mark.parametrize("case", BLOCKS, ids=str)
@pytest.mark.parametrize("place", ["evaluation.sampling", "synthesis.recipes.0.sampling"])
def test_a_block_is_refused_before_vllm_is_asked(case: Case, place: str, tmp_path: Path) -> None:
    parts = tuple(part for part in case.refusal if part != "evaluation")
    check_answer(
        Case(case.name, case.given, parts), lambda: check_options(load(f"{place}={case.given}"))
    )


def load(*overrides: str) -> Config:
    return load_config(QUICKSTART / "config.yaml", list(overrides))


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_a_block_reaches_vllm_as_it_is_written(case: Case, tmp_path: Path) -> None:
    """Through the config of the run, and through the one that travels with the job."""
    block, _ = case.given if isinstance(case.given, tuple) else (case.given, {})
    config = load()
    sampling = {"max_tokens": 8} | block
    changed = config.evaluation.model_copy(update={"sampling": sampling})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config.model_copy(update={"evaluation": changed})))
    travelled = load_config(path).evaluation.sampling
    assert repr(travelled) == repr(sampling)
    assert repr(answer_parameters(travelled, [1])) == repr(answer_parameters(sampling, [1]))


ENGINE = [
    Case("room -5", "{max_model_len: -5}", ("vllm.max_model_len must be a whole number", "-5")),
    Case("room a text", "{max_model_len: 4k}", ("vllm.max_model_len must be", "'4k'")),
    Case("room true", "{max_model_len: true}", ("vllm.max_model_len must be", "True")),
    Case("no sequences", "{max_num_seqs: 0}", ("vllm.max_num_seqs must be", "0")),
    Case("half a device", "{tensor_parallel_size: 0.5}", ("vllm.tensor_parallel_size must be",)),
    Case("log-probabilities a text", "{max_logprobs: many}", ("vllm.max_logprobs must be",)),
    Case("unknown", "{foo: {bar: 1}}", ("vllm.foo is unknown",)),
    Case("room as vLLM finds it", "{max_model_len: -1}"),
    Case("sequences by default", "{max_num_seqs: null}"),
]


@pytest.mark.parametrize("case", ENGINE, ids=str)
def test_sizes_of_an_engine_are_numbers(case: Case) -> None:
    check_answer(case, lambda: check_options(load(f"teachers.words.vllm={case.given}")))
