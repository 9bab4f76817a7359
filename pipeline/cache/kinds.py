"""Kinds of caches. A teacher has one cache of distributions under its own name, and may have two
more beside it: hidden states for losses on them, and wide rows of the hold-out split.

Wide rows serve the report where the rows that are trained on hold draws: KL and agreement are not
linear in a distribution, so draws cannot measure them. Their identity follows from the identity of
the teacher's distributions, so that it is written down nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.config.scoring import MAX_ENTRIES, TopK, selection_of
from pipeline.records import DatasetEntry
from pipeline.sequences import Dataset

HIDDEN_STATES = "+features"
HOLDOUT = "+holdout"
"""Ends of names; teachers' names have no plus sign."""


def hidden_states_of(teacher: str) -> str:
    """Name of the cache of a teacher's hidden states."""
    return teacher + HIDDEN_STATES


def holdout_of(teacher: str) -> str:
    """Name of the cache of a teacher's wide rows of the hold-out split."""
    return teacher + HOLDOUT


def holds_hidden_states(cache: str) -> bool:
    """Whether the cache of that name holds hidden states rather than distributions."""
    return cache.endswith(HIDDEN_STATES)


def holds_holdout(cache: str) -> bool:
    """Whether the cache of that name holds wide rows of the hold-out split alone."""
    return cache.endswith(HOLDOUT)


def teacher_of(cache: str) -> str:
    """Name of the teacher that fills a cache."""
    return cache.removesuffix(HIDDEN_STATES).removesuffix(HOLDOUT)


def entries_of(cache: str, entries: Iterable[DatasetEntry]) -> Dataset:
    """The sequences among `entries` that the cache of that name shall hold."""
    dataset = Dataset.of(entries)
    return dataset.of_split("holdout") if holds_holdout(cache) else dataset


def holdout_identities(identities: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Identities of the wide caches that go with a run's caches, by cache name.

    Args:
        identities: identity of each cache that is trained on, by name.
    """
    drawn = {
        name: identity
        for name, identity in identities.items()
        if not holds_hidden_states(name) and selection_of(identity).is_drawn
    }
    return {
        holdout_of(name): identity | {"selection": widest(identity["num_logprobs"]).model_dump()}
        for name, identity in drawn.items()
    }


def widest(num_logprobs: int) -> TopK:
    """Selection of wide rows: all captured entries, as far as a row holds them.

    Args:
        num_logprobs: capture width.
    """
    return TopK(type="top_k", max_entries=min(num_logprobs, MAX_ENTRIES))
