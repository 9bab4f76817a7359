"""What the installed DeepSpeed says of a `deepspeed:` block, before any hardware is asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.messages import closest

# What it asks of the machine that it runs on, which is not the one that trains.
UNCHECKED = ("aio",)


class ReadKeys(dict[str, Any]):
    """A block, and those below it, that remember which keys were asked for by name."""

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
        return super().__iter__()  # without an own one, `**block` would pass by `__getitem__`

    def __copy__(self) -> ReadKeys:
        return self

    def unread(self, place: str) -> list[str]:
        """What nobody has asked for, a line each; nothing of a block that was taken as a whole."""
        unknown = [key for key in self if key not in self.read] if self.read else []
        lines = [
            f"{place}.{key} is unknown to DeepSpeed; {closest(key, self.read)}" for key in unknown
        ]
        below = [item for item in self.items() if isinstance(item[1], ReadKeys)]
        return lines + [line for key, block in below for line in block.unread(f"{place}.{key}")]


def check_deepspeed_options(block: dict[str, Any]) -> None:
    """Has DeepSpeed read a `deepspeed:` block and refuses what it refuses or does not look at.

    Raises:
        ConfigError: DeepSpeed refuses a value, or ignores a key (the closest one is named).
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # this process trains nothing
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    read = ReadKeys({key: value for key, value in block.items() if key not in UNCHECKED})
    ours = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    read.update(ours)
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
