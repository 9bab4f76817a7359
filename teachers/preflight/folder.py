"""Preflight of the small files in a model folder: are they there, whole, and of the right form?

Libraries say of a broken file that a key is missing somewhere. Here the file has its name.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.messages import foreign

JSON_FILES = (
    *("config.json", "generation_config.json", "chat_template.json", "vocab.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("model.safetensors.index.json", "consolidated.safetensors.index.json"),
)
"""Files that hold one JSON object each."""
TEXT_FILES = ("*.jinja", "additional_chat_templates/*.jinja", "merges.txt")
BINARY_FILES = ("*.model", "*.tiktoken", "*.safetensors")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ANNEX_POINTER = b"/annex/objects/"
MOST_BYTES = 1 << 30
"""Bytes of the largest file that is read here; vocabularies have tens of millions."""

MOST_TOKENS = 1 << 24
"""Tokens of the largest vocabulary: rows of a cache store an id in 3 bytes."""

_KINDS = {list: "an array", str: "a string", bool: "a truth value", type(None): "null"}


class _TwiceError(ValueError):
    """A key of an object has two values."""


def check_folder(model: str) -> None:
    """Checks the files of a model folder that are read, weights aside.

    Raises:
        ConfigError: the folder does not exist or holds no model; or a file is no file, cannot be
            read, stands for one that was not fetched, or is no JSON object or no text.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise ConfigError(f"the model folder {model} does not exist: check the path")
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ConfigError(
            f"the model folder {model} cannot be read: {error.strerror}: give this user the right "
            "to read it"
        ) from error
    if "config.json" not in names:
        is_adapter = "adapter_config.json" in names
        remedy = "merge the adapter into its base model" if is_adapter else "check the path"
        kind = ", and an adapter_config.json" if is_adapter else ""
        raise ConfigError(
            f"{model} is not a model folder, since it has no config.json{kind}: {remedy}"
        )
    for name in JSON_FILES:
        if name in names:
            value = read_object(folder / name)
            if (of_tokens := _TOKENS.get(name)) is not None:
                _check_ids(folder / name, of_tokens, value)
    words = () if "tokenizer.json" in names else ("vocab.txt",)  # read in its place
    for pattern in (*TEXT_FILES, *words):
        for path in sorted(folder.glob(pattern)):
            _text(path)
    for pattern in BINARY_FILES:
        for path in sorted(folder.glob(pattern)):
            if not path.is_dir():
                check_file(path)


def _ids_of_tokenizer(value: Mapping[str, Any]) -> Iterator[tuple[object, object]]:
    """Tokens of a `tokenizer.json` with their ids.

    Raises:
        ValueError: it has another form.
    """
    model, added = value.get("model"), value.get("added_tokens")
    if not isinstance(model, dict) or not isinstance(added, list):
        raise ValueError("it has no `model` with its `added_tokens`")
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    for token in added:
        if not isinstance(token, dict) or not {"id", "content"} <= token.keys():
            raise ValueError(f"the added token {foreign(token, 100)!r} has no id and content")
        yield token["content"], token["id"]


def _ids_of_decoder(value: Mapping[str, Any]) -> Iterator[tuple[object, object]]:
    """Added tokens of a `tokenizer_config.json` with their ids.

    Raises:
        ValueError: they have another form.
    """
    decoder = value.get("added_tokens_decoder", {})
    if not isinstance(decoder, dict):
        raise ValueError("added_tokens_decoder is no object of tokens by their ids")
    for number, token in decoder.items():
        content = token.get("content") if isinstance(token, dict) else token
        yield content, int(number) if number.isdecimal() else number


_TOKENS: dict[str, Callable[[Mapping[str, Any]], Iterable[tuple[object, object]]]] = {
    "tokenizer.json": _ids_of_tokenizer,
    "tokenizer_config.json": _ids_of_decoder,
    "vocab.json": lambda value: value.items(),
    "added_tokens.json": lambda value: value.items(),
}


def _check_ids(
    path: Path,
    of_tokens: Callable[[Mapping[str, Any]], Iterable[tuple[object, object]]],
    value: Mapping[str, Any],
) -> None:
    """Checks the ids of all tokens in a file: libraries take memory for each id up to the largest.

    Raises:
        ConfigError: an id is none, or the file has another form.
    """
    try:
        for token, number in of_tokens(value):
            if type(number) is not int or not 0 <= number < MOST_TOKENS:
                raise ValueError(
                    f"the token {foreign(token, 80)!r} has the id {foreign(number, 80)!r}, which "
                    f"is none from 0 to {MOST_TOKENS - 1}"
                )
    except ValueError as error:
        raise ConfigError(
            f"{path} does not describe a vocabulary, since {error}: fetch the file again, or write "
            "it with `save_pretrained`"
        ) from error


def check_file(path: Path) -> int:
    """Checks that a file is one that can be read, and not what stands for one; returns its bytes.

    Links count as the file behind them, as in a cache of the hub.

    Raises:
        ConfigError: it is none.
    """
    try:
        state = path.stat()
    except OSError as error:
        reason = "is a link to a file that does not exist" if path.is_symlink() else error.strerror
        raise ConfigError(f"{path} {reason}: fetch the file, or mend the link") from error
    if not stat.S_ISREG(state.st_mode):
        kind = "a folder" if stat.S_ISDIR(state.st_mode) else "a pipe, a socket or a device"
        raise ConfigError(f"{path} is {kind} and no file: put the model's own file there")
    try:
        with path.open("rb") as stream:
            start = stream.read(200)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}: give this user the right to read it"
        ) from error
    if start.startswith(LFS_POINTER):
        raise ConfigError(
            f"{path} is a pointer of git-LFS and not the file that it stands for: run `git lfs "
            f"pull` in {path.parent}"
        )
    if start.startswith(ANNEX_POINTER):
        raise ConfigError(
            f"{path} is a pointer of git-annex and not the file that it stands for: run `git annex "
            f"get .` in {path.parent}"
        )
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise ConfigError(
            f"{path} is a page of HTML, as a server sends it in place of a file that needs a login "
            "or does not exist: fetch the file again"
        )
    return state.st_size


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ConfigError: the file is none, or names a key twice with two values.
    """
    text = _text(path)
    try:
        value = json.loads(text, object_pairs_hook=_without_contradiction)
    except _TwiceError as error:
        raise ConfigError(
            f"{path} gives the key {foreign(error, 80)!r} two values: take one out"
        ) from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply: write the file anew") from error
    except ValueError as error:
        hint = "the file is empty" if not text.strip() else foreign(error)
        raise ConfigError(
            f"{path} is not valid JSON: {hint}: mend the file, or fetch it again"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} holds {_KINDS.get(type(value), 'a number')}, and should hold an object of "
            "JSON, {…}: mend the file, or fetch it again"
        )
    return value


def _text(path: Path) -> str:
    if (size := check_file(path)) > MOST_BYTES:
        raise ConfigError(
            f"{path} has {size} bytes, and files of its kind have at most {MOST_BYTES}: put the "
            "model's own file there"
        )
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8, or fetch it again"
        ) from error


def _without_contradiction(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, if no key has two values: each library would take another one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if value != found[key]:
                raise _TwiceError(key)
    return found
