"""The filters of a run: they need text and, behind scoring, cached rows, and make a new dataset."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.cache_index import load_index
from pipeline.checkers import find_checker
from pipeline.config import Config
from pipeline.config_synthesis import Filter, scoring_teacher
from pipeline.datasets import DatasetEntry, read_sequences, write_dataset
from pipeline.filters import run_filters
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout, Layout
from pipeline.prepared import Prepared
from pipeline.prompts import load_prompts
from pipeline.records import Candidate, Evidence
from pipeline.synthesis_index import sample_counts
from teachers.synthesis import student_tokenizer
from teachers.vocabulary import answer_text

Filtered = tuple[list[DatasetEntry], list[dict[str, Any]]]


def filter_answers(
    config: Config, layout: Layout, prepared: Prepared, entries: Sequence[DatasetEntry]
) -> Filtered:
    """The entries that pass the filters before scoring, and what each filter did.

    Raises:
        FilterError: nothing of a split that is needed is left.
    """
    rules = config.synthesis.filters_before_scoring
    digest = digest_json(prepared.filters_before_scoring)
    return _filtered(config, layout, prepared, entries, rules, digest)


def filter_scored(
    config: Config, layout: Layout, prepared: Prepared, entries: Sequence[DatasetEntry]
) -> Filtered:
    """The scored entries that pass the filters that need cached rows and those behind them.

    Raises:
        FilterError: nothing of a split that is needed is left.
    """
    rules = config.synthesis.filters_after_scoring
    digest = digest_json([prepared.filters_after_scoring, prepared.scoring_recipes])
    return _filtered(config, layout, prepared, entries, rules, digest)


def mean_gold_logprobs(cache: CacheLayout, sequence_ids: AbstractSet[str]) -> dict[str, float]:
    """The mean log-probability in nats of each scored sequence's gold tokens.

    Raises:
        StorageError: a shard cannot be read.
    """
    means: dict[str, float] = {}
    for entry in load_index(cache):
        if sequence_ids.isdisjoint(entry.sequence_ids):
            continue
        table = storage.read_table(cache.shard(entry.digest), ["sequence_id", "gold_logprobs"])
        for row in table.to_pylist():
            gold_P = np.frombuffer(row["gold_logprobs"], "<f2").astype(np.float64)
            means.setdefault(row["sequence_id"], float(gold_P.mean()))
    return means


def _filtered(
    config: Config,
    layout: Layout,
    prepared: Prepared,
    entries: Sequence[DatasetEntry],
    rules: Sequence[Filter],
    digest: str,
) -> Filtered:
    if not rules:
        return list(entries), []
    prompts = {prompt.prompt_id: prompt for prompt in load_prompts(layout, prepared.prompts)}
    samples = sample_counts(layout, prepared.synthesis_digests.values())
    tokenizer, _ = student_tokenizer(config.student)
    candidates: dict[int, Candidate] = {}
    by_shard: dict[str, list[int]] = {}
    for i, entry in enumerate(entries):
        by_shard.setdefault(entry.shard, []).append(i)
    for shard, places in by_shard.items():
        found = {s.sequence_id: s for s in read_sequences(storage.join(layout.root, shard))}
        for i in places:
            entry, prompt = entries[i], prompts[entries[i].prompt_id]
            gold_ids = found[entry.sequence_id].gold_ids
            candidates[i] = Candidate(
                entry=entry,
                prompt=prompt.words,
                answer=answer_text(tokenizer, gold_ids.tolist()),
                answer_ids=gold_ids,
                reference=prompt.reference,
                samples=sum(samples.get((g, entry.sequence_id), 1) for g in entry.generators),
            )
    caches, ids = prepared.caches(layout), {entry.sequence_id for entry in entries}
    teachers = {teacher for rule in rules if (teacher := scoring_teacher(rule)) is not None}
    checker = config.prompts.checker
    evidence = Evidence(
        checker=None if checker is None else find_checker(checker),
        holdout_prompts={
            f"hold-out prompt {p.prompt_id}": p.words
            for p in prompts.values()
            if p.split == "holdout"
        },
        gold_logprobs={name: mean_gold_logprobs(caches[name], ids) for name in sorted(teachers)},
    )
    kept, counts = run_filters(
        layout,
        digest_json([write_dataset(layout, entries), digest]),
        rules,
        [candidates[i] for i in range(len(entries))],
        evidence,
    )
    return [candidate.entry for candidate in kept], counts
