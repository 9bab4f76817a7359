"""Filters that look at each answer alone, in the same way in every split."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from pipeline.config.filters import Alphabet, Checker, Judge, Length, Perplexity, Repetition
from pipeline.filters.candidates import Candidate, Evidence

SHOWN_CHARACTERS = 120
"""Characters of a text that details show, counted from its end."""


def length(rule: Length, candidates: Sequence[Candidate], evidence: Evidence) -> dict[int, str]:
    """Drops answers outside the bounds of their length."""
    low, high = rule.min_tokens or 0, rule.max_tokens or math.inf
    return {
        i: f"{len(candidate.answer_ids)} tokens"
        for i, candidate in enumerate(candidates)
        if not low <= len(candidate.answer_ids) <= high
    }


def alphabet(rule: Alphabet, candidates: Sequence[Candidate], evidence: Evidence) -> dict[int, str]:
    """Drops answers with too few letters of the expected scripts; answers without letters pass."""
    dropped = {}
    for i, candidate in enumerate(candidates):
        scripts = [script_of(character) for character in candidate.answer if character.isalpha()]
        share = sum(script in rule.scripts for script in scripts) / max(len(scripts), 1)
        if scripts and share < rule.min_share:
            others = sorted({script for script in scripts if script not in rule.scripts})
            dropped[i] = f"{share:.0%} of {len(scripts)} letters; others are {', '.join(others)}"
    return dropped


@lru_cache(maxsize=1 << 16)
def script_of(letter: str) -> str:
    """Script of a letter, from the letter's name in the Unicode database."""
    words = unicodedata.name(letter, "unknown").lower().split()
    wide = words[0] in ("fullwidth", "halfwidth")
    first = words[1 if wide else 0].partition("-")[0]
    return "han" if first in ("cjk", "ideographic") else first


def repetition(
    rule: Repetition, candidates: Sequence[Candidate], evidence: Evidence
) -> dict[int, str]:
    """Drops answers in which too many token n-grams occurred before; shorter answers pass."""
    dropped = {}
    for i, candidate in enumerate(candidates):
        ids = candidate.answer_ids.tolist()
        ngrams = list(zip(*(ids[k:] for k in range(rule.ngram)), strict=False))
        share = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        if share > rule.max_share:
            dropped[i] = f"{share:.0%} of {len(ngrams)} {rule.ngram}-grams repeat others"
    return dropped


def checker(rule: Checker, candidates: Sequence[Candidate], evidence: Evidence) -> dict[int, str]:
    """Drops answers that the run's checker finds wrong.

    Answers without a reference, or with one that the checker cannot read, pass.
    """
    check = evidence.checker
    assert check is not None, "the config refuses the filter without a checker"
    dropped = {}
    for i, candidate in enumerate(candidates):
        if candidate.reference is None:
            continue
        verdict = check(candidate.final, candidate.reference)
        if verdict is not None and not verdict:
            dropped[i] = (
                f"{shown_end(candidate.answer)!r} against {shown_end(candidate.reference)!r}"
            )
    return dropped


def judge(rule: Judge, candidates: Sequence[Candidate], evidence: Evidence) -> dict[int, str]:
    """Drops answers that the judge grades too low or cannot grade."""
    assert evidence.grade is not None, "every stage with filters can ask a judge"
    grades = evidence.grade(rule, candidates)
    dropped = {}
    for i, candidate in enumerate(candidates):
        grade = grades.get(candidate.entry.sequence_id)
        if grade is None:
            dropped[i] = f"{rule.teacher} could not grade it"
        elif grade < rule.min_grade:
            dropped[i] = f"grade {grade} by {rule.teacher}"
    return dropped


def perplexity(
    rule: Perplexity, candidates: Sequence[Candidate], evidence: Evidence
) -> dict[int, str]:
    """Drops answers outside the bounds of their perplexity, exp(-mean gold log-probability)."""
    means = evidence.gold_logprobs[rule.teacher]
    least = -math.log(rule.max) if rule.max else -math.inf
    most = -math.log(rule.min) if rule.min else math.inf
    dropped = {}
    for i, candidate in enumerate(candidates):
        mean = means.get(candidate.entry.sequence_id)
        if mean is None:
            dropped[i] = f"{rule.teacher} could not score it"
        elif not least <= mean <= most:
            dropped[i] = f"perplexity {math.exp(min(-mean, 700)):.4g} under {rule.teacher}"
    return dropped


def shown_end(text: str) -> str:
    """End of a text, for details and messages."""
    return text if len(text) <= SHOWN_CHARACTERS else "…" + text[-SHOWN_CHARACTERS:]
