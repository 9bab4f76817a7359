"""Reading of a model's files by libraries, which fail in many ways on files that are broken."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig

from pipeline.config.base import ModelFiles
from pipeline.errors import ConfigError, DistillationError
from pipeline.messages import foreign

_PANIC = "PanicException"
"""Errors of tokenizers' own, which Python takes for a wish to end the process."""

_BARE = (LookupError, AttributeError, TypeError, ArithmeticError, AssertionError, RecursionError)
"""Errors whose words say nothing without their kind, such as the name of a missing key."""


@contextmanager
def reading(file: str, model: str) -> Iterator[None]:
    """Turns every error of a library that reads a file of a model into one message.

    Args:
        file: the file that decides, such as `config.json`.
        model: folder or hub id.

    Raises:
        ConfigError: the library failed; its error is the cause.
    """
    try:
        yield
    except DistillationError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != _PANIC:
            raise
        reason = foreign(error) or "no reason given"
        if isinstance(error, _BARE):
            reason = f"{type(error).__name__}: {reason}"
        raise ConfigError(
            f"cannot use the {file} of {model}: {reason}; mend it or the files that belong to it, "
            "fetch them again, or choose another model"
        ) from error


def model_config(model: ModelFiles) -> Any:
    """Config of a model from transformers.

    Raises:
        ConfigError: the folder or hub id does not exist, or its config cannot be read.
    """
    with reading("config.json", model.model):
        return AutoConfig.from_pretrained(
            model.model, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
