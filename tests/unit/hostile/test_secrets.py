"""Keys, tokens and passwords: refused in configs, and shown in no message."""

import json
import stat
from pathlib import Path

import pytest

from jobs.cluster.connection import connect
from jobs.cluster.upload import build_upload
from pipeline import storage
from pipeline.config.load import load_config
from pipeline.credentials import is_secret_name, shown_url, without_passwords, without_secrets
from pipeline.errors import DistillationError
from tests.support.command_line import QUICKSTART, ROOT
from tests.support.hostile import Case, check_answer

pytestmark = pytest.mark.timeout(30)

SECRET = "S3CRET"
HUGGING_FACE = "hf_" + "aB3dE6gH9j" * 4
OPENAI = "sk-proj-" + "aB3dE6gH9j" * 4
TEXT = "model: m, api: openai, scores: false"
BEFORE_RAY = ("before `ray start` on every node", "before `polystill run` without --address")

NAMES = [
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_ACCESS_KEY_ID"),
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "AZURE_STORAGE_KEY", "TOKEN"),
    *("AZURE_CLIENT_SECRET", "GOOGLE_APPLICATION_CREDENTIALS", "DB_PASSWORD", "MYSQL_PWD", "KEY"),
    *(
        "SMTP_PASS",
        "GITHUB_PAT",
        "SECRET",
        "PASSWORD",
        "CREDENTIAL",
        "hf_token",
        "apiKey",
        "APIKEY",
    ),
    *("MyPassword", "SSH_PASSPHRASE", "KEY_1", "TOKEN2", "_KEY", "PGPASSWORD", "SSHPASS", "DB_PW"),
    *("REDISCLI_AUTH", "DOCKER_AUTH_CONFIG", "GITHUBTOKEN", "HF_HUB_TOKENS", "OPENAI_API_KEYS"),
    *("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_SAS"),
]
SETTING = "cluster.env_vars"
AT_HOST = f"url: http://h/v1, {TEXT}"
VARIABLES = [
    *(
        Case(name, f"{SETTING}={{{name}: {SECRET}}}", (f"{SETTING}.{name}", *BEFORE_RAY))
        for name in NAMES
    ),
    Case("proxy without a scheme", f"{SETTING}={{HTTPS_PROXY: 'u:{SECRET}@p:8080'}}", ("holds",)),
    Case("hook of Slack", f"{SETTING}={{HOOK: 'https://hooks.slack.com/services/T0/B0/x'}}",
         ("HOOK holds a key, token or password",)),
    Case("password of digits", f"{SETTING}={{DB_PASSWORD: '123456'}}", ("is a secret",)),
    Case("key known by its form", f"cluster.env_vars={{SETTING: {OPENAI}}}", ("SETTING holds",)),
    Case("proxy with a password", f"cluster.env_vars={{HTTPS_PROXY: 'http://u:{SECRET}@p:8080'}}",
         ("cluster.env_vars.HTTPS_PROXY holds a key, token or password", *BEFORE_RAY)),
    Case("header", f"cluster.env_vars={{HEADERS: 'Authorization: Bearer {SECRET * 4}'}}",
         ("cluster.env_vars.HEADERS holds",)),
    Case("one variable alone", f"{SETTING}.HF_TOKEN={SECRET}", (f"{SETTING}.HF_TOKEN",)),
]  # fmt: skip
ELSEWHERE = [
    Case("token of vLLM", f"teachers.words.vllm={{hf_token: {SECRET}}}",
         ("teachers.words.vllm.hf_token is a secret by its name", "(as HF_TOKEN)")),
    Case("token of the student's engine", f"student.vllm={{hf_token: {SECRET}}}", ("as HF_TOKEN",)),
    Case("token in a loader's settings",
         f"teachers.words.vllm={{model_loader_extra_config: {{auth_token: {SECRET}}}}}",
         ("model_loader_extra_config.auth_token",)),
    Case("token in a list", f"student.vllm={{hf_token: [{SECRET}]}}", ("hf_token.0 is a secret",)),
    Case("password of an engine's process", f"student.vllm={{env: {{PGPASSWORD: {SECRET}}}}}",
         ("student.vllm.env.PGPASSWORD",)),
    Case("key of an endpoint", f"teachers.t={{endpoint: {{{AT_HOST}, api_key: {SECRET}}}}}",
         ("teachers.t.endpoint.api_key", "endpoint.api_key_env")),
    Case("key in place of its variable",
         f"teachers.t={{endpoint: {{{AT_HOST}, api_key_env: {OPENAI}}}}}",
         ("teachers.t.endpoint.api_key_env holds a key",)),
    Case("key in each request", f"teachers.t={{endpoint: {{{AT_HOST}, request: {{extra: "
         f"{{api_key: {SECRET}}}}}}}}}", ("request.extra.api_key", "endpoint.api_key_env")),
    Case("root with a key", f"storage={{root: 's3://AK:{SECRET}@bucket/x', models_root: /m}}",
         ("storage.root holds a key, token or password",)),
    Case("source with a key", f"prompts.sources.0.path='s3://AK:{SECRET}@bucket/x.jsonl'",
         ("prompts.sources.0.path holds",)),
    Case("source with a key behind a ?", "prompts.sources.0.path='s3://b/x.jsonl?secret_key="
         f"{SECRET}'", ("prompts.sources.0.path", "s3://b/x.jsonl")),
    Case("model with a token", f"student.model=https://user:{SECRET}@hf.co/a", ("student.model",)),
    Case("token known by its form", f"teachers.words.vllm={{download_dir: {HUGGING_FACE}}}",
         ("teachers.words.vllm.download_dir holds a key",)),
    Case("key of AWS", "teachers.words.model_identity=AKIAIOSFODNN7EXAMPLE", ("holds a key",)),
    Case("private key", "student.vllm={x: '-----BEGIN RSA PRIVATE KEY-----'}", ("x holds a key",)),
    Case("token of GitHub", f"student.revision=ghp_{'a1' * 18}", ("student.revision holds",)),
    Case("web token", f"student.revision=eyJ{'a1' * 9}.eyJ{'b2' * 9}.c3", ("revision holds",)),
    Case("dashboard of W&B", f"training.deepspeed={{wandb: {{api_key: {SECRET}}}}}", ("api_key",)),
    Case("password with a cut quote", f"cluster.env_vars={{HF_TOKEN: '{SECRET}}}",
         ("the value is not valid YAML",)),
    Case("password without a key", f"HF_TOKEN: {SECRET}", ("is not of the form key=value",)),
    Case("below a secret", f"seed.HF_TOKEN={SECRET}", ("plain value",)),
]  # fmt: skip
HARMLESS = [
    Case("tokenizers", "cluster.env_vars={TOKENIZERS_PARALLELISM: 'true'}"),
    Case("keyboard", "cluster.env_vars={KEYBOARD: de}"),
    Case("monkey", "cluster.env_vars={MONKEY: m, TURKEY: t}"),
    Case("working folder", "cluster.env_vars={PWD: /x, OLDPWD: /y}"),
    Case("switch about tokens", "cluster.env_vars={HF_HUB_DISABLE_IMPLICIT_TOKEN: '1'}"),
    Case("no token", "cluster.env_vars={HF_TOKEN: ''}"),
    Case("file of a token", "cluster.env_vars={HF_TOKEN_PATH: /run/secrets/hf}"),
    Case("file of credentials", "cluster.env_vars={AWS_SHARED_CREDENTIALS_FILE: /run/aws}"),
    Case("way of authentication", "cluster.env_vars={RAY_AUTH_MODE: token}"),
    Case("number of tokens", "cluster.env_vars={MAX_TOKENS: '5'}"),
    Case("thresholds", "cluster.env_vars={VLLM_X_TOKEN_THRESHOLD: '256', TOKEN_BUDGET: '9'}"),
    Case("file of a key", "cluster.env_vars={RAY_TLS_SERVER_KEY: /etc/ray/tls/key.pem}"),
    Case(
        "file of an account", "cluster.env_vars={GOOGLE_APPLICATION_CREDENTIALS: /etc/gcp/sa.json}"
    ),
    Case("columns and passes", "cluster.env_vars={KEY_COLUMN: id, NUM_PASS: '2', KEY_DTYPE: int8}"),
    Case(
        "at sign behind a port", "prompts.sources.0.path='hdfs://nn:8020/user/me@corp.com/x.jsonl'"
    ),
    Case(
        "library in a name",
        "student.vllm={served_model_name: acme/sk-hynix-llama-3-8b-instruct-v2}",
    ),
    Case("public key", "cluster.env_vars={PUBLIC_KEY: x}"),
    Case("interface", "cluster.env_vars={NCCL_SOCKET_IFNAME: eth0, NCCL_DEBUG: INFO}"),
    Case("proxy", "cluster.env_vars={HTTPS_PROXY: 'http://proxy:8080'}"),
    Case("token of a text", "student.vllm={hf_overrides: {pad_token: '<pad>', image_token: x}}"),
    Case("stored token of the hub", "student.vllm={hf_token: true}"),
    Case("end of a text", "student.eos_token='<|im_end|>'"),
    Case(
        "variable of a key",
        f"teachers.t={{endpoint: {{{AT_HOST}, api_key_env: K}}}}",
    ),
    Case("at sign in a path", "prompts.sources.0.path=s3://bucket/a@b.jsonl"),
    Case("revision of a data set", "prompts.sources.0.path=hf://datasets/a/b@main/x.jsonl"),
    Case("container of Azure", "prompts.sources.0.path=abfs://c@acc.dfs.core.windows.net/x.jsonl"),
]
URLS = [
    *(
        Case(url, (url, shown))
        for url, shown in {
            f"http://user:{SECRET}@host:8265": "http://***@host:8265",
            f"https://user:{SECRET}@host/v1": "https://***@host/v1",
            f"HTTP://user:{SECRET}@host": "HTTP://***@host",
            f"user:{SECRET}@host:8000/v1": "***@host:8000/v1",
            f"http:///user:{SECRET}@host": "http:///***@host",
            f"http:/user:{SECRET}@host": "http:/***@host",
            f"http:user:{SECRET}@host": "***@host",
            f"//user:{SECRET}@host/x": "//***@host/x",
            f"http:\\\\user:{SECRET}@host": "http:\\\\***@host",
            f" http://user:{SECRET}@host": " http://***@host",
            f"http://{SECRET}@host": "http://***@host",
            f"http://:{SECRET}@host": "http://***@host",
            f"http://user:{SECRET}@[::1]:8000/v1": "http://***@[::1]:8000/v1",
            f"http://user:a@{SECRET}@host": "http://***@host",
            f"http://user:a/{SECRET}@host/v1": "http://***@host/v1",
            f"http://user:a?{SECRET}@host": "http://***@host",
            f"http://user:a#{SECRET}@host": "http://***@host",
            f"http://user:12/{SECRET}@host": "http://***@host",
            f"s3://AKIA:{SECRET}@bucket/x": "s3://***@bucket/x",
            f"gs://user:{SECRET}@bucket": "gs://***@bucket",
            f"ray://user:{SECRET}@head:10001": "ray://***@head:10001",
            f"socks5://user:{SECRET}@proxy:1080": "socks5://***@proxy:1080",
            f"s3://bucket/x?secret_key={SECRET}&region=eu": "s3://bucket/x?***",
            f"https://host/v1?api_key={SECRET}": "https://host/v1?***",
            "http://host:8000/v1": "http://host:8000/v1",
            "http://[::1]:8000/v1": "http://[::1]:8000/v1",
            "host:8265": "host:8265",
            "s3://bucket/a@b": "s3://bucket/a@b",
            "hf://datasets/a/b@main/x": "hf://datasets/a/b@main/x",
            "abfs://c@acc.dfs.core.windows.net/x": "abfs://c@acc.dfs.core.windows.net/x",
            "/home/a@b/c:d": "/home/a@b/c:d",
            "./runs": "./runs",
            "": "",
        }.items()
    )
]
WORDS = [
    *(
        Case(word, (word, shown))
        for word, shown in {
            f"cluster.env_vars={{HF_TOKEN: {SECRET}}}": "cluster.env_vars={HF_TOKEN: ***}",
            f"cluster.env_vars.HF_TOKEN={SECRET}": "cluster.env_vars.HF_TOKEN=***",
            f"a={{'api_key': '{SECRET} x', b: 1}}": "a={'api_key': ***, b: 1}",
            f'a={{"password": "{SECRET}"}}': 'a={"password": ***}',
            f"storage.root=s3://k:{SECRET}@b": "storage.root=s3://***@b",
            f"http://u:{SECRET}@h:8265": "http://***@h:8265",
            f"u:{SECRET}@h:8265": "***@h:8265",
            f"--address=http://u:{SECRET}@h": "--address=http://***@h",
            f"x={HUGGING_FACE}": "x=***",
            "training.steps=5": "training.steps=5",
            "student.vllm={hf_token: true}": "student.vllm={hf_token: true}",
            "config.yaml": "config.yaml",
        }.items()
    )
]


