"""Values of a config that mean nothing, or cannot be what their writer meant."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config.load import dump_config, load_config
from tests.support.command_line import QUICKSTART
from tests.support.hostile import Case, check_answer

pytestmark = pytest.mark.timeout(30)

TEXT = "model: m, api: openai, scores: false"
WRITER = "url: http://h/v1, model: m, api: openai, scores: false"
LONG = "x" * 300


def endpoint(fields: str) -> list[str]:
    """Overrides that add a teacher behind an endpoint."""
    return [f"teachers.third={{endpoint: {{{fields}}}}}"]


def at(url: str) -> list[str]:
    """Overrides that add a teacher at an address."""
    return endpoint(f"url: {url!r}, {TEXT}")


NUMBERS = [
    Case("seed true", "seed=true", ("seed: must be a number, found true",)),
    Case("seed yes", "seed=yes", ("seed: must be a number, found true",)),
    Case("seed off", "seed=off", ("seed: must be a number, found false",)),
    Case("seed 1.5", "seed=1.5", ("seed", "1.5")),
    Case("seed NaN", "seed=.nan", ("seed", "nan")),
    Case("seed infinite", "seed=.inf", ("seed", "inf")),
    Case("seed a date", "seed=2026-11-30", ("seed", "found datetime.date(2026, 11, 30)")),
    Case("seed a list", "seed=[17]", ("seed", "found [17]")),
    Case("steps true", "training.steps=true", ("training.steps: must be a number, found true",)),
    Case("steps 0", "training.steps=0", ("training.steps", "greater than or equal to 1")),
    Case("steps -5", "training.steps=-5", ("training.steps", "found -5")),
    Case("steps 1e3 in quotes", "training.steps='1e3'", ("training.steps", "found '1e3'")),
    Case("name like a number", "name=1e3", ("name", "put it in quotes")),
    Case("name like a truth", "name=no", ("name", "found False", "put it in quotes")),
    Case("steps 10^19", f"training.steps={10**19}", ("training.steps: must be at most 10",)),
    Case("steps 10^21", f"training.steps={10**21}", ("is no number",)),
    Case("steps 10^21 in quotes", f"training.steps='{10**21}'", ("must be at most 1000000000000",)),
    Case("steps of 5000 digits in quotes", f"training.steps='{'9' * 5000}'", ("training.steps",)),
    Case("sequences 10^18", f"training.sequences_per_step={10**18}", ("must be at most",)),
    Case("warm-up longer than training", "training.warmup_steps=400", ("must be less than steps",)),
    Case("learning rate infinite", "training.learning_rate=.inf", ("finite number, found inf",)),
    Case("learning rate NaN", "training.learning_rate=.nan", ("finite number, found nan",)),
    Case("learning rate 1e400", "training.learning_rate=1e400", ("learning_rate", "'1e400'")),
    Case("learning rate 1.0e+400", "training.learning_rate=1.0e+400", ("is no number",)),
    Case("learning rate 0", "training.learning_rate=0", ("greater than 0",)),
    Case("learning rate -1", "training.learning_rate=-1", ("greater than 0, found -1",)),
    Case("learning rate true", "training.learning_rate=true", ("must be a number, found true",)),
    Case("weight decay infinite", "training.weight_decay=.inf", ("training.weight_decay",)),
    Case("clipping infinite", "training.gradient_clipping=.inf", ("training.gradient_clipping",)),
    Case("betas 2", "training.betas=[2, 0.9]", ("training.betas.0", "less than 1")),
    Case("betas NaN", "training.betas=[0.9, .nan]", ("training.betas.1", "finite")),
    Case("betas three", "training.betas=[0.9, 0.9, 0.9]", ("training.betas",)),
    Case("failures -2", "training.max_failures=-2", ("training.max_failures",)),
    Case("cost infinite", "teachers.words.cost_per_hour=.inf", ("cost_per_hour", "finite")),
    Case("cost NaN", "training.cost_per_hour=.nan", ("cost_per_hour", "finite")),
    Case("cost of an endpoint", [*endpoint(WRITER), "teachers.third.cost_per_hour=.inf"],
         ("teachers.third", "finite")),
    Case("student's cost true", "student.cost_per_hour=true", ("must be a number, found true",)),
    Case("resources NaN", "teachers.words.resources.num_cpus=.nan", ("num_cpus", "finite")),
    Case("resources infinite", "teachers.words.resources.num_gpus=.inf", ("num_gpus", "finite")),
    Case("resources -1", "teachers.words.resources.num_gpus=-1", ("num_gpus", "found -1")),
    Case("resources 10^8", "training.resources.num_cpus=100000000", ("num_cpus", "100000")),
    Case("resources true", "training.resources.num_gpus=true", ("num_gpus", "found true")),
    Case("custom -1", "training.resources.custom={a: -1}", ("custom.a", "found -1")),
    Case("custom NaN", "training.resources.custom={a: .nan}", ("custom.a", "finite")),
    Case("custom true", "training.resources.custom={a: true}", ("custom.a", "found true")),
    Case("custom without a name", "training.resources.custom={'': 1}", ("custom", "is empty")),
    Case("custom GPU", "training.resources.custom={GPU: 1}", ("GPU is a resource of Ray's own",)),
    Case("replicas 10^8", "teachers.words.replicas=100000000", ("replicas", "10000")),
    Case("student's replicas", "student.replicas=100000", ("student.replicas", "10000")),
    Case("workers 10^6", "training.workers=1000000", ("training.workers", "10000")),
    Case("loaders 10^6", "training.loader_processes=1000000", ("loader_processes", "1000")),
    Case("rounds 10^6", "rounds=1000000", ("rounds", "less than or equal to 1000")),
    Case("rounds 10^12", f"rounds={10**12}", ("rounds", "less than or equal to 1000")),
    Case("round 5 of 1", "round=5", ("round (5) is above rounds (1)",)),
    Case("samples 10^9", "synthesis.recipes.0.samples_per_prompt=1000000000", ("10000",)),
    Case("CPUs of the head", "cluster.local_num_cpus=10000000", ("local_num_cpus", "100000")),
    Case("CPUs of the head 0", "cluster.local_num_cpus=0", ("local_num_cpus",)),
    Case("GPUs of the head", "cluster.local_num_gpus=true", ("local_num_gpus", "found true")),
    Case("fraction 1.5", "prompts.holdout_fraction=1.5", ("holdout_fraction", "found 1.5")),
    Case("fraction NaN", "prompts.validation_fraction=.nan", ("validation_fraction",)),
    Case("mass NaN", "scoring.selection.mass=.nan", ("selection", "finite")),
    Case("entries true", "scoring.selection.max_entries=true", ("found true",)),
    Case("entries 256", "scoring.selection.max_entries=256", ("less than or equal to 255",)),
    Case("width 0", "scoring.num_logprobs=0", ("num_logprobs",)),
    Case("width true", "scoring.num_logprobs=true", ("num_logprobs", "found true")),
    Case("weight infinite", "combine.weights.domains.words={words: .inf}", ("finite",)),
    Case("weight NaN", "combine.weights.domains.words={words: .nan}", ("finite",)),
    Case("weight true", "combine.weights.domains.words={words: true}", ("found true",)),
    Case("loss of infinite weight", "training.losses.0.weight=.inf", ("weight", "finite")),
    Case("loss at NaN degrees", "training.losses.0.temperature=.nan", ("temperature", "finite")),
    Case("skew NaN", "training.losses=[{type: jensen_shannon, weight: 1, beta: .nan}]",
         ("beta", "finite")),
    Case("perplexity without an end", "synthesis.filters=[{type: perplexity, teacher: words, "
         "max: .inf}]", ("max", "finite")),
    Case("share NaN", "synthesis.filters=[{type: balance, shares: {words: .nan, arithmetic: 1}}]",
         ("shares.words", "finite")),
    Case("n-gram true", "synthesis.filters.2.ngram=true", ("ngram", "found true")),
    Case("limit 0", "prompts.sources.0.limit=0", ("limit",)),
    Case("timeout infinite", endpoint(f"{WRITER}, timeout_seconds: .inf"), ("timeout_seconds",)),
    Case("timeout NaN", endpoint(f"{WRITER}, timeout_seconds: .nan"), ("timeout_seconds",)),
    Case("timeout 0", endpoint(f"{WRITER}, timeout_seconds: 0"), ("timeout_seconds",)),
    Case("retries 10^6", endpoint(f"{WRITER}, max_retries: 1000000"), ("max_retries", "1000")),
    Case("requests at once", endpoint(f"{WRITER}, max_concurrency: 1000000"), ("concurrency",)),
    Case("server's tokens true", endpoint(f"{WRITER}, max_model_len: true"), ("found true",)),
]  # fmt: skip
TEXTS = [
    Case("root empty", "storage.root=''", ("storage.root: is empty",)),
    Case("root of blanks", "storage.root='  '", ("storage.root: is empty",)),
    Case("root null", "storage.root=~", ("storage.root", "found None")),
    Case("root the home folder", "storage.root='~'", ("storage.root", "folder of many other")),
    Case("root the home folder in longer words", "storage.root='~/.'", ("folder of many other",)),
    Case("root the whole disk", "storage.root=/", ("storage.root", "folder of many other")),
    Case("root a number", "storage.root=5", ("storage.root", "found 5")),
    Case("root of an unknown store", "storage.root=s3://b", ("models_root must be a folder",)),
    Case("root with options", "storage={root: 's3://b/x?region=eu', models_root: /m}",
         ("storage.root", "write 's3://b/x'")),
    Case("models root empty", "storage.models_root=''", ("storage.models_root: is empty",)),
    Case("shared root empty", "storage.shared_roots=['']", ("shared_roots.0: is empty",)),
    Case("source empty", "prompts.sources.0.path=''", ("path: is empty",)),
    Case("no sources", "prompts.sources=[]", ("prompts.sources", "at least 1")),
    Case("checker empty", "prompts.checker=''", ("prompts.checker: is empty",)),
    Case("student without a model", "student.model=''", ("student.model: is empty",)),
    Case("teacher without a model", "teachers.words.model=''", ("teachers.words", "is empty")),
    Case("template empty", "student.chat_template=''", ("student.chat_template: is empty",)),
    Case("token empty", "student.eos_token=''", ("student.eos_token: is empty",)),
    Case("revision empty", "student.revision=''", ("student.revision: is empty",)),
    Case("rubric empty", "synthesis.filters=[{type: judge, teacher: words, min_grade: 4, "
         "rubric: ''}]", ("rubric: is empty",)),
    Case("name null", "name=", ("name", "found None")),
    Case("name empty", "name=''", ("name",)),
    Case("name above", "name=../x", ("name", "pattern")),
    Case("name with a slash", "name=a/b", ("name", "pattern")),
    Case("name with a space", "name=a b", ("name", "pattern")),
    Case("name with an accent", "name=é", ("name", "pattern")),
    Case("name of dots", "name=..", ("name", "pattern")),
    Case("name that hides", "name=.a", ("name", "pattern")),
    Case("name like an option", "name=-x", ("name", "pattern")),
    Case("name with a line's end", 'name="a\\n"', ("name", "pattern")),
    Case("name true", "name=true", ("name", "found True")),
    Case("name of 300 characters", f"name={LONG}", ("name", "at most 128 characters")),
    Case("name of 129 characters", f"name={'x' * 129}", ("name", "at most 128 characters")),
    Case("teacher of 300 characters", f"teachers.{LONG}={{model: x}}", ("128 characters",)),
    Case("teacher above", "teachers={../x: {model: x}}", ("pattern",)),
    Case("teacher with a sign of caches", "teachers={a+features: {model: x}}", ("pattern",)),
    Case("teacher a number", "teachers={5: {model: x}}", ("teachers.5", "valid string")),
    Case("teacher named student", "teachers.student={model: x}", ("cannot be named 'student'",)),
    Case("domain of 300 characters", f"teachers.words.domains=[{LONG}]", ("128 characters",)),
    Case("domain above", "teachers.words.domains=[../x]", ("domains.0", "pattern")),
    Case("domain off", "teachers.words.domains=[no]", ("domains.0", "found False")),
    Case("source's domain", f"prompts.sources.0.domain={LONG}", ("128 characters",)),
    Case("variable with a sign", "cluster.env_vars={'A=B': x}", ("'A=B' cannot be the name",)),
    Case("variable without a name", "cluster.env_vars={'': x}", ("'' cannot be the name",)),
    Case("variable with a space", "cluster.env_vars={A B: x}", ("'A B' cannot be the name",)),
    Case("variable with a digit first", "cluster.env_vars={1A: x}", ("'1A' cannot be the name",)),
    Case("variable with a dash", "cluster.env_vars={A-B: x}", ("'A-B' cannot be the name",)),
    Case("variable a number", "cluster.env_vars={A: 5}", ("cluster.env_vars.A", "found 5")),
    Case("variable true", "cluster.env_vars={A: true}", ("cluster.env_vars.A", "found True")),
    Case("variable null", "cluster.env_vars={A: }", ("cluster.env_vars.A", "found None")),
    Case("port 99999", at("http://h:99999/v1"), ("must be like http://host:8000/v1", "99999")),
    Case("port 0", at("http://h:0/v1"), ("must be like http://host:8000/v1",)),
    Case("port a word", at("http://h:http/v1"), ("must be like http://host:8000/v1",)),
    Case("port -1", at("http://h:-1/v1"), ("must be like http://host:8000/v1",)),
    Case("space in a host", at("http://a b:8000/v1"), ("must be like http://host:8000/v1",)),
    Case("space behind a URL", at("http://h:8000/v1 "), ("must be like http://host:8000/v1",)),
    Case("line in a URL", endpoint(f'url: "http://h\\n/v1", {TEXT}'), ("must be like http",)),
    Case("bracket without its end", at("http://[::1/v1"), ("must be like http://host:8000/v1",)),
    Case("no host", at("http://"), ("must be like http://host:8000/v1",)),
    Case("no scheme", at("host:8000/v1"), ("must be like http://host:8000/v1",)),
    Case("a file", at("file:///etc/passwd"), ("must be like http://host:8000/v1",)),
    Case("accent in a host", at("http://hôst/v1"), ("must be like http://host:8000/v1",)),
    Case("query", at("http://h/v1?a=b"), ("leave out the part that begins with ? or #",)),
    Case("URL empty", at(""), ("must be like http://host:8000/v1, found ''",)),
    Case("served model empty", endpoint("url: http://h/v1, model: '', api: openai, scores: false"),
         ("model: is empty",)),
    Case("vllm with a date", "teachers.words.vllm={revision: 2026-11-30}",
         ("revision is a date in YAML, found 2026-11-30", "quotes")),
    Case("vllm with a deep date", "teachers.words.vllm={hf_overrides: {a: [2026-11-30]}}",
         ("hf_overrides.a.0 is a date in YAML", "quotes")),
    Case("vllm with a date as key", "teachers.words.vllm={hf_overrides: {2026-11-30: 1}}",
         ("hf_overrides.2026-11-30 is a date in YAML",)),
    Case("sampling with a set", "evaluation.sampling={max_tokens: 8, stop_token_ids: !!set {5}}",
         ("stop_token_ids is a set in YAML",)),
    Case("deepspeed with bytes", "training.deepspeed={timers: !!binary aGFsbG8=}",
         ("timers is a bytes in YAML",)),
    Case("sampling with a number as key", "evaluation.sampling={max_tokens: 8, 5: 1}",
         ("evaluation.sampling.5", "should be a valid string")),
    Case("unused section", "foo={}", ("unknown key 'foo'",)),
]  # fmt: skip
GOOD = [
    Case("seed -1", "seed=-1"),
    Case("seed of 63 bits", f"seed={2**63 - 1}"),
    Case("name of 128 characters", f"name={'x' * 128}"),
    Case("name like a device", "name=CON"),
    Case("name with a dot", "name=a."),
    Case("steps 1e3", "training.steps=1e3"),
    Case("name in quotes like a number", "name='1e3'"),
    Case("learning rate in other words", "training.learning_rate=1e-3"),
    Case("fraction of a CPU", "training.resources.num_cpus=0.5"),
    Case("custom resource", "training.resources.custom={'node:a': 0.001}"),
    Case("custom 0", "training.resources.custom={a: 0}"),
    Case("root below home", "storage.root=~/polystill"),
    Case("root here", "storage.root=."),
    Case("root with a space", "storage.root='/a b/c'"),
    Case("no limit of failures", "training.max_failures=-1"),
    Case("variable of a library", "cluster.env_vars={NCCL_SOCKET_IFNAME: eth0, _x: ''}"),
    Case("host by its number", at("http://10.0.0.5:8000/v1")),
    Case("host by its long number", at("http://[2001:db8::1]:8000/v1")),
    Case("highest port", at("https://h:65535/v1/")),
    Case("day of a template", "student.template_date=2026-11-30"),
    Case("integer keys", "teachers.words.vllm={hf_overrides: {id2label: {0: a, 1: b}}}"),
    Case("infinite values", "evaluation.sampling={max_tokens: 8, logit_bias: {5: -.inf}}"),
    Case("keys of other kinds", "training.deepspeed={aio: {true: 1, 1.5: 2, ~: 3}}"),
]


def given(overrides: str | list[str]) -> list[str]:
    return [overrides] if isinstance(overrides, str) else overrides


def load(overrides: Any, tmp_path: Path) -> Any:
    return load_config(QUICKSTART / "config.yaml", [f"storage.root={tmp_path}", *given(overrides)])


@pytest.mark.parametrize("case", NUMBERS, ids=str)
def test_a_number_that_means_nothing_is_refused(case: Case, tmp_path: Path) -> None:
    check_answer(case, lambda: load(case.given, tmp_path))


@pytest.mark.parametrize("case", TEXTS, ids=str)
def test_a_text_that_means_nothing_is_refused(case: Case, tmp_path: Path) -> None:
    check_answer(case, lambda: load(case.given, tmp_path))


@pytest.mark.parametrize("case", GOOD, ids=str)
def test_an_odd_value_is_taken_and_comes_back(case: Case, tmp_path: Path) -> None:
    config = check_answer(case, lambda: load(case.given, tmp_path))
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config
