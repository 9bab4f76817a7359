"""`teachers`: models that engines of this run serve, and endpoints that run elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import BeforeValidator, Field, JsonValue, field_validator, model_validator

from pipeline.config.base import (
    Count,
    Given,
    Handful,
    ModelFiles,
    Name,
    Positive,
    Price,
    Resources,
    Section,
    Verbatim,
    Whole,
)
from pipeline.credentials import shown_url
from pipeline.fingerprint import exact_json
from pipeline.messages import short
from pipeline.templating import checked_arguments

ENVIRONMENT_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
PROMPT_FIELDS = frozenset({"model", "messages", "prompt"})
"""Fields without which a request asks for nothing."""
RESERVED_FIELDS = PROMPT_FIELDS | {"max_tokens", "n", "seed", "stream"}
"""Fields of a request that polystill sets, or that would change the form of the reply."""
NEUTRAL_ENDPOINT_KEYS = frozenset(
    {"url", "api_key_env", "batch", "max_concurrency", "max_retries", "timeout_seconds", "dtype"}
)
"""Fields of an endpoint that change neither the model nor its numbers."""


class TeacherConfig(Section):
    """One teacher: a Hugging Face causal language model that vLLM engines of this run serve."""

    model: Given
    """Folder or hub id of the teacher. A value that begins with `.`, `~` or `/` is a folder. Its
    vocabulary must equal the student's."""
    revision: Given | None = None
    """Branch, tag or commit of the model on the hub; the default branch without it. It is resolved
    to a commit hash, which is part of the cache's name."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Set it only for models whose code you trust."""
    domains: list[Name] = Field(default_factory=list)
    """Domains whose prompts this teacher answers in recipes with `by: domain_teacher`. Two teachers
    may not name the same domain there."""
    vllm: Verbatim = Field(default_factory=dict)
    """Engine arguments of vLLM, passed as they are, such as `{max_model_len: 4096,
    tensor_parallel_size: 2}`. Arguments that change numbers, such as `dtype` or `quantization`, are
    part of the cache's name: changing them scores everything again. Arguments of speed and memory
    are not."""
    replicas: Handful = 1
    """Number of engines of this teacher that work at the same time, each with `resources` of its
    own. It changes speed only."""
    resources: Resources = Resources()
    """Resources of one engine. For `tensor_parallel_size: N` ask for `num_gpus: N`."""
    allow_chat_template_difference: bool = False
    """Accept that the teacher's own chat template renders prompts differently from the student's.
    The teacher then sees prompts in the student's format, which may be new to it."""
    compare_with_transformers: Annotated[bool, Field(exclude_if=lambda compare: compare)] = True
    """Compare the engine that begins a cache with transformers, which computes a text of up to 1280
    tokens on the CPU of the engine's node. An engine whose log-probabilities differ by more than
    rounding explains is refused. Nothing is compared where the weights are quantised, or need more
    than half of the node's free memory in float32."""
    cost_per_hour: Price = 0.0
    """Price per hour of the hardware of one engine, in any currency. The report adds it up; it
    changes nothing else."""

    @property
    def files(self) -> ModelFiles:
        """Source of the teacher's tokenizer and config."""
        return ModelFiles(self.model, self.revision, self.trust_remote_code)

    @property
    def scores(self) -> bool:
        """Whether the teacher scores sequences and so has a cache."""
        return True

    @property
    def returns_text(self) -> bool:
        """Whether the teacher's answers are text that has to be tokenized."""
        return False

    @property
    def max_model_len(self) -> int | None:
        """Tokens that an engine holds; None if the config does not say."""
        most = self.vllm.get("max_model_len")
        return most if isinstance(most, int) and most > 0 else None


