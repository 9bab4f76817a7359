"""A sequence as filters see it, and the evidence that they have beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pipeline.records import DatasetEntry


@dataclass(frozen=True)
class Candidate:
    """A sequence as filters see it.

    Attributes:
        prompt: its words, without system messages.
        answer: without special tokens.
        answer_ids: int32[P].
        samples: how often its generators wrote exactly this answer.
    """

    entry: DatasetEntry
    prompt: str
    answer: str
    answer_ids: np.ndarray
    reference: str | None = None
    samples: int = 1


@dataclass(frozen=True)
class Evidence:
    """What filters know beside the candidates.

    Attributes:
        checker: of answer and reference; None when the run has none.
        holdout_prompts: the words of the hold-out prompts, by a name for people.
        grade: asks a judge; returns grades of 1 to 5 by sequence id, None or nothing where it
            cannot grade.
        gold_logprobs: by teacher, the mean log-probability in nats of each scored sequence's gold
            tokens; of the teachers that a filter names.
    """

    checker: Callable[[str, str], bool] | None = None
    holdout_prompts: Mapping[str, str] = field(default_factory=dict)
    gold_logprobs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    grade: Callable[[Any, Sequence[Candidate]], Mapping[str, int | None]] | None = None
