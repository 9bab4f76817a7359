"""Building blocks of all sections of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: frozen, without unknown keys; docstrings of fields are their help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Resources(Section):
    """Resources that Ray reserves for one actor, worker or stage driver."""

    num_cpus: Annotated[float, Field(ge=0)] = 1
    """Logical CPUs that Ray reserves; fractions are allowed. Ray places work by this number and
    does not limit the threads."""
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs that Ray reserves and makes visible. Set it to 1 or more for engines and workers that
    run on GPUs; the default 0 runs on CPUs."""
    custom: dict[str, float] = {}
    """Custom Ray resources, by name, that a node must offer. Use them to place work on a group of
    nodes, as `cluster.yaml` defines them, such as `{teacher_node: 1}`."""


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
