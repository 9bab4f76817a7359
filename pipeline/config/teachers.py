"""`teachers`: models that engines of this run serve, and endpoints that run elsewhere."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.config.base import Count, ModelFiles, Name, Positive, Resources, Section

ENVIRONMENT_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
NEUTRAL_ENDPOINT_KEYS = frozenset(
    {"url", "api_key_env", "max_concurrency", "max_retries", "timeout_seconds", "dtype"}
)
"""What changes neither a model nor its numbers."""


class EndpointConfig(Section):
    """Where a teacher is asked, and what it can do."""

    url: str
    """Base of its API, such as `http://host:8000/v1`; without credentials."""
    model: str
    """Name under which the server knows the model."""
    api: Literal["vllm", "openai"]
    """`vllm`: takes and returns token ids. `openai`: text alone, chat prompts in chat form; answers
    are tokenized with the student's tokenizer."""
    scores: bool = True
    """It scores like other teachers; needs `api: vllm`. `false`: it only writes, so it has no cache
    and no weight."""
    tokenizer: str | None = None
    """Of `api: vllm`: folder or hub id of the served model. Its tokenizer and config are compared
    with the student's, its weights are not read."""
    max_logprobs: Count = 20
    """Entries that the server returns for a position at most: vLLM's `--max-logprobs`."""
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """What the server computes in; says how far its numbers may differ between two starts."""
    max_model_len: Count | None = None
    """Tokens that the server holds; longer requests for prompts and grades are not asked."""
    api_key_env: str | None = None
    """NAME of the environment variable that holds the key, on every node that asks."""
    max_concurrency: Count = 32
    """Requests open at once."""
    max_retries: Annotated[int, Field(ge=0)] = 6
    """Tries after the first of a request that fails for a reason that may pass; each waits twice as
    long as the one before, from 1 second to 60, or as long as the server asks."""
    timeout_seconds: Positive = 600.0
    """Longest time for one answer."""

    @field_validator("url")
    @classmethod
    def _url_is_a_base(cls, url: str) -> str:
        parts = urlsplit(url)
        if "@" in parts.netloc:  # neither url nor value: both may hold a secret
            raise ValueError("holds credentials; name a variable with the key in api_key_env")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"must be like http://host:8000/v1, got {url!r}")
        if parts.query or parts.fragment:
            raise ValueError("must end with the path: leave out what begins with ? or #")
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _key_is_named_and_not_given(cls, name: str | None) -> str | None:
        if name is not None and not ENVIRONMENT_NAME.fullmatch(name):
            raise ValueError(
                "must be the name of an environment variable, in capitals, digits and underscores; "
                "the key itself never stands in a config"
            )
        return name

    @model_validator(mode="after")
    def _api_fits_its_work(self) -> EndpointConfig:
        if self.api == "openai" and self.scores:
            raise ValueError(
                "api openai gives no log-probabilities of given tokens: set `scores: false` (it "
                "then only writes), or `api: vllm` if it is a vLLM server"
            )
        if self.api == "vllm" and self.tokenizer is None:
            raise ValueError(
                "api vllm exchanges token ids, so `tokenizer` must name a folder or hub id with "
                "the served model's tokenizer"
            )
        if self.api == "openai" and self.tokenizer is not None:
            raise ValueError("api openai exchanges text: leave `tokenizer` out")
        return self


class EndpointTeacherConfig(Section):
    """One teacher that runs elsewhere and is asked over HTTP."""

    endpoint: EndpointConfig
    """Where it is asked."""
    model_identity: str | None = None
    """Which model it is, in words of yours; needed where it scores, for it stands in the recipe of
    its cache as the hash of the weights does for others. Another model needs another identity."""
    domains: list[Name] = Field(default_factory=list)
    """Domains whose prompts it answers when the generator is `domain_teacher`."""
    resources: Resources = Resources(num_cpus=0.5)
    """Of the actor that asks it."""
    allow_chat_template_difference: bool = False
    """Accept that its own chat template renders prompts otherwise; the student's is used."""
    cost_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """Price of the server for as long as a stage uses it."""

    @model_validator(mode="after")
    def _scored_rows_have_an_origin(self) -> EndpointTeacherConfig:
        if self.endpoint.scores and not self.model_identity:
            raise ValueError(
                "an endpoint that scores needs `model_identity`: words for exactly the model that "
                "is served, such as name, revision and quantisation; or set endpoint.scores: false"
            )
        return self

    @property
    def files(self) -> ModelFiles | None:
        """Where its tokenizer and config are read; None where only text is exchanged."""
        tokenizer = self.endpoint.tokenizer
        return None if tokenizer is None else ModelFiles(tokenizer)

    @property
    def replicas(self) -> int:
        """One actor asks: the limit of open requests holds for all of them."""
        return 1

    @property
    def scores(self) -> bool:
        """Whether it has a cache."""
        return self.endpoint.scores

    @property
    def returns_text(self) -> bool:
        """Whether its answers are text that has to be tokenized."""
        return self.endpoint.api == "openai"

    @property
    def max_model_len(self) -> int | None:
        """Tokens that it holds, where the config says so."""
        return self.endpoint.max_model_len


