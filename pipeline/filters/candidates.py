"""Input of filters: sequences as filters see them, and the evidence besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.final_text import final_text

if TYPE_CHECKING:
    from pipeline.records import DatasetEntry


@dataclass(frozen=True)
class Candidate:
    """Sequence as filters see it.

    Attributes:
        prompt: text of the prompt, without system messages.
        answer: text of the answer, without special tokens.
        answer_ids: int32[P], tokens of the answer.
        reference: correct answer, if the prompt has one.
        samples: number of times that its authors wrote exactly this answer.
        begins_in_thought: whether the prompt ends with an opened thought that the answer continues.
    """

    entry: DatasetEntry
    prompt: str
    answer: str
    answer_ids: np.ndarray
    reference: str | None = None
    samples: int = 1
    begins_in_thought: bool = False

    @property
    def final(self) -> str:
        """Text of the answer behind its thoughts; nothing if it was cut in them."""
        return final_text(self.answer, self.begins_in_thought)


@dataclass(frozen=True)
class Evidence:
    """Knowledge of filters besides the candidates.

    Attributes:
        checker: function of answer and reference, which gives None for a reference that it cannot
            read; None if the run has no checker.
        holdout_prompts: texts of the hold-out prompts, by a name for people.
        holdout_domains: domains of the hold-out prompts, by the same name; prompts without one
            belong together.
        wording: pieces of the templates of the prompts, which many prompts share.
        gold_logprobs: for each teacher that a filter names, the mean log-probability in nats of the
            gold tokens of each scored sequence, by sequence id.
        grade: function that asks a judge for grades from 1 to 5 by sequence id; the grade is None
            or missing if the judge cannot grade.
    """

    checker: Callable[[str, str], bool | None] | None = None
    holdout_prompts: Mapping[str, str] = field(default_factory=dict)
    holdout_domains: Mapping[str, str] = field(default_factory=dict)
    wording: Sequence[str] = ()
    gold_logprobs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    grade: Callable[[Any, Sequence[Candidate]], Mapping[str, int | None]] | None = None

    @property
    def holdout_groups(self) -> list[list[tuple[str, str]]]:
        """Names and texts of the hold-out prompts of each domain."""
        groups: dict[str | None, list[tuple[str, str]]] = {}
        for name, text in self.holdout_prompts.items():
            groups.setdefault(self.holdout_domains.get(name), []).append((name, text))
        return list(groups.values())