class RequestChanges(Section):
    """Changes to the fields of every request, for servers that differ from OpenAI's API."""

    rename: dict[str, str] = Field(default_factory=dict)
    """New names of fields, such as `{max_tokens: max_completion_tokens}`."""
    omit: list[str] = Field(default_factory=list)
    """Fields that the server refuses, such as `[seed, temperature]`. Without `seed` every run gets
    other answers."""
    extra: Verbatim = Field(default_factory=dict)
    """Further fields, such as `{reasoning_effort: low}`."""

    @model_validator(mode="after")
    def _leaves_a_request(self) -> RequestChanges:
        if needed := PROMPT_FIELDS & {*self.rename, *self.omit}:
            raise ValueError(f"{sorted(needed)} belong to every request: leave them as they are")
        if twice := sorted({*self.rename} & {*self.omit}):
            raise ValueError(f"{twice} are both renamed and omitted: leave one of the two out")
        if owned := sorted(RESERVED_FIELDS & self.extra.keys()):
            raise ValueError(
                f"extra may not hold {owned}: sampling parameters stand in `sampling`, and the "
                "others are set for each request"
            )
        names = [*self.rename.values(), *self.extra]
        if again := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{again} would be set twice: give each new field another name")
        if exact_json(self.extra) != self.extra:
            raise ValueError(
                "extra must hold what JSON holds: no infinities, and no keys but texts: correct "
                f"{short(repr(self.extra), 200)}"
            )
        return self

    def applied(self, body: dict[str, Any]) -> dict[str, Any]:
        """Copy of a request with these changes."""
        kept = {key: value for key, value in body.items() if key not in self.omit}
        return {self.rename.get(key, key): value for key, value in kept.items()} | self.extra


