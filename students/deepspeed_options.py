"""Checks of a `deepspeed:` block by the installed DeepSpeed, before any hardware is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.messages import closest

UNCHECKED = ("aio",)
"""Keys that DeepSpeed checks against its own machine, which is not the machine that trains."""


class ReadKeys(dict[str, Any]):
    """A block that remembers which of its keys were read by name, and so do the blocks in it."""

    def __init__(self, block: dict[str, Any]) -> None:
        super().__init__(
            (key, ReadKeys(value) if isinstance(value, dict) else value)
            for key, value in block.items()
        )
        self.read: set[str] = set()

    def get(self, key: Any, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: Any) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self  # so that `key in block.keys()` is seen as well

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()  # without this method `**block` would bypass `__getitem__`

    def __copy__(self) -> ReadKeys:
        return self

    def unread(self, place: str) -> list[str]:
        """A line for each key that was never read; none for the keys of a block that was taken as
        a whole.
        """
        unknown = [key for key in self if key not in self.read] if self.read else []
        lines = [
            f"{place}.{key} is unknown to DeepSpeed; {closest(key, self.read)}" for key in unknown
        ]
        below = [item for item in self.items() if isinstance(item[1], ReadKeys)]
        return lines + [line for key, block in below for line in block.unread(f"{place}.{key}")]


def check_deepspeed_options(block: dict[str, Any]) -> None:
    """Lets DeepSpeed read a `deepspeed:` block, and refuses the values that it refuses and the keys
    that it ignores.

    Raises:
        ConfigError: DeepSpeed refuses a value, or ignores a key (the message has the closest key).
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # this process trains nothing
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    read = ReadKeys({key: value for key, value in block.items() if key not in UNCHECKED})
    # DeepSpeed wants them, and a training sets them itself
    read.update({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
    try:
        DeepSpeedConfig(read)
    except ValidationError as error:
        raise ConfigError(
            "DeepSpeed refuses training.deepspeed: "
            + "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}, found {item['input']!r}"
                for item in error.errors()
            )
        ) from error
    except (DeepSpeedConfigError, AssertionError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"DeepSpeed refuses training.deepspeed: {error}") from error
    if lines := read.unread("training.deepspeed"):
        raise ConfigError("\n".join(lines))
