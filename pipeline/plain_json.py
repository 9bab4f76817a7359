"""JSON of people and of other programs to plain values, with one kind of error.

Python's own reader takes the last of two equal keys in silence, and raises three kinds of errors.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.errors import CorruptFileError
from pipeline.messages import shorter, shown, shown_name

RESTORE = "bring it back from a copy, or remove it and let the stage that writes it run again"


class NotJSONError(ValueError):
    """A text is no JSON value that can be read.

    Attributes:
        reason: description for the message, without a place.
        position: character of the text at which the reading ended, counted from 0; None if unknown.
    """

    def __init__(self, reason: str, position: int | None = None) -> None:
        super().__init__(reason, position)
        self.reason, self.position = reason, position

    def __str__(self) -> str:
        return self.reason


def value_in(text: str) -> Any:
    """Value of a JSON text.

    Raises:
        NotJSONError: it is no JSON, has a key twice, is nested too deeply, or holds a number of too
            many digits.
    """
    value, end = value_at(text, len(text) - len(text.lstrip()))
    if rest := text[end:].lstrip():
        raise NotJSONError("more text stands behind the value", len(text) - len(rest))
    return value


def value_at(text: str, start: int) -> tuple[Any, int]:
    """Value that begins at a character of a text, and the character behind it.

    Raises:
        NotJSONError: see `value_in`.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        raise NotJSONError(error.msg.removesuffix(" at"), error.pos) from error
    except RecursionError as error:
        raise NotJSONError("it is nested too deeply") from error
    except NotJSONError:
        raise
    except ValueError as error:  # Python's limit on the digits of whole numbers
        raise NotJSONError("a number has more than 4300 digits; write it as a text") from error


def checked(value: Any, shape: Any) -> Any:
    """A value in its shape: a type such as `dict[str, int]`, a `TypedDict` or a pydantic model.

    Numbers are no texts. Keys beyond those of the shape are no mistake; a model lacks them.

    Raises:
        NotJSONError: the value has another shape.
    """
    try:
        read = _adapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(shown_name, first["loc"]))
        found = "" if first["type"] == "missing" else f", found {shown(first['input'])}"
        message = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
        raise NotJSONError(
            f"{place}: {message}{found}" if place else f"{message}{found}"
        ) from error

    return read if isinstance(read, BaseModel) else value


def value_of_file(place: str, data: bytes, shape: Any, remedy: str = RESTORE) -> Any:
    """Value in a file of ours.

    Args:
        place: path of the file, or file and line, for the message.
        shape: type of the value, see `checked`.
        remedy: advice for people, if the file holds something else.

    Raises:
        CorruptFileError: it is no JSON, or has another shape.
    """
    try:
        value = value_in(data.decode())
    except (NotJSONError, UnicodeDecodeError) as error:
        reason = "it is empty" if not data.strip() else shorter(error)
        raise CorruptFileError(f"{place} is not valid JSON: {reason}; {remedy}") from error
    try:
        return checked(value, shape)
    except NotJSONError as error:
        raise CorruptFileError(
            f"{place} does not hold what polystill writes there: {error}; {remedy}"
        ) from error


@lru_cache(maxsize=64)
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise NotJSONError(f"the key {shown(twice)} stands twice in one object; keep one of them")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
