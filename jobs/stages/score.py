"""Stage 3: fills every teacher's caches with rows, and writes the dataset to train on."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from jobs.bookkeeping.stage_records import StageRecord, score_key
from jobs.stages.filter import Filtered, filter_scored
from jobs.stages.teacher_pools import engine_seconds, teacher_work
from pipeline import storage
from pipeline.cache.generations import pin_generations
from pipeline.cache.index import quarantined
from pipeline.cache.kinds import entries_of, holds_hidden_states, teacher_of
from pipeline.cache.manifest import is_published, publish
from pipeline.cache.projection import HiddenStatesRule
from pipeline.combine.learned import learn_weights, with_learned
from pipeline.combine.weights import required_teachers
from pipeline.config.combine import CombineConfig, LearnedWeights
from pipeline.config.losses import sequences_together
from pipeline.config.run import Config
from pipeline.config.scoring import selection_of
from pipeline.config.teachers import TeacherConfig
from pipeline.filters.run import filter_summary
from pipeline.layout import CacheLayout
from pipeline.run.identities import provenance_of
from pipeline.run.prepared_run import Run
from pipeline.sequences import Dataset, read_dataset, write_dataset
from students.data.packing import refuse_long_groups, refuse_long_sequences
from teachers.canary import check_cache_canaries
from teachers.pool.contracts import PoolReport
from teachers.pool.pool import TeacherWork, run_pools
from teachers.preflight.model_layers import text_config
from teachers.tasks.score import CacheOutput, ScoredShard, ScoreTask, plan_scoring

logger = logging.getLogger(__name__)


def score(run: Run, dataset: str) -> StageRecord:
    """Fills the teachers' caches for a dataset.

    Args:
        dataset: digest of the dataset.

    Raises:
        TeacherError: an engine cannot run.
        TrainingError: a sequence is too long to be trained on.
        ConfigError: weights are to be learned, and a domain has no sequence to learn them from.
        FilterError: the filters that need cached rows leave nothing of a split.
    """
    layout, entries = run.layout, read_dataset(run.layout, dataset)
    _check_lengths(run.config, entries)
    caches = run.all_layouts()
    pin_generations(layout, caches.values())
    started = time.monotonic()
    work = {name: (cache, entries_of(name, entries)) for name, cache in caches.items()}
    reports = fill_caches(run, work)
    seconds = Counter(engine_seconds(run.config, reports, time.monotonic() - started))
    for name, cache in caches.items():
        written = new_shards(reports[teacher_of(name)], name)
        if written or not is_published(cache):
            identity = run.prepared.all_cache_identities[name]
            publish(cache, identity, provenance_of(run.config, name), written)
    refused = {name: quarantined(cache) for name, cache in caches.items()}
    covered = _covered(run, dataset, entries, refused)
    filtered = filter_scored(run, covered)
    seconds.update(filtered.engine_seconds)
    summaries = [scored_summary(n, reports[teacher_of(n)], len(refused[n])) for n in caches]
    return StageRecord(
        key=score_key(run),
        dataset=write_dataset(layout, filtered.entries),
        filters=filtered.counts,
        engines={name: report.engines for name, report in reports.items()},
        quarantined={name: len(errors) for name, errors in refused.items()},
        engine_seconds=dict(seconds),
        summary="; ".join(summaries + _dropped(filtered)),
    )


def _covered(
    run: Run,
    dataset: str,
    entries: Dataset,
    refused: Mapping[str, dict[str, str]],
) -> Dataset:
    """Entries that can be trained on; weights that the config wants learned are learned for it.

    Args:
        dataset: digest of the dataset of `entries`.
        refused: quarantined sequences with their errors, by cache name.

    Raises:
        ConfigError: a domain has no sequence to learn its weights from.
    """
    combine, distributions = run.config.combine, run.distribution_layouts()
    if isinstance(combine.weights, LearnedWeights):
        fingerprints = run.prepared.cache_fingerprints
        learned = learn_weights(run.layout, distributions, fingerprints, dataset, entries)
        combine = with_learned(combine, learned)
    of_distributions = {name: refused[name] for name in distributions}
    covered = covered_entries(combine, entries, of_distributions)
    if len(covered) < len(entries):
        logger.warning(
            "%d sequences are left out of training: every teacher that has a weight in their "
            "domain has quarantined them",
            len(entries) - len(covered),
        )
    return covered


def _check_lengths(config: Config, entries: Dataset) -> None:
    """Refuses before scoring the sequences that training would refuse after it."""
    if config.synthesis.filters_after_scoring:
        return  # a filter may still drop the sequence
    used = entries.of_split("train", "holdout")
    training, budget = config.training, config.training.tokens_per_micro_batch
    too_long = used.where(used.num_tokens > budget)
    refuse_long_sequences([(entry.sequence_id, entry.num_tokens) for entry in too_long], budget)
    together = sequences_together(training.losses)
    refuse_long_groups(used.num_tokens, budget, not training.packing, together)


def _dropped(filtered: Filtered) -> list[str]:
    return [f"dropped by filters: {filter_summary(filtered.counts)}"] if filtered.counts else []


def covered_entries(
    combine: CombineConfig, entries: Dataset, refused: Mapping[str, dict[str, str]]
) -> Dataset:
    """The sequences of which a teacher that has a weight in their domain has a row.

    Args:
        refused: sequences whose distributions are quarantined, with their errors, by teacher.
    """
    domains = entries.table["domain"].unique().to_pylist()
    weighing = {name: required_teachers(combine, list(refused), name) for name in domains}
    some = entries.has_id({name for errors in refused.values() for name in errors})
    covered = np.ones(len(entries), dtype=bool)
    for place in np.flatnonzero(some):
        entry = entries[int(place)]
        teachers = weighing[entry.domain]
        covered[place] = any(entry.sequence_id not in refused[teacher] for teacher in teachers)
    without = [name for name, teachers in weighing.items() if not teachers]
    return entries.where(covered & ~entries.has_value("domain", without))


def fill_caches(run: Run, work: Mapping[str, tuple[CacheLayout, Dataset]]) -> dict[str, PoolReport]:
    """Scores the sequences that caches lack; neither index nor manifest is written.

    Args:
        work: folder of a cache and the sequences that it shall hold, by cache name.

    Returns:
        Reports of the pools, by teacher.

    Raises:
        TeacherError: an engine cannot run.
    """
    pools = []
    for teacher in dict.fromkeys(map(teacher_of, work)):
        outputs = [
            (_output(run, name, cache), entries)
            for name, (cache, entries) in work.items()
            if teacher_of(name) == teacher
        ]
        tasks = plan_scoring(run.layout.root, outputs)
        longest = max(longest_sequence(entries) for _, entries in outputs)
        pool = teacher_work(
            run,
            teacher,
            tasks,
            min_model_len=longest + 1,
            num_logprobs=run.config.scoring.num_logprobs,
            hidden_layers=_layers(tasks),
            unit="sequences",
            share_prefixes=any(entries.num_prompts < len(entries) for _, entries in outputs),
        )
        pools.append(_with_checks(pool, run.config, tasks))
    return run_pools(pools)


def _with_checks(pool: TeacherWork, config: Config, tasks: Sequence[ScoreTask]) -> TeacherWork:
    """The work with the comparisons of its engines: with the engines that began the caches, and
    with transformers where a cache begins.

    An endpoint has none here: it is compared with its own first canary.
    """
    teacher = config.teachers[pool.name]
    if not isinstance(teacher, TeacherConfig):
        return pool
    paths = sorted({output.cache.canary for task in tasks for output in task.outputs})
    begins = not all(map(storage.exists, paths))
    return replace(
        pool,
        check_canary=partial(check_cache_canaries, paths, pool.name),
        compare_with_transformers=teacher.compare_with_transformers and begins,
    )


def _output(run: Run, name: str, cache: CacheLayout) -> CacheOutput:
    prepared = run.prepared
    identity = prepared.all_cache_identities[name]
    is_states = holds_hidden_states(name)
    rule = HiddenStatesRule.of_identity(identity) if is_states else selection_of(identity)
    fingerprint = prepared.cache_fingerprints[name]
    size = prepared.position_bytes(name)
    files = run.config.teachers[teacher_of(name)].files
    assert files is not None, "teachers that have a cache exchange token ids"
    num_rows = text_config(files).vocab_size
    return CacheOutput(name, cache, fingerprint, rule, size, prepared.vocabulary_size, num_rows)


def _layers(tasks: Sequence[ScoreTask]) -> tuple[int, ...]:
    """Layers whose hidden states the tasks keep, all by the same rule.

    An engine without any needs no connector.
    """
    rules = (output.rule for task in tasks for output in task.outputs)
    return next((rule.layers for rule in rules if isinstance(rule, HiddenStatesRule)), ())


def new_shards(report: PoolReport, name: str) -> set[str]:
    """Digests of the shards that a teacher's engines have written to one cache.

    Args:
        name: name of the cache.
    """
    return {shard.entries[name].digest for shard in report.results if name in shard.entries}


def longest_sequence(entries: Dataset) -> int:
    """Tokens of the longest sequence."""
    return int(entries.num_tokens.max(initial=1))


def scored_summary(name: str, report: PoolReport, num_quarantined: int) -> str:
    """One line for people about the rows that were scored into one cache."""
    done: list[ScoredShard] = [shard for shard in report.results if name in shard.entries]
    positions = sum(shard.entries[name].num_positions for shard in done)
    size = sum(shard.entries[name].num_bytes for shard in done)
    line = f"{name}: nothing new"
    if done:
        line = (
            f"{name}: {positions} positions in {len(done)} new shards, "
            f"{size / max(positions, 1):.1f} bytes each"
        )
    if report.engines and not holds_hidden_states(name):
        line += f", captured by {' and '.join(sorted({e['capture'] for e in report.engines}))}"
        compared = [e["comparison"] for e in report.engines if "comparison" in e]
        line += "".join(f", {sentence}" for sentence in compared)
    if any(engine["prefix_sharing"] for engine in report.engines):
        cached = sum(shard.num_cached_tokens for shard in done)
        tokens = sum(shard.num_tokens for shard in done)
        line += (
            f", prefix sharing spared {cached / max(tokens, 1):.0%} of {tokens} tokens, "
            f"{sum(shard.num_rescored for shard in done)} sequences were scored again"
        )
    return f"{line}, {num_quarantined} sequences quarantined" if num_quarantined else line