def load(override: str) -> object:
    return load_config(QUICKSTART / "config.yaml", [override])


@pytest.mark.parametrize("case", [*VARIABLES, *ELSEWHERE], ids=str)
def test_a_secret_in_a_config_is_refused_and_not_repeated(case: Case) -> None:
    check_answer(case, lambda: load(case.given))
    with pytest.raises(DistillationError) as refused:
        load(case.given)
    for secret in (SECRET, HUGGING_FACE, OPENAI):
        assert secret not in str(refused.value)


@pytest.mark.parametrize("case", HARMLESS, ids=str)
def test_what_only_looks_like_a_secret_is_taken(case: Case) -> None:
    check_answer(case, lambda: load(case.given))


@pytest.mark.parametrize("case", URLS, ids=str)
def test_a_url_is_shown_without_user_and_password(case: Case) -> None:
    url, shown = case.given
    assert shown_url(url) == shown


@pytest.mark.parametrize("case", WORDS, ids=str)
def test_a_word_of_a_command_is_shown_without_its_secret(case: Case) -> None:
    word, shown = case.given
    assert without_secrets(word) == shown


@pytest.mark.parametrize("case", [case for case in URLS if SECRET in case.name], ids=str)
def test_no_message_about_an_address_repeats_its_password(case: Case, tmp_path: Path) -> None:
    url, _ = case.given
    endpoint = json.dumps({"url": url, "model": "m", "api": "openai", "scores": False})
    calls = [
        lambda: load(f"teachers.third={{endpoint: {endpoint}}}"),
    ]
    if "://" in url:  # anything else is the path of a folder
        calls.append(lambda: load(f"storage.root={json.dumps(url)}"))
    if not url.startswith(("http://", "https://")):  # these would be asked
        calls.append(lambda: connect(url))
    if "://" in url and not url.startswith(("s3", "gs")):
        calls.append(lambda: storage.read_bytes(url.strip()))
    for call in calls:
        with pytest.raises(DistillationError) as refused:
            call()
        assert SECRET not in str(refused.value)


def test_a_text_about_urls_loses_their_passwords_alone() -> None:
    text = f"cannot reach http://u:{SECRET}@h:80 (a:b@c), mail me@x.org, at 12:30"
    assert (
        without_passwords(text) == "cannot reach http://***@h:80 (a:b@c), mail me@x.org, at 12:30"
    )


def test_tokens_of_texts_are_no_secrets_outside_of_the_environment() -> None:
    assert [is_secret_name(name, of_variable=False) for name in ("pad_token", "hf_token")] == [
        False,
        True,
    ]


def test_what_may_hold_a_secret_is_for_its_owner_alone(tmp_path: Path) -> None:
    private, public = tmp_path / "a/private", tmp_path / "a/public"
    storage.write_bytes(str(private), b"x", private=True)
    storage.write_bytes(str(public), b"x")
    upload = build_upload(ROOT, "name: x\n", tmp_path / "upload") / "config.yaml"
    modes = [stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (private, upload)]
    assert modes == [0, 0]
    assert stat.S_IMODE(public.stat().st_mode) & 0o400
