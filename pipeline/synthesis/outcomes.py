"""Outcomes of replies in words: how many answers were kept, and why each other one was dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

Counts = Mapping[str, Mapping[str, int]]
"""Numbers of replies by outcome, by the label of each step, as stage records hold them."""

DROPPED = {
    "truncated": "cut at max_tokens",
    "withheld": "withheld by the server's content filter",
    "over_long": "replies cut at max_tokens",
    "empty": "empty",
    "too_long": "too long",
    "malformed": "malformed",
    "refusal": "refused",
    "unchanged": "unchanged prompts",
    "duplicate": "duplicates",
    "quarantined": "quarantined",
}
"""Words for each outcome of a reply that was not kept, in the order in which people read them."""
NOTED = {
    "unknown_end": "ended for a reason that is not known, and kept without an end of sequence",
    "thoughts": "came with reasoning apart (endpoint.reasoning)",
}
"""Words for what else is counted of replies."""
CUT = ("truncated", "over_long")
LARGE_SHARE = 0.1
"""Share of a step's replies above which cut ones call for another setting."""


def outcome_summary(counts: Counts) -> str:
    """Kept and written answers of each step, the dropped ones of all steps by reason, and what is
    worth knowing of the others.
    """
    kept = (f"{label} {of.get('kept', 0)} of {of['answers']}" for label, of in counts.items())
    dropped = Counter[str]()
    for of in counts.values():
        dropped.update({reason: of.get(reason, 0) for reason in DROPPED})
    reasons = ", ".join(
        f"{dropped[reason]} {DROPPED[reason]}" for reason in DROPPED if dropped[reason]
    )
    noted = {words: sum(of.get(name, 0) for of in counts.values()) for name, words in NOTED.items()}
    parts = [f"answers kept: {', '.join(kept)}", f"dropped: {reasons}" if reasons else ""]
    parts += [f"{number} answers {words}" for words, number in noted.items() if number]
    return "; ".join(filter(None, parts))


def often_cut(counts: Counts, settings: Mapping[str, tuple[str, int]]) -> list[str]:
    """A line for each setting that cuts many replies, with the remedy.

    Args:
        settings: key and value of `max_tokens`, by the label of each step that has one.
    """
    cut: dict[tuple[str, int], Counter[str]] = {}
    for label, setting in settings.items():
        of = counts[label]
        numbers = Counter(cut=sum(of.get(name, 0) for name in CUT), all=of["answers"])
        cut.setdefault(setting, Counter()).update(numbers)
    return [
        f"{of['cut']} of {of['all']} answers were cut at {key} ({most}): raise it, or ask for "
        "shorter answers"
        for (key, most), of in cut.items()
        if of["cut"] > LARGE_SHARE * of["all"]
    ]
