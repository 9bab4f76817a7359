"""A small model folder that is sound, and what makes files of it broken."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.old_run import WRITTEN

SOUND = WRITTEN / "first"
Change = Callable[[Path], object]
"""What is done to a copy of the sound folder."""
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)


def copy_of_sound(folder: Path) -> Path:
    """A copy of the sound folder that may be changed."""
    return Path(shutil.copytree(SOUND, folder))


def file(name: str, content: bytes | str) -> Change:
    """Writes a file, in place of the one that is there."""
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def json_file(name: str, value: Any) -> Change:
    return file(name, json.dumps(value))


def setting(name: str, **values: Any) -> Change:
    """Sets keys of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | values))

    return change


def without(name: str, *keys: str) -> Change:
    """Takes keys out of a JSON file; the whole file if none is named."""

    def change(folder: Path) -> None:
        path = folder / name
        if not keys:
            return path.unlink()
        found = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in found.items() if k not in keys}))
        return None

    return change


def replaced(name: str, old: str, new: str) -> Change:
    """Replaces text in a file."""

    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text, f"{name} has no {old!r}"
        (folder / name).write_text(text.replace(old, new))

    return change


def all_of(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def safetensors(header: dict[str, Any] | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file with any header.

    Args:
        length: length of the header that the file claims.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: str, shape: list[Any], start: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
