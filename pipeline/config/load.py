"""Reader of config files: YAML and overrides to a checked `Config` with absolute paths."""

from __future__ import annotations

import difflib
import os
import re
import stat
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.config.filters import Contamination, EvaluationFile, Judge
from pipeline.config.rounds import of_round
from pipeline.config.run import Config
from pipeline.config.synthesis import Writing
from pipeline.config.teachers import TeacherConfig
from pipeline.credentials import check_no_secrets, shown_url, without_secrets
from pipeline.errors import ConfigError
from pipeline.messages import printable, short
from pipeline.yaml_text import DEEPEST, MOST_BYTES, YamlError, read_yaml, write_yaml

LONGEST_MESSAGE = 3000
"""Characters of a message about several mistakes; further mistakes are counted."""


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a config file with dotted `key=value` overrides, checks it, makes its paths absolute.

    In a later round the student starts from the student of the round before.

    Raises:
        ConfigError: the file is missing, unreadable or not YAML, an override is malformed, a key is
            unknown (the closest known key is named), or a value is refused.
    """
    path = Path(path)
    shown = short(printable(str(path)), 500)
    name = f"the config file {shown}"
    try:
        values = read_yaml(_content(path, name))
    except YamlError as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"{name} cannot be read: {reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{name} must hold a mapping of sections, found {type(values).__name__}: begin with "
            "`name: …`, and `polystill run CONFIG --dry-run` says what else is needed"
        )
    values = _without_aliases(values)
    for override in overrides or []:
        _apply_override(values, override)
    check_no_secrets(values)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{shown}: {_explain_all(error)}") from error
    return of_round(absolute_paths(config, path.resolve().parent), config.round)


def _content(path: Path, name: str) -> bytes:
    """Content of a config file, without waiting for a pipe.

    Raises:
        ConfigError: there is no such file, or it is none.
        OSError: it cannot be read.
    """
    if "\0" in str(path) or not path.exists():
        raise ConfigError(f"{name} does not exist: correct the path")
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise ConfigError(f"{name} is a folder: name the YAML file in it")
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{name} is a pipe or device: write its content to a file")
    with path.open("rb") as file:
        return file.read(MOST_BYTES + 1)


def dump_config(config: Config) -> str:
    """Resolved config as YAML; `load_config` reads it back to an equal value."""
    return write_yaml(config.model_dump())


def absolute_paths(config: Config, folder: Path) -> Config:
    """Config with every relative path made absolute against `folder`.

    Raises:
        ConfigError: a model may be a hub id as well as a folder, or a URI has options.
    """
    _check_uris(_file_paths(config))
    values = config.model_dump()
    for i, root in enumerate(config.storage.shared_roots):
        values["storage"]["shared_roots"][i] = _absolute(root, folder)
    for key, path in _file_paths(config).items():
        _set(values, key, _absolute(path, folder))
    holders = [(teacher, "model") for teacher in values["teachers"].values() if "model" in teacher]
    endpoints = [t["endpoint"] for t in values["teachers"].values() if "endpoint" in t]
    holders += [(endpoint, "tokenizer") for endpoint in endpoints if endpoint["tokenizer"]]
    for holder, key in [*holders, (values["student"], "model")]:
        model = holder[key]
        if model.startswith((".", "~")):
            holder[key] = _absolute(model, folder)
        elif not is_folder(model) and (folder / model).is_dir():
            raise ConfigError(
                f"{key} {model!r} is both a hub id and a folder beside the config: write "
                f"./{model} for the folder"
            )
    return Config.model_validate(values)


def _check_uris(paths: dict[str, str]) -> None:
    """Refuses URIs with a query or a fragment, since paths are appended to URIs.

    Args:
        paths: paths and URIs by the key that holds each.
    """
    for key, path in paths.items():
        if "://" in path and ("?" in path or "#" in path):
            plain, mark, _ = re.split(r"([?#])", path, maxsplit=1)
            raise ConfigError(
                f"{key} is {shown_url(path)!r}, and the part behind {mark!r} would become a part "
                f"of file names: write {shown_url(plain)!r}, and name region and endpoint in the "
                "environment "
                "of this machine and of every node (AWS_DEFAULT_REGION and AWS_ENDPOINT_URL for "
                "s3://)"
            )


def is_folder(model: str) -> bool:
    """Whether a model of a loaded config is a folder and no hub id."""
    return model.startswith("/")


def check_model_folders(config: Config) -> None:
    """Checks that model folders exist; the prepare stage looks up hub ids.

    Raises:
        ConfigError: a folder is missing.
    """
    for key, model in {**_teacher_models(config), "student.model": config.student.model}.items():
        if is_folder(model) and not Path(model).is_dir():
            raise ConfigError(f"{key}: the model folder {model} does not exist")


def local_paths(config: Config) -> dict[str, str]:
    """Every local path of a loaded config by the key that holds it."""
    paths = {"storage.root": config.storage.root, "student.model": config.student.model}
    paths["storage.models_root"] = config.storage.models_root or config.storage.root
    paths |= _teacher_models(config) | _file_paths(config)
    return {key: path for key, path in paths.items() if path.startswith("/")}


def check_shared_paths(config: Config) -> None:
    """Refuses local paths that the nodes of a remote cluster cannot see.

    Raises:
        ConfigError: a local path lies outside `storage.shared_roots`.
    """
    roots = [root.rstrip("/") + "/" for root in config.storage.shared_roots]
    for key, path in local_paths(config).items():
        if not any(f"{path}/".startswith(root) for root in roots):
            raise ConfigError(
                f"{key} is the local path {path}, which the nodes of a cluster may not see: use a "
                "URI such as s3://…, or add a folder above the path that every node mounts to "
                "storage.shared_roots"
            )


def evaluation_files(config: Config) -> dict[str, EvaluationFile]:
    """Evaluation files of all contamination filters by the key that holds their path."""
    return {
        f"synthesis.filters.{i}.files.{k}.path": file
        for i, rule in enumerate(config.synthesis.filters)
        if isinstance(rule, Contamination)
        for k, file in enumerate(rule.files)
    }


def _file_paths(config: Config) -> dict[str, str]:
    """Paths of all files and folders but models, by the key that holds each."""
    paths: dict[str, str | None] = {
        "storage.root": config.storage.root,
        "storage.models_root": config.storage.models_root,
        "student.initial_weights": config.student.initial_weights,
        "student.chat_template": config.student.chat_template,
    }
    for i, source in enumerate(config.prompts.sources):
        paths[f"prompts.sources.{i}.path"] = source.path
    for key, file in evaluation_files(config).items():
        paths[key] = file.path
    for i, recipe in enumerate(config.synthesis.recipes):
        if isinstance(recipe, Writing):
            for file in recipe.template_files:
                paths[f"synthesis.recipes.{i}.{file.key}"] = file.own
    for i, rule in enumerate(config.synthesis.filters):
        if isinstance(rule, Judge):
            paths[f"synthesis.filters.{i}.rubric"] = rule.rubric
    return {key: path for key, path in paths.items() if path is not None}


def _teacher_models(config: Config) -> dict[str, str]:
    """Folders or hub ids that are read of the teachers, by the key that holds each."""
    models = {}
    for name, teacher in config.teachers.items():
        key = "model" if isinstance(teacher, TeacherConfig) else "endpoint.tokenizer"
        if teacher.files is not None:
            models[f"teachers.{name}.{key}"] = teacher.files.model
    return models


def _absolute(path: str, folder: Path) -> str:
    if "://" in path:
        return path
    return os.path.normpath(folder / os.path.expanduser(path))


def _set(values: Any, key: str, value: str) -> None:
    """Sets the value of an existing dotted key; numbers are places in lists."""
    *parents, last = key.split(".")
    for name in parents:
        values = values[int(name)] if isinstance(values, list) else values[name]
    values[last] = value


def _without_aliases(value: Any) -> Any:
    """Copy of a YAML value in which every place has an object of its own.

    YAML gives one object to an anchor and all its aliases, but an override must change only the
    place that it names.
    """
    if isinstance(value, dict):
        return {key: _without_aliases(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_aliases(item) for item in value]
    return value


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"override {without_secrets(override)!r} is not of the form key=value: write it like "
            "training.steps=100"
        )
    shown = without_secrets(override)
    *parents, last = key.split(".")
    if len(parents) >= DEEPEST:
        raise ConfigError(
            f"override {short(shown)!r} names {len(parents) + 1} keys inside of each other: name "
            f"at most {DEEPEST}"
        )
    target: Any = values
    for depth, name in enumerate(parents):
        target = _step(target, name, ".".join(parents[: depth + 1]))
    try:
        value = read_yaml(text)
    except YamlError as error:
        raise ConfigError(
            f"override {short(shown, 200)!r}: the value is not valid YAML: {error}"
        ) from error
    if isinstance(target, list):
        target[_index(target, last, key)] = value
    elif isinstance(target, dict):
        target[_key(target, last)] = value
    else:
        raise ConfigError(
            f"override {short(shown, 200)!r}: {'.'.join(parents)} is a plain value and has no "
            "keys: override the value itself"
        )


def _step(target: Any, name: str, place: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, name, place)]
    if isinstance(target, dict):
        return target.setdefault(_key(target, name), {})
    raise ConfigError(
        f"override {place}: the key above {name!r} is a plain value and has no keys: override the "
        "value itself"
    )


def _key(target: dict[Any, Any], name: str) -> Any:
    """Key of a mapping that an override names, which may be a number as in `logit_bias`."""
    return next((key for key in target if str(key) == name), name)


def _index(target: list[Any], name: str, place: str) -> int:
    is_number = name.isascii() and name.isdecimal() and len(name) < 10
    if not is_number or int(name) >= len(target):
        raise ConfigError(
            f"override {short(place, 200)}: {short(name)!r} is not an index of the list, which has "
            f"{len(target)} entries counted from 0"
        )
    return int(name)


def _explain_all(error: ValidationError) -> str:
    """Message for all of pydantic's errors, one a line."""
    text, items = "", error.errors()
    for i, item in enumerate(items):
        line = short(printable(_explain(item)), LONGEST_MESSAGE)
        if i and len(text) + len(line) > LONGEST_MESSAGE:
            return f"{text}\n  and {len(items) - i} further mistakes"
        text += f"\n  {line}" if text else line
    return text


def _explain(item: Any) -> str:
    """Message for one of pydantic's errors."""
    place = short(".".join(str(part) for part in item["loc"]), 200)
    if item["type"] == "extra_forbidden":
        *parents, key = item["loc"]
        known = sorted(_known_keys(parents))
        similar = difflib.get_close_matches(short(str(key)), known, n=1)
        hint = f"did you mean {similar[0]!r}?" if similar else f"known keys: {', '.join(known)}"
        return f"unknown key {place!r}; {hint}"
    if item["type"] == "missing":
        return f"{place!r} is required"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] != "value_error":  # our own messages name the value themselves
        message += f", found {short(repr(item['input']))}"
    if item["type"] == "string_type" and isinstance(item["input"], bool | int | float):
        message += ": put it in quotes, since YAML takes it for no text"
    return f"{place}: {message}" if place else message


def _known_keys(location: list[Any]) -> set[str]:
    """Field names of every model that can stand at a location of the config."""
    models: list[Any] = [Config]
    for part in location:
        following = []
        for model in models:
            if model.model_fields.get(part) is not None:
                following += _models_in(model.model_fields[part].annotation)
        models = following or models
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
