"""Writes the field reference in `docs/configuration.md` from the models in `pipeline/config`.

    .venv/bin/python docs/make_configuration.py

The page's head, above the marker, is written by hand and kept. Everything below the marker comes
from the models: a field's docstring is its help, a model's docstring introduces its table. Models
are found from `Config` itself, so a new section, recipe, filter or loss appears without a change
here.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import types
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import date
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, Literal

import annotated_types
from pydantic import BaseModel, JsonValue
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.config.base import NAME
from pipeline.config.run import Config

PAGE = ROOT / "docs" / "configuration.md"
COMMAND = ".venv/bin/python docs/make_configuration.py"
MARKER = f"<!-- Made by `{COMMAND}` from here on; change the docstrings, not this text. -->\n"
DISCRIMINATOR = "type"
PLURALS = {"integer": "integers", "number": "numbers", "text": "texts", "name": "names"}
Model = type[BaseModel]


def main() -> None:
    """Writes the page again; the command line has no options."""
    argparse.ArgumentParser(description="Writes the field reference.").parse_args()
    PAGE.write_text(page(PAGE.read_text()))


def page(before: str) -> str:
    """The whole page: the head of the page as it is, and the reference as it should be."""
    head, marker, _ = before.partition(MARKER)
    if not marker:
        raise ValueError(f"{PAGE.relative_to(ROOT)} has lost its marker: {MARKER!r}")
    return head + MARKER + "\n" + Reference().text()


class Reference:
    """The reference as it grows, chapter by chapter.

    Attributes:
        titles: by model, or by the variants of a union, the heading under which it stands.
    """

    def __init__(self) -> None:
        self.titles: dict[Any, str] = {}
        self._shared = [model for model, uses in _uses(Config).items() if uses > 1]
        for model in self._shared:
            self.titles[model] = model.__name__
        self._name(Config, [])

    def text(self) -> str:
        """All chapters."""
        single = {
            name: field
            for name, field in Config.model_fields.items()
            if not _models_in(field.annotation)
        }
        sections = [name for name in Config.model_fields if name not in single]
        links = [_link("The whole run"), *(_link(f"`{name}`") for name in sections)]
        links += [_link(self.titles[model]) for model in self._shared]
        parts = [" · ".join(links), "## The whole run", self._table(single)]
        for name in sections:
            parts += self._chapters(name, Config.model_fields[name])
        for model in self._shared:
            parts += [f"## {self.titles[model]}", _prose(model), self._table(model.model_fields)]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _name(self, model: Model, path: list[str]) -> None:
        """Gives a heading to everything below a model."""
        for name, field in model.model_fields.items():
            here = [*path, name]
            for variants in _unions_in(field.annotation):
                self.titles.setdefault(variants, f"`{'.'.join(here)}`")
                for variant in variants:
                    self.titles.setdefault(variant, _variant_title(variant, here))
                    self._name(variant, here)
            for inner in _single_models_in(field.annotation):
                if inner not in self.titles:
                    self.titles[inner] = f"`{'.'.join(here)}`"
                    self._name(inner, here)

    def _chapters(self, name: str, field: FieldInfo) -> Iterator[str]:
        """A section of the YAML file and everything in it."""
        seen: set[Any] = set(self._shared)
        yield f"## `{name}`"
        variants = next(iter(_unions_in(field.annotation)), None)
        if variants:
            keys = "A mapping of names; each value is " if _is_mapping(field) else ""
            yield f"{keys}{self._one_of(variants)}."
            yield from self._union(variants, seen, 3)
            return
        (model,) = _single_models_in(field.annotation)
        yield _prose(model)
        yield "" if field.is_required() else "This section may be left out."
        yield self._table(model.model_fields)
        yield from self._inside(model, seen, 3)

    def _inside(self, model: Model, seen: set[Any], level: int) -> Iterator[str]:
        """The models and unions in a model's fields, each once."""
        for field in model.model_fields.values():
            for variants in _unions_in(field.annotation):
                if variants not in seen:
                    seen.add(variants)
                    yield f"{'#' * level} {self.titles[variants]}"
                    is_list = typing.get_origin(field.annotation) is list
                    kinds = f"{'Each is o' if is_list else 'O'}{self._one_of(variants)[1:]}"
                    yield f"{_escaped(field.description or '')} {kinds}.".strip()
                    yield from self._union(variants, seen, level + 1)
            for inner in _single_models_in(field.annotation):
                if inner not in seen:
                    seen.add(inner)
                    yield f"{'#' * level} {self.titles[inner]}"
                    yield _prose(inner)
                    yield self._table(inner.model_fields)
                    yield from self._inside(inner, seen, level + 1)

    def _one_of(self, variants: Sequence[Model]) -> str:
        return f"one of {_joined([_link(self.titles[variant]) for variant in variants])}"

    def _union(self, variants: Sequence[Model], seen: set[Any], level: int) -> Iterator[str]:
        """What all variants of a union share, then each variant."""
        common = _common_fields(variants)
        if common:
            yield f"All of them have these fields beside `{DISCRIMINATOR}`:"
            yield self._table(common)
        for variant in variants:
            seen.add(variant)
            yield f"{'#' * level} {self.titles[variant]}"
            yield _prose(variant)
            own = {
                name: field
                for name, field in variant.model_fields.items()
                if name not in common and name != DISCRIMINATOR
            }
            yield self._table(own)
            yield from self._inside(variant, seen, level + 1)

    def _table(self, fields: dict[str, FieldInfo]) -> str:
        if not fields:
            return ""
        rows = ["| field | type | default | help |", "|---|---|---|---|"]
        for name, field in fields.items():
            cells = (f"`{name}`", self._type(field), _default(field), field.description or "")
            rows.append(f"| {' | '.join(_cell(text) for text in cells)} |")
        return "\n".join(rows)

    def _type(self, field: FieldInfo) -> str:
        return self._words(field.annotation, field.metadata)

    def _words(self, annotation: Any, metadata: Sequence[Any] = ()) -> str:
        """A type in words, with its bounds."""
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is Annotated:
            inner, *more = arguments
            flat = [m for each in more for m in (_metadata(each))]
            return self._words(inner, [*flat, *metadata])
        if annotation in self.titles:
            return _link(self.titles[annotation])
        if origin is Literal:
            return _joined([f"`{value}`" for value in arguments])
        if origin in (typing.Union, types.UnionType):
            return self._union_words(annotation, metadata)
        if origin in (list, tuple):
            return self._list_words(origin, arguments, metadata)
        if origin is dict:
            return self._mapping_words(arguments, metadata)
        return _plain_words(annotation, metadata)

    def _union_words(self, annotation: Any, metadata: Sequence[Any]) -> str:
        arguments = typing.get_args(annotation)
        if (variants := _variants(annotation)) in self.titles:
            return f"one of {_link(self.titles[variants])}"
        some = []
        for each in arguments:
            if typing.get_origin(each) is Literal:
                some += [f"`{value}`" for value in typing.get_args(each)]
            else:
                some.append("`null`" if each is type(None) else self._words(each, metadata))
        return _joined(some)

    def _list_words(self, origin: Any, arguments: Sequence[Any], metadata: Sequence[Any]) -> str:
        if origin is tuple:
            return f"list of {len(arguments)} {_plural(self._words(arguments[0]))}"
        words = self._words(arguments[0]).removeprefix("one of ")
        return f"list of {_plural(words)}{_least(metadata)}"

    def _mapping_words(self, arguments: Sequence[Any], metadata: Sequence[Any]) -> str:
        key, value = arguments
        if key is str and value is Any:
            return "mapping"
        return f"mapping of {self._words(key)} to {self._words(value)}{_least(metadata)}"