def check_endpoints(
    teachers: Mapping[str, object], num_logprobs: int, env_vars: Container[str]
) -> None:
    """Checks what is asked of endpoints elsewhere in a config.

    Args:
        teachers: of both kinds.
        num_logprobs: capture width of the run.
        env_vars: names in `cluster.env_vars`.

    Raises:
        ValueError: one returns too few log-probabilities, or its key would be written down.
    """
    for name, teacher in teachers.items():
        if not isinstance(teacher, EndpointTeacherConfig):
            continue
        endpoint, place = teacher.endpoint, f"teachers.{name}.endpoint"
        if endpoint.scores and num_logprobs > endpoint.max_logprobs:
            raise ValueError(
                f"scoring.num_logprobs is {num_logprobs}, but {place} returns at most "
                f"{endpoint.max_logprobs}: start the server with `--max-logprobs {num_logprobs}` "
                f"and set {place}.max_logprobs, or lower num_logprobs"
            )
        if endpoint.api_key_env is not None and endpoint.api_key_env in env_vars:
            raise ValueError(
                f"cluster.env_vars holds {endpoint.api_key_env}, the key of teacher {name!r}: "
                "there it would stand in the config and in what Ray says of its jobs. Export it "
                "where Ray is started"
            )


class TeacherConfig(Section):
    """One teacher: a Hugging Face causal language model served by vLLM in Ray actors."""

    model: str
    """Folder or hub id."""
    revision: str | None = None
    """Hub revision; resolved to a commit hash that enters the fingerprint."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you say so by name."""
    domains: list[Name] = Field(default_factory=list)
    """Domains whose prompts it answers when the generator is `domain_teacher`."""
    vllm: dict[str, Any] = Field(default_factory=dict)
    """Engine arguments of vLLM, verbatim."""
    replicas: Count = 1
    """Number of engines."""
    resources: Resources = Resources()
    """Of one engine. With `tensor_parallel_size: N` ask for `num_gpus: N`."""
    allow_chat_template_difference: bool = False
    """Accept that its own chat template renders prompts otherwise; the student's is used."""
    cost_per_hour: Annotated[float, Field(ge=0)] = 0.0
    """Price of one engine's hardware."""

    @property
    def files(self) -> ModelFiles:
        """Where its tokenizer and config are read."""
        return ModelFiles(self.model, self.revision, self.trust_remote_code)

    @property
    def scores(self) -> bool:
        """Whether it has a cache."""
        return True

    @property
    def returns_text(self) -> bool:
        """Whether its answers are text that has to be tokenized."""
        return False

    @property
    def max_model_len(self) -> int | None:
        """Tokens that an engine holds, where the config says so."""
        most = self.vllm.get("max_model_len")
        return most if isinstance(most, int) and most > 0 else None


def _one_kind_of_teacher(values: Any) -> Any:
    """Reads a teacher as what it names, `model` or `endpoint`, so that errors are about that."""
    kinds: dict[str, type[Section]] = {"model": TeacherConfig, "endpoint": EndpointTeacherConfig}
    if not isinstance(values, dict):
        return values
    named = [key for key in kinds if values.get(key) is not None]
    if len(named) != 1:
        found = "it has both" if named else "it has neither"
        raise ValueError(
            "a teacher names either `model`, which engines of this run serve, or `endpoint`, a "
            f"server that runs elsewhere; {found}"
        )
    kind = kinds[named[0]]
    for other, theirs in kinds.items():
        misplaced = values.keys() & (theirs.model_fields.keys() - kind.model_fields.keys())
        if misplaced:
            raise ValueError(f"{sorted(misplaced)} belong to a teacher with `{other}`; leave out")
    return kind.model_validate(values)


AnyTeacher = Annotated[TeacherConfig | EndpointTeacherConfig, BeforeValidator(_one_kind_of_teacher)]
