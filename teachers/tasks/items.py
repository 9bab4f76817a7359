"""Helpers for the items of a task: halves, and the seed of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from pipeline.fingerprint import digest_bytes

Item = TypeVar("Item")


def halves_of(items: Sequence[Item]) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
    """First and second half of at least two items."""
    middle = len(items) // 2
    return tuple(items[:middle]), tuple(items[middle:])


def prompt_seed(prompt_id: str, author: str, seed: int) -> int:
    """Sampling seed of a prompt, which differs between prompts and between authors.

    Args:
        prompt_id: id of the prompt.
        author: name of the teacher, or `student`.
        seed: seed of the run.
    """
    return int(digest_bytes(prompt_id.encode(), author.encode())[:7], 16) + seed
