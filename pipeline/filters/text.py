"""Filters that judge each answer alone; they judge every split alike."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

from pipeline.config.filters import Alphabet, Checker, Judge, Length, Perplexity, Repetition
from pipeline.filters.candidates import Candidate, Evidence

SHOWN_CHARACTERS = 120


def length(rule: Length, candidates: Sequence[Candidate], evidence: Evidence) -> dict[int, str]:
    """Answers outside the bounds."""
    low, high = rule.min_tokens or 0, rule.max_tokens or math.inf
    return {
        i: f"{len(candidate.answer_ids)} tokens"
        for i, candidate in enumerate(candidates)
        if not low <= len(candidate.answer_ids) <= high
    }


def alphabet(rule: Alphabet, candidates: Sequence[Candidate], evidence: Evidence) -> dict[int, str]:
    """Answers with too few letters of the expected alphabets; those without letters pass."""
    dropped = {}
    for i, candidate in enumerate(candidates):
        found = [script_of(character) for character in candidate.answer if character.isalpha()]
        share = sum(script in rule.scripts for script in found) / max(len(found), 1)
        if found and share < rule.min_share:
            others = sorted({script for script in found if script not in rule.scripts})
            dropped[i] = f"{share:.0%} of {len(found)} letters; others are {', '.join(others)}"
    return dropped


@lru_cache(maxsize=1 << 16)
def script_of(letter: str) -> str:
    """The alphabet of a letter, from its name in the Unicode database."""
    words = unicodedata.name(letter, "unknown").lower().split()
    wide = words[0] in ("fullwidth", "halfwidth")
    first = words[1 if wide else 0].partition("-")[0]
    return "han" if first in ("cjk", "ideographic") else first


def repetition(
    rule: Repetition, candidates: Sequence[Candidate], evidence: Evidence
) -> dict[int, str]:
    """Answers with too many token n-grams that stood in them before; shorter ones pass."""
    dropped = {}
    for i, candidate in enumerate(candidates):
        ids = candidate.answer_ids.tolist()
        ngrams = list(zip(*(ids[k:] for k in range(rule.ngram)), strict=False))
        share = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        if share > rule.max_share:
            dropped[i] = f"{share:.0%} of {len(ngrams)} {rule.ngram}-grams repeat others"
    return dropped


def checker(rule: Checker, candidates: Sequence[Candidate], evidence: Evidence) -> dict[int, str]:
    """Answers that the run's checker finds wrong; without a reference nothing is judged."""
    check = evidence.checker
    assert check is not None, "the config refuses the filter without a checker"
    return {
        i: f"{_shown(candidate.answer)!r} against {_shown(candidate.reference)!r}"
        for i, candidate in enumerate(candidates)
        if candidate.reference is not None and not check(candidate.answer, candidate.reference)
    }


def judge(rule: Judge, candidates: Sequence[Candidate], evidence: Evidence) -> dict[int, str]:
    """Answers that the judge grades too low, or cannot grade."""
    assert evidence.grade is not None, "the stages can ask a judge"
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
    """Answers outside the bounds of a teacher's perplexity, exp(-mean gold log-probability)."""
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


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else "…" + text[-SHOWN_CHARACTERS:]
