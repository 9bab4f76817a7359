"""Arguments of chat templates: Jinja text that stands before a template and gives them values.

Whatever renders the template then renders it with the arguments: this run, its teachers' templates
and the exported student, whose users may still pass other values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from keyword import iskeyword
from typing import Any

from pipeline.fingerprint import exact_json

TEMPLATE_DATE = "template_date"
"""Variable of a template that holds the day that `strftime_now` writes."""
DEFAULT_DATE = date(2025, 1, 1)
"""Day that templates write without `student.template_date`: the same on every day of every run."""
GIVEN_BY_RENDERER = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"),
        *("chat_template", "tokenize", "strftime_now", "raise_exception", TEMPLATE_DATE),
        *("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token"),
    }
)
"""Variables that a renderer sets for every prompt, so that an argument would not act."""


def prelude(arguments: Mapping[str, Any], day: date | None = None) -> str:
    """Text before a chat template that sets its arguments where the caller gives no others.

    Args:
        arguments: JSON values by the name of the template's variable.
        day: day that the template writes as today; None for `DEFAULT_DATE`.

    Returns:
        Jinja text; empty if there is nothing to set.
    """
    values = {**arguments, TEMPLATE_DATE: day.isoformat()} if day is not None else arguments
    lines = [
        f"{{%- if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}"
        for name, value in values.items()
    ]
    # Renderers drop the line break behind a block, and so none of the template's own is lost.
    return "".join(lines) + "\n" if lines else ""


def checked_arguments(arguments: Any) -> Any:
    """Arguments of a chat template as they are, before pydantic reads them.

    Raises:
        ValueError: a name is no variable of Jinja, or the renderer sets it for every prompt; or a
            value is none of JSON's.
    """
    if not isinstance(arguments, dict):
        return arguments
    for name, value in arguments.items():
        if isinstance(value, date):
            raise ValueError(f"{name} is a date in YAML: put {value} between quotes")
        if not str(name).isidentifier() or iskeyword(str(name)):
            raise ValueError(f"{name!r} cannot be a variable of a chat template: correct the name")
        if name in GIVEN_BY_RENDERER:
            other = "set template_date" if name == "strftime_now" else "leave it out"
            raise ValueError(f"{name!r} is set for every prompt by whatever renders it: {other}")
        if exact_json(value) != value:
            raise ValueError(f"{name} is {value}, which JSON does not know: give a number or text")
    return arguments


def reads(template: str, name: str) -> bool:
    """Whether a chat template mentions a variable."""
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _literal(value: Any) -> str:
    """A JSON value as Jinja writes it, which has `none` where JSON has `null`."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
