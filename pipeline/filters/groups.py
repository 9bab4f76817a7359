"""Filters that compare answers with each other: votes, best answers, shares of domains."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from pipeline.checkers.answer_checkers import final_value
from pipeline.checkers.readings import reading_key
from pipeline.config.filters import Agreement, Balance, BestOf
from pipeline.errors import FilterError
from pipeline.filters.candidates import Candidate, Evidence
from pipeline.fingerprint import unit_interval


def agreement(
    rule: Agreement, candidates: Sequence[Candidate], evidence: Evidence
) -> dict[int, str]:
    """Drops answers that lose the vote of their prompt's samples, or win it too narrowly.

    Every sample of every author has a vote, even if equal samples became one sequence. Answers
    without a final text, or without a number, count as samples but vote for no answer.
    """
    dropped = {}
    for members in _by_prompt(candidates):
        votes: Counter[str | None] = Counter()
        for i in members:
            votes[_vote(rule, candidates[i])] += candidates[i].samples
        total = votes.total()
        del votes[None]
        ranked = votes.most_common(2)
        is_tie = len(ranked) == 2 and ranked[0][1] == ranked[1][1]
        winner, count = ranked[0] if ranked else (None, 0)
        for i in members:
            vote = _vote(rule, candidates[i])
            if winner is None or is_tie or count < rule.min_share * total:
                dropped[i] = f"no agreement: at most {count} of {total} samples say the same"
            elif vote != winner:
                dropped[i] = f"{votes[vote]} of {total} samples say so, {count} say {winner}"
    return dropped


def best_of(rule: BestOf, candidates: Sequence[Candidate], evidence: Evidence) -> dict[int, str]:
    """Drops all but the best answers to each prompt; among equals the first is better.

    An answer that was cut in its thoughts is never among the best.
    """
    means = evidence.gold_logprobs[rule.teacher] if rule.teacher is not None else {}
    samples: Counter[tuple[str, str]] = Counter()
    for candidate in candidates:
        samples[candidate.entry.prompt_id, candidate.final] += candidate.samples
    figures: dict[str, Callable[[Candidate], float]] = {
        "shortest": lambda c: -len(c.answer_ids),
        "longest": lambda c: len(c.answer_ids),
        "samples": lambda c: samples[c.entry.prompt_id, c.final],
        "likelihood": lambda c: means.get(c.entry.sequence_id, -math.inf),
    }
    figure = figures[rule.by]
    dropped = {}
    for members in _by_prompt(candidates):
        whole = [i for i in members if candidates[i].final]
        dropped |= dict.fromkeys(set(members) - set(whole), "its thoughts are cut off")
        ranked = sorted(whole, key=lambda i: -figure(candidates[i]))
        for place, i in enumerate(ranked[rule.keep :], start=rule.keep + 1):
            dropped[i] = f"number {place} of {len(ranked)} by {rule.by}"
    return dropped


def balance(rule: Balance, candidates: Sequence[Candidate], evidence: Evidence) -> dict[int, str]:
    """Drops train sequences beyond their domain's share, chosen by the hash of their id.

    Raises:
        FilterError: a domain has no sequence, so that no other domain could keep any.
    """
    members: dict[str, list[int]] = {domain: [] for domain in rule.shares}
    for i, candidate in enumerate(candidates):
        if candidate.entry.split == "train":
            members[candidate.entry.domain].append(i)
    if empty := [domain for domain, places in members.items() if not places]:
        raise FilterError(
            f"the filter balance finds no sequence of {empty} in the train split, so it would keep "
            "none of any other domain: add prompts of these domains, or loosen the filters before "
            "it"
        )
    unit = min(len(places) / rule.shares[domain] for domain, places in members.items())
    dropped = {}
    for domain, places in members.items():
        # The small term keeps a share that rounding put just below a whole number.
        keep = math.floor(unit * rule.shares[domain] + 1e-9)
        places.sort(key=lambda i: unit_interval(candidates[i].entry.sequence_id))
        detail = f"{keep} of {len(places)} sequences are {domain}'s share"
        dropped |= dict.fromkeys(places[keep:], detail)
    return dropped


def _by_prompt(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Groups the places of candidates by prompt."""
    groups: dict[str, list[int]] = {}
    for i, candidate in enumerate(candidates):
        groups.setdefault(candidate.entry.prompt_id, []).append(i)
    return list(groups.values())


def _vote(rule: Agreement, candidate: Candidate) -> str | None:
    """Answer that a candidate votes for; None if it votes for none."""
    if rule.by == "exact":
        return candidate.final or None
    reading = final_value(candidate.final)
    return None if reading is None else reading_key(reading)
