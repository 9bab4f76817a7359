"""Stable hashes of everything that decides the bytes of an output."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

DIGEST = re.compile("[0-9a-f]{32}", re.ASCII)


def digest_bytes(*parts: bytes) -> str:
    """Hex of a 16-byte BLAKE2b hash over the parts and their lengths.

    The lengths are hashed too, so that `(b"ab", b"c")` and `(b"a", b"bc")` differ.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()


def digest_json(value: Any) -> str:
    """Hex hash of a JSON value; the order of keys does not matter."""
    return digest_bytes(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def digest_of_rows(batches: Callable[[], Iterable[list[Any]]]) -> str:
    """Hex hash of a list of JSON values, the same as `digest_json` has for the whole list.

    Args:
        batches: function that gives the list in parts, none of them empty; it is called twice, as
            the hash begins with the length of the JSON text.
    """

    def pieces() -> Iterator[bytes]:
        opening = b"["
        for batch in batches():
            yield opening + json.dumps(batch, sort_keys=True, separators=(",", ":"))[1:-1].encode()
            opening = b","
        yield b"[]" if opening == b"[" else b"]"

    hasher = hashlib.blake2b(digest_size=16)
    hasher.update(sum(map(len, pieces())).to_bytes(8, "little"))
    for piece in pieces():
        hasher.update(piece)
    return hasher.hexdigest()


def exact_json(value: Any) -> Any:
    """JSON value of what YAML can hold, which tells values of different types apart.

    JSON itself has no infinities, and knows no keys but texts: `{5: .inf}` would equal `{"5":
    null}`. It becomes `{"!int 5": {"!float": "inf"}}`, so texts of that form must not be used.
    Values that JSON has stay as they are.
    """
    if isinstance(value, dict):
        return {_exact_key(key): exact_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [exact_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"!float": str(value)}
    return value


def _exact_key(key: Any) -> str:
    return key if isinstance(key, str) else f"!{type(key).__name__} {key}"


def digest_ids(ids: Iterable[str]) -> str:
    """Hex hash of an ordered list of ids; it names the shard that holds them."""
    return digest_bytes(*(identifier.encode() for identifier in ids))


def is_digest(text: str) -> bool:
    """Whether a text has the form of the hashes that name files."""
    return DIGEST.fullmatch(text) is not None


def sequence_id(
    input_ids: np.ndarray, loss_spans: Iterable[tuple[int, int]], tokenizer_hash: str
) -> str:
    """Id of a token sequence: hash of its token ids, its loss spans and its tokenizer."""
    spans = np.asarray(list(loss_spans), dtype="<i4")
    return digest_bytes(input_ids.astype("<i4").tobytes(), spans.tobytes(), tokenizer_hash.encode())


def unit_interval(identifier: str) -> float:
    """Number in [0, 1) that depends on the id alone, so that a choice by it is stable."""
    return int(digest_bytes(identifier.encode())[:13], 16) / 16**13


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lists the dotted keys whose values differ, one line each, as `key: old -> new`."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += [f"{key}.{line}" for line in differences(before, after)]
        elif before != after:
            lines.append(f"{key}: {before!r} -> {after!r}")
    return lines
