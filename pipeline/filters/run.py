"""Filters of a config, run in their order; each is a plain function on records.

Answers stay in their shards: filters choose the sequences of a dataset, so another filter asks no
teacher again. The first filter that needs cached rows, and all filters behind it, run after
scoring. Dropped answers are written with their reasons before the next filter runs.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pipeline.checkers.answer_checkers import checker_identity
from pipeline.config.filters import Checker as CheckerFilter
from pipeline.config.filters import Contamination, Filter
from pipeline.errors import FilterError
from pipeline.filters.candidates import Candidate, Evidence
from pipeline.filters.evaluated import FEWEST_SHARING
from pipeline.filters.groups import agreement, balance, best_of
from pipeline.filters.likeness import contamination, exact_duplicate, near_duplicate
from pipeline.filters.text import alphabet, checker, judge, length, perplexity, repetition
from pipeline.fingerprint import digest_bytes
from pipeline.layout import Layout
from pipeline.records import DatasetEntry
from pipeline.storage import files_below, is_folder, join, read_bytes
from pipeline.synthesis.rejected import Rejected, write_rejected

logger = logging.getLogger(__name__)

FILTERS: dict[str, Callable[[Any, Sequence[Candidate], Evidence], dict[int, str]]] = {
    "length": length,
    "alphabet": alphabet,
    "repetition": repetition,
    "exact_duplicate": exact_duplicate,
    "near_duplicate": near_duplicate,
    "contamination": contamination,
    "checker": checker,
    "judge": judge,
    "agreement": agreement,
    "best_of": best_of,
    "balance": balance,
    "perplexity": perplexity,
}
"""Functions by the type of a filter. Each takes the filter's settings, the candidates that are
left, and the evidence besides. It returns the places of the candidates that it drops, each with a
detail for people."""
VERSIONS = (
    dict.fromkeys(FILTERS, 2)
    | dict.fromkeys(("exact_duplicate", "contamination", "checker", "agreement", "best_of"), 3)
    | {"near_duplicate": 4}
)
"""Version of each filter's decisions, raised when the filter decides differently."""
EXAMPLES_SHOWN = 5
EMPTIED_SHOWN = 3

FilterCounts = dict[str, Any]
"""Counts of one filter, as stage records and the report hold them."""


def run_filters(
    layout: Layout,
    digest: str,
    rules: Sequence[Filter],
    candidates: Sequence[Candidate],
    evidence: Evidence,
) -> tuple[list[Candidate], list[FilterCounts]]:
    """Runs filters one after another; each looks at the candidates that it does not spare.

    Args:
        digest: digest of the candidates' dataset and of the filters; names the folder of dropped
            answers.

    Returns:
        The candidates that are left, in their order, and for each filter its name, the numbers
        `seen` and `dropped`, the latter also by domain, and some examples of details.

    Raises:
        FilterError: a filter drops all sequences of a domain in a split, or finds too little; the
            message says what each filter dropped.
        ConfigError: a filter cannot be honoured.
    """
    left, done = list(candidates), []
    for position, rule in enumerate(rules):
        seen = [
            i
            for i, candidate in enumerate(left)
            if not set(rule.spares) & set(candidate.entry.authors)
        ]
        try:
            details = FILTERS[rule.type](rule, [left[i] for i in seen], evidence)
        except FilterError as error:
            raise FilterError(
                f"{error}; dropped so far: {filter_summary(done) or 'nothing'}; all answers are "
                "kept, and no teacher is asked again"
            ) from error
        dropped = {seen[i]: detail for i, detail in details.items()}
        path = layout.rejected(digest, f"{position}-{rule.type}")
        if dropped:
            write_rejected(path, [_rejected(left[i], rule, why) for i, why in dropped.items()])
            logger.info("filter %s dropped %d answers, see %s", rule.type, len(dropped), path)
        done.append(_counts(rule, len(seen), [left[i].entry for i in dropped], dropped.values()))
        gone = [(left[i].entry, detail) for i, detail in dropped.items()]
        left = [candidate for i, candidate in enumerate(left) if i not in dropped]
        _check_left(gone, left, rule, done, path)
    return left, done