class EndpointConfig(Section):
    """Address and abilities of a server that runs elsewhere."""

    url: str
    """Base URL of the server's API, such as `http://host:8000/v1`. It must hold no credentials."""
    model: Given
    """Name under which the server knows the model (vLLM's `--served-model-name`)."""
    api: Literal["vllm", "openai"]
    """Kind of server. `vllm`: a vLLM server, which takes and returns token ids and can score.
    `openai`: any server with an OpenAI-compatible API, which exchanges text only; chat prompts are
    sent as chats, and answers are tokenized with the student's tokenizer."""
    scores: bool = True
    """Whether the teacher scores sequences like other teachers, which needs `api: vllm`. With
    `false` it only writes and grades: it has no cache, no weight and no column in comparisons."""
    tokenizer: Given | None = None
    """Folder or hub id with the tokenizer and config of the served model; required for `api: vllm`,
    and not allowed for `api: openai`. Both are compared with the student's; weights are not read
    from it."""
    template_arguments: Annotated[
        dict[str, JsonValue] | None,
        Field(exclude_if=lambda arguments: arguments is None),
        BeforeValidator(checked_arguments),
    ] = None
    """Values of variables of the server's chat template, such as `{enable_thinking: false}`, sent
    with every chat as `chat_template_kwargs`. Servers of vLLM and SGLang know this key, OpenAI's
    refuses it. With `api: vllm` the run itself renders prompts, with `student.template_arguments`.
    They are part of the identity of answers and grades. `{}` says that nothing is to be sent."""
    max_logprobs: Count = 20
    """Largest number of log-probabilities that the server returns at a position.
    `scoring.num_logprobs` may not exceed it. For more, start the server with `--max-logprobs N` and
    set this field to N."""
    dtype: Literal["float32", "float16", "bfloat16"] = "bfloat16"
    """Number format in which the server computes. It sets the tolerance with which the server's
    numbers are compared at each start; the cache and its name do not depend on it."""
    max_model_len: Count | None = None
    """Number of tokens that the server holds for a prompt and its reply. Longer requests for
    prompts and grades are counted as too long and not sent. Without it they are sent, and the
    server may refuse them."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key. The key itself never stands in a
    config. Export the variable before `ray start` on every node, or before `polystill run` without
    an address. Without this field no key is sent."""
    request: Annotated[
        RequestChanges, Field(exclude_if=lambda changes: changes == RequestChanges())
    ] = RequestChanges()
    """Changes to the fields of every request, such as `{rename: {max_tokens:
    max_completion_tokens}, omit: [seed, temperature], extra: {reasoning_effort: low}}`. They are
    part of the identity of what the teacher writes and scores."""
    reasoning: Annotated[
        Literal["drop", "keep"], Field(exclude_if=lambda reasoning: reasoning == "drop")
    ] = "drop"
    """Reasoning that the server sends apart from its answers. `drop` leaves it out; `keep` puts it
    before the answer, between `<think>` and `</think>`. The stage counts the answers with reasoning
    in either case. Thoughts inside of an answer always stay."""
    batch: Annotated[bool, Field(exclude_if=lambda batch: not batch)] = False
    """Send requests in batches (OpenAI's batch API: `/files` and `/batches`), which providers serve
    within a day, often at half the price. All requests of a stage go into as few batches as the API
    allows; the first request with given parameters is asked at once, to see that the server takes
    them. A run that is started again finds its batches by their records and sends no request of
    them twice."""
    max_concurrency: Handful = 32
    """Largest number of requests that are open at the same time. Raise it until the server's
    throughput stops growing; lower it if the server limits requests."""
    max_retries: Annotated[Whole, Field(ge=0, le=1000)] = 6
    """Number of further tries of a request that failed for a reason that may pass, such as a
    timeout or status 429. The pauses between tries grow from 1 to 60 seconds, or are as long as the
    server asks."""
    timeout_seconds: Positive = 600.0
    """Longest time in seconds that one request may take before it counts as failed. Raise it for
    long answers on slow servers."""

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        shown = shown_url(url)
        if shown != url and "@" in url:  # neither url nor value: both may hold a secret
            raise ValueError(
                "holds credentials: leave them out, and name the environment variable that holds "
                "the key in api_key_env"
            )
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port above 65535, or brackets around no address
            is_address = False
        if not is_address or not re.fullmatch(r"[!-~]+", url):
            raise ValueError(f"must be like http://host:8000/v1, found {short(shown)!r}")
        if parts.query or parts.fragment:
            raise ValueError("must end with the path: leave out the part that begins with ? or #")
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _check_key_name(cls, name: str | None) -> str | None:
        if name is not None and not ENVIRONMENT_NAME.fullmatch(name):
            raise ValueError(
                "must be the name of an environment variable, of capitals, digits and underscores; "
                "a config never holds the key itself"
            )
        return name

    @model_validator(mode="after")
    def _check_api(self) -> EndpointConfig:
        if self.api == "openai" and self.scores:
            raise ValueError(
                "api openai gives no log-probabilities of given tokens: set `scores: false`, so "
                "that the teacher only writes, or `api: vllm` if the server is a vLLM server"
            )
        if self.api == "vllm" and self.tokenizer is None:
            raise ValueError(
                "api vllm exchanges token ids: `tokenizer` must name a folder or hub id with the "
                "served model's tokenizer"
            )
        if self.api == "vllm" and self.batch:
            raise ValueError(
                "api vllm takes no batches: leave `batch` out, since requests to a server of your "
                "own wait for nothing"
            )
        if self.api == "vllm" and self.reasoning == "keep":
            raise ValueError(
                "api vllm returns thoughts inside of its answers: leave `reasoning` out, or set "
                "`api: openai` and `scores: false`"
            )
        if self.api == "openai" and self.tokenizer is not None:
            raise ValueError(
                "api openai exchanges text and needs no tokenizer: leave `tokenizer` out"
            )
        if self.api == "vllm" and self.template_arguments is not None:
            raise ValueError(
                "api vllm exchanges token ids, which are rendered with student.template_arguments: "
                "leave template_arguments out here"
            )
        return self

    @property
    def shows_key(self) -> bool:
        """Whether the key is sent without encryption to another machine."""
        parts = urlsplit(self.url)
        return self.api_key_env is not None and parts.scheme == "http" and not _is_here(parts)