def _uses(model: Model, counted: Counter[Model] | None = None) -> Counter[Model]:
    """How many fields have each model as their type; fields that a union's variants share count
    once.
    """
    counted = Counter() if counted is None else counted
    for field in model.model_fields.values():
        for variants in _unions_in(field.annotation):
            for variant in variants:
                _uses(variant, counted)
        for inner in _single_models_in(field.annotation):
            counted[inner] += 1
            if counted[inner] == 1:
                _uses(inner, counted)
    return counted


def _variants(annotation: Any) -> tuple[Model, ...]:
    """The models of a union of several; empty for anything else."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _variants(arguments[0])
    if origin not in (typing.Union, types.UnionType):
        return ()
    models = tuple(each for each in arguments if _is_model(each))
    return models if len(models) > 1 else ()


def _unions_in(annotation: Any) -> list[tuple[Model, ...]]:
    """The unions of models anywhere in a type."""
    if variants := _variants(annotation):
        return [variants]
    return [found for each in typing.get_args(annotation) for found in _unions_in(each)]


def _single_models_in(annotation: Any) -> list[Model]:
    """The models anywhere in a type that are no variants of a union."""
    if _variants(annotation):
        return []
    if _is_model(annotation):
        return [annotation]
    return [found for each in typing.get_args(annotation) for found in _single_models_in(each)]


def _models_in(annotation: Any) -> list[Any]:
    return [*_unions_in(annotation), *_single_models_in(annotation)]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _variant_title(variant: Model, path: list[str]) -> str:
    """The value of `type` that chooses a variant; of a teacher, the key that only it requires."""
    if DISCRIMINATOR in variant.model_fields:
        (value,) = typing.get_args(variant.model_fields[DISCRIMINATOR].annotation)
        return f"`{value}`"
    required = [name for name, field in variant.model_fields.items() if field.is_required()]
    return f"`{path[-1]}` with `{required[0]}`"


def _common_fields(variants: Sequence[Model]) -> dict[str, FieldInfo]:
    """Fields that every variant has, of the same type, default and help."""
    first, *others = variants
    if not all(DISCRIMINATOR in variant.model_fields for variant in variants):
        return {}
    return {
        name: field
        for name, field in first.model_fields.items()
        if name != DISCRIMINATOR
        and all(repr(field) == repr(other.model_fields.get(name)) for other in others)
    }


def _metadata(part: Any) -> Sequence[Any]:
    return part.metadata if isinstance(part, FieldInfo) else [part]


def _is_mapping(field: FieldInfo) -> bool:
    return typing.get_origin(field.annotation) is dict


def _least(metadata: Sequence[Any]) -> str:
    """The fewest entries of a list or mapping."""
    lengths = [part.min_length for part in metadata if isinstance(part, annotated_types.MinLen)]
    return f", at least {lengths[0]}" if lengths else ""


def _plain_words(annotation: Any, metadata: Sequence[Any]) -> str:
    if annotation is bool:
        return "`true` or `false`"
    if annotation is str:
        is_name = any(getattr(part, "pattern", None) == NAME for part in metadata)
        return "name" if is_name else "text"
    kinds = {
        int: "integer",
        float: "number",
        date: "date",
        Any: "any value",
        JsonValue: "any value",
    }
    if annotation not in kinds:
        raise TypeError(f"docs/make_configuration.py has no words for the type {annotation}")
    return " ".join(filter(None, (kinds[annotation], _bounds(metadata))))


def _bounds(metadata: Sequence[Any]) -> str:
    """The bounds of a number."""
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = {
        sign: _number(getattr(part, sign))
        for part in metadata
        for sign in signs
        if getattr(part, sign, None) is not None
    }
    if found.keys() == {"ge", "le"}:
        return f"from {found['ge']} to {found['le']}"
    return " and ".join(f"{sign} {found[key]}" for key, sign in signs.items() if key in found)


def _plural(words: str) -> str:
    first, _, rest = words.partition(" ")
    return " ".join(filter(None, (PLURALS.get(first, first), rest)))


def _number(value: Any) -> str:
    return f"{value:g}"


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    assert value is not PydanticUndefined
    return f"`{_shown(value)}`"


def _shown(value: Any) -> str:
    """A default as it would stand in YAML."""
    if isinstance(value, BaseModel):
        chosen = value.model_dump(mode="json", exclude_defaults=True)
        return f"{{{', '.join(f'{key}: {_shown(each)}' for key, each in chosen.items())}}}"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_shown(each)}' for key, each in value.items())}}}"
    return f"[{', '.join(map(_shown, value))}]"


def _prose(model: Model) -> str:
    """A model's docstring, one line for each of its paragraphs."""
    paragraphs = cleandoc(model.__doc__ or "").split("\n\n")
    return "\n\n".join(map(_escaped, paragraphs))


def _cell(text: str) -> str:
    """A text in a table, whose columns `|` would end, even inside code."""
    return re.sub(r"(?<!\\)\|", r"\\|", _escaped(text))


def _escaped(text: str) -> str:
    """A text in one line, where `<` outside of code is no tag."""
    parts = " ".join(text.split()).split("`")
    return "`".join(
        part if i % 2 else re.sub(r"<(?=[a-zA-Z/!])", "&lt;", part) for i, part in enumerate(parts)
    )


def _link(title: str) -> str:
    return f"[{title}](#{slug(title)})"


def slug(title: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


if __name__ == "__main__":
    main()
