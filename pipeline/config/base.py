"""What all sections of the configuration are made of."""

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
    """Base of all sections: frozen, unknown keys are errors, docstrings are the help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Resources(Section):
    """What one Ray actor, worker or job asks the cluster for."""

    num_cpus: Annotated[float, Field(ge=0)] = 1
    """Logical CPUs."""
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs."""
    custom: dict[str, float] = {}
    """Custom Ray resources; they place work on a node group, see cluster.yaml."""


@dataclass(frozen=True)
class ModelFiles:
    """Where the files of a Hugging Face model are read from.

    Attributes:
        model: folder or hub id.
        revision: hub revision.
        trust_remote_code: run code that comes with the model.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
