"""Building blocks of all sections of the configuration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    field_validator,
)

from pipeline.fingerprint import exact_json

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
LONGEST_NAME = 128
"""Characters of a name, which becomes a part of file names and of the ids of jobs."""
BIGGEST_WHOLE = 10**12
"""Largest whole number that a setting can mean."""
NO_CUSTOM_RESOURCE = ("CPU", "GPU", "memory", "object_store_memory")


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"must be a number, found {str(value).lower()}")
    return value


def _meant(number: int) -> int:
    if abs(number) > BIGGEST_WHOLE:
        raise ValueError(f"must be at most {BIGGEST_WHOLE}, found {number}")
    return number


def _given(text: str) -> str:
    if not text.strip():
        raise ValueError(f"is empty, found {text!r}: give it, or leave the key out")
    return text


def _verbatim(block: Any) -> Any:
    """Refuses what no YAML file of ours can give back, such as a date."""
    if isinstance(block, dict):
        for place, value in _leaves(block, ()):
            if not isinstance(value, str | bool | int | float | None):
                name = ".".join(map(str, place))
                raise ValueError(
                    f"{name} is a {type(value).__name__} in YAML, found {value}: put it between "
                    "quotes if it is text"
                )
    return block


def _leaves(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if isinstance(key, date):
                yield (*place, key), key
            yield from _leaves(item, (*place, key))
    else:
        yield place, value


Name = Annotated[str, Field(pattern=NAME, max_length=LONGEST_NAME)]
Given = Annotated[str, AfterValidator(_given)]
"""Text that says something."""
Seed = Annotated[int, BeforeValidator(_number)]
Whole = Annotated[Seed, AfterValidator(_meant)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Fraction = Annotated[Real, Field(ge=0, le=1)]
Decay = Annotated[Real, Field(ge=0, lt=1)]
Positive = Annotated[Real, Field(gt=0)]
Price = Annotated[Real, Field(ge=0)]
Count = Annotated[Whole, Field(ge=1)]
Handful = Annotated[Whole, Field(ge=1, le=10_000)]
"""Number of things each of which takes memory or hardware."""
Verbatim = Annotated[
    dict[str, Any],
    BeforeValidator(_verbatim),
    PlainSerializer(exact_json, when_used="json"),
]
"""Block that reaches a library as it is written, with keys that are numbers and with infinities. As
JSON, for identities, it tells such blocks apart."""


class Section(BaseModel):
    """Base of all sections: frozen, without unknown keys; docstrings of fields are their help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Resources(Section):
    """Resources that Ray reserves for one actor, worker or stage driver."""

    num_cpus: Annotated[Real, Field(ge=0, le=100_000)] = 1
    """Logical CPUs that Ray reserves; fractions are allowed. Ray places work by this number and
    does not limit the threads."""
    num_gpus: Annotated[Real, Field(ge=0, le=100_000)] = 0
    """GPUs that Ray reserves and makes visible. Set it to 1 or more for engines and workers that
    run on GPUs; the default 0 runs on CPUs."""
    custom: dict[Given, Annotated[Real, Field(ge=0)]] = {}
    """Custom Ray resources, by name, that a node must offer. Use them to place work on a group of
    nodes, as `cluster.yaml` defines them, such as `{teacher_node: 1}`."""

    @field_validator("custom")
    @classmethod
    def _are_custom(cls, custom: dict[str, float]) -> dict[str, float]:
        for name in NO_CUSTOM_RESOURCE:
            if name in custom:
                raise ValueError(
                    f"{name} is a resource of Ray's own: leave it out, and set num_cpus or num_gpus"
                )
        return custom


@dataclass(frozen=True)
class ModelFiles:
    """Source of the files of a Hugging Face model.

    Attributes:
        model: folder or hub id.
        revision: branch, tag or commit on the hub; None for the default branch.
        trust_remote_code: whether Python code that comes with the model may run.
        eos_token: end-of-sequence token in place of the tokenizer's own.
        chat_template: file with a chat template in place of the tokenizer's own.
        template_prelude: Jinja text before the chat template that sets its arguments.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    eos_token: str | None = None
    chat_template: str | None = None
    template_prelude: str = ""