def filter_identity(
    rule: Filter,
    checker_name: str | None,
    judge_identity: Mapping[str, Any] | None = None,
    judge_room: int | None = None,
    wording: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything that decides which answers a filter keeps, as a JSON value.

    It holds the contents of files in place of their paths.

    Args:
        judge_identity: identity of a judge's grades, for a filter of type `judge`.
        judge_room: tokens that the judge's engine holds; longer answers get no grade.
        wording: pieces of the templates of the prompts, for a filter of type `contamination`.

    Raises:
        ConfigError: the checker does not exist.
        StorageError: an evaluation file does not exist.
    """
    identity = rule.model_dump(mode="json") | {"version": VERSIONS[rule.type]}
    if isinstance(rule, CheckerFilter):
        assert checker_name is not None, "the config refuses the filter without a checker"
        identity["checker"] = checker_identity(checker_name)
    if isinstance(rule, Contamination):
        identity["files"] = [
            [file.fields, digest_bytes(*map(read_bytes, _files_of(file.path)))]
            for file in rule.files
        ]
        identity |= {"wording": list(wording)} if wording else {}
    if judge_identity is not None:
        identity |= {"rubric": judge_identity, "room": judge_room}
    return identity


def filter_summary(counts: Sequence[FilterCounts]) -> str:
    """Numbers of dropped and seen answers of each filter, for people."""
    return ", ".join(f"{each['filter']} {each['dropped']} of {each['seen']}" for each in counts)


def _files_of(path: str) -> list[str]:
    """Path of a file itself, or paths of all files in a dataset folder."""
    return [join(path, name) for name in files_below(path)] if is_folder(path) else [path]


def _rejected(candidate: Candidate, rule: Filter, detail: str) -> Rejected:
    entry = candidate.entry
    return Rejected(
        reason=rule.type,
        detail=detail,
        prompt_id=entry.prompt_id,
        domain=entry.domain,
        split=entry.split,
        authors=entry.authors,
        prompt=candidate.prompt,
        answer=candidate.answer,
        sequence_id=entry.sequence_id,
    )


def _counts(
    rule: Filter, num_seen: int, dropped: Sequence[DatasetEntry], details: Iterable[str]
) -> FilterCounts:
    return {
        "filter": rule.type,
        "seen": num_seen,
        "dropped": len(dropped),
        "dropped_by_domain": dict(Counter(entry.domain for entry in dropped)),
        "examples": list(dict.fromkeys(details))[:EXAMPLES_SHOWN],
    }


def _check_left(
    gone: Sequence[tuple[DatasetEntry, str]],
    left: Sequence[Candidate],
    rule: Filter,
    done: list[FilterCounts],
    path: str,
) -> None:
    """Refuses to go on if a domain of a split that had candidates has none left.

    Args:
        gone: entries that the filter drops, each with its detail.
    """
    details: dict[tuple[str, str], list[str]] = {}
    for entry, detail in gone:
        details.setdefault((entry.split, entry.domain), []).append(detail)
    remaining = {(candidate.entry.split, candidate.entry.domain) for candidate in left}
    emptied = [
        f"of the {split} split in domain {domain!r} ({len(details[split, domain])} dropped, for "
        f"example {json.dumps(details[split, domain][0], ensure_ascii=False)})"
        for split, domain in sorted(details.keys() - remaining)
    ]
    if not emptied:
        return
    more = len(emptied) - EMPTIED_SHOWN
    hint = ""
    if isinstance(rule, Contamination):
        hint = (
            "if that example is an instruction that all prompts share, put it into the source's "
            f"`template`, or hold out at least {FEWEST_SHARING} prompts of the domain; otherwise "
        )
    raise FilterError(
        f"the filter {rule.type} leaves no sequence {', none '.join(emptied[:EMPTIED_SHOWN])}"
        + (f", and none of {more} other domains or splits" if more > 0 else "")
        + f"; dropped so far: {filter_summary(done)}; the dropped answers lie in {path}: {hint}"
        "loosen the filter, remove it, or give other prompts; all answers are kept, and no teacher "
        "is asked again"
    )