def _is_here(parts: SplitResult) -> bool:
    """Whether a URL is of this machine."""
    host = parts.hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class EndpointTeacherConfig(Section):
    """One teacher that runs elsewhere and is asked over HTTP."""

    endpoint: EndpointConfig
    """Address and abilities of the server that is asked."""
    model_identity: Given | None = None
    """Label of your choice for exactly the model that is served, such as name, commit and
    quantisation; required if the endpoint scores. It takes the place of the weight hash in the
    cache's name, so another model needs another label."""
    domains: list[Name] = Field(default_factory=list)
    """Domains whose prompts this teacher answers in recipes with `by: domain_teacher`. Two teachers
    may not name the same domain there."""
    resources: Resources = Resources(num_cpus=0.5)
    """Resources of the one actor that sends all requests and waits for the replies."""
    allow_chat_template_difference: bool = False
    """Accept that the teacher's own chat template renders prompts differently from the student's.
    With `api: vllm` the teacher then sees prompts in the student's format, which may be new to
    it."""
    cost_per_hour: Price = 0.0
    """Price per hour of the server, in any currency, for as long as a stage uses it. The report
    adds it up; it changes nothing else."""

    @model_validator(mode="after")
    def _scored_rows_have_an_origin(self) -> EndpointTeacherConfig:
        if self.endpoint.scores and not self.model_identity:
            raise ValueError(
                "an endpoint that scores needs `model_identity`, a label for exactly the model "
                "that is served, such as name, commit and quantisation: add it, or set "
                "endpoint.scores: false"
            )
        return self

    @property
    def files(self) -> ModelFiles | None:
        """Source of the teacher's tokenizer and config; None if only text is exchanged."""
        tokenizer = self.endpoint.tokenizer
        return None if tokenizer is None else ModelFiles(tokenizer)

    @property
    def replicas(self) -> int:
        """Number of actors that ask: one, since the limit of open requests holds for all."""
        return 1

    @property
    def scores(self) -> bool:
        """Whether the teacher scores sequences and so has a cache."""
        return self.endpoint.scores

    @property
    def returns_text(self) -> bool:
        """Whether the teacher's answers are text that has to be tokenized."""
        return self.endpoint.api == "openai"

    @property
    def max_model_len(self) -> int | None:
        """Tokens that the server holds; None if the config does not say."""
        return self.endpoint.max_model_len


def _one_kind_of_teacher(values: Any) -> Any:
    """Reads a teacher as the kind that its key `model` or `endpoint` names.

    Errors are then about that kind alone and not about both members of a union.
    """
    kinds: dict[str, type[Section]] = {"model": TeacherConfig, "endpoint": EndpointTeacherConfig}
    if not isinstance(values, dict):
        return values
    named = [key for key in kinds if values.get(key) is not None]
    if len(named) != 1:
        found = "it has both" if named else "it has neither"
        raise ValueError(
            "a teacher needs either `model`, served by engines of this run, or `endpoint`, a "
            f"server that runs elsewhere; {found}"
        )
    kind = kinds[named[0]]
    for other, section in kinds.items():
        misplaced = values.keys() & (section.model_fields.keys() - kind.model_fields.keys())
        if misplaced:
            raise ValueError(
                f"{sorted(misplaced)} belong to a teacher with `{other}`, but this teacher has "
                f"`{named[0]}`: leave them out"
            )
    return kind.model_validate(values)


AnyTeacher = Annotated[TeacherConfig | EndpointTeacherConfig, BeforeValidator(_one_kind_of_teacher)]


def scoring_teachers(teachers: Mapping[str, AnyTeacher]) -> list[str]:
    """Names of the teachers that score and so have a cache, in their order."""
    return [name for name, teacher in teachers.items() if teacher.scores]
