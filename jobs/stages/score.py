"""The score stage: every teacher's row for every sequence, and the dataset to train on."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from jobs.bookkeeping.stage_records import score_key
from jobs.stages.filter import Filtered, filter_scored
from jobs.stages.teacher_pools import engine_seconds, teacher_work
from pipeline.cache.generations import pin_generations
from pipeline.cache.index import quarantined
from pipeline.cache.manifest import is_published, publish
from pipeline.cache.projection import HiddenStatesRule, holds_hidden_states, teacher_of
from pipeline.combine.learned import learn_weights, with_learned
from pipeline.combine.weights import required_teachers
from pipeline.config.combine import CombineConfig, LearnedWeights
from pipeline.config.losses import sequences_together
from pipeline.config.run import Config
from pipeline.config.teachers import TeacherConfig
from pipeline.filters.run import summary
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout, Layout
from pipeline.records import DatasetEntry
from pipeline.run.identities import provenance_of
from pipeline.run.preparation import Prepared
from pipeline.sequences import read_dataset, write_dataset
from students.data.packing import refuse_long_groups, refuse_long_sequences
from teachers.canary import hold_to_cache
from teachers.pool.dispatch import PoolReport
from teachers.pool.pool import run_pools
from teachers.protocol import Canary
from teachers.tasks.score import Output, ScoredShard, ScoringTask, plan_scoring

logger = logging.getLogger(__name__)


def score(config: Config, layout: Layout, prepared: Prepared, dataset: str) -> dict[str, Any]:
    """Fills the teachers' caches for a dataset.

    Raises:
        TeacherError: an engine cannot run.
        TrainingError: a sequence is too long to be trained on.
        ConfigError: weights are to be learned, and a domain has nothing to learn them from.
        FilterError: the filters that need cached rows leave nothing of a split.
    """
    entries = read_dataset(layout, dataset)
    _check_lengths(config, entries)
    caches = prepared.caches(layout)
    pin_generations(layout, caches.values())
    started = time.monotonic()
    work = {name: (cache, entries) for name, cache in caches.items()}
    reports = fill_caches(config, layout, prepared, work)
    seconds = time.monotonic() - started
    for name, cache in caches.items():
        report = reports[teacher_of(name)]
        written = new_shards(report, name)
        if written or not is_published(cache):
            recipe = prepared.scoring_recipes[name]
            publish(cache, recipe, provenance_of(config, name), written)
    refused = {name: quarantined(cache) for name, cache in caches.items()}
    combine = config.combine
    if isinstance(combine.weights, LearnedWeights):
        fingerprints = {name: digest_json(r) for name, r in prepared.scoring_recipes.items()}
        learned = learn_weights(
            layout, prepared.distributions(layout), fingerprints, dataset, entries
        )
        combine = with_learned(combine, learned)
    of_distributions = {name: refused[name] for name in prepared.distributions(layout)}
    covered = [entry for entry in entries if is_covered(combine, entry, of_distributions)]
    if len(covered) < len(entries):
        logger.warning(
            "%d sequences are left out of training: every teacher that weighs anything in their "
            "domain has quarantined them",
            len(entries) - len(covered),
        )
    took = Counter(engine_seconds(config, reports, seconds))
    filtered = filter_scored(config, layout, prepared, covered)
    took.update(filtered.engine_seconds)
    told = [scored_summary(n, reports[teacher_of(n)], len(refused[n])) for n in caches]
    return {
        "key": score_key(config, layout, prepared),
        "dataset": write_dataset(layout, filtered.entries),
        "filters": filtered.counts,
        "engines": {name: report.engines for name, report in reports.items()},
        "quarantined": {name: len(errors) for name, errors in refused.items()},
        "engine_seconds": dict(took),
        "summary": "; ".join(told + _dropped(filtered)),
    }


def _check_lengths(config: Config, entries: Sequence[DatasetEntry]) -> None:
    """Refuses here what training would refuse once everything is scored."""
    if config.synthesis.filters_after_scoring:
        return  # one of them may drop it
    used = [(e.sequence_id, e.num_tokens) for e in entries if e.split in ("train", "holdout")]
    training, budget = config.training, config.training.tokens_per_micro_batch
    refuse_long_sequences(used, budget)
    together = sequences_together(training.losses)
    refuse_long_groups([length for _, length in used], budget, not training.packing, together)


def _dropped(filtered: Filtered) -> list[str]:
    return [f"dropped: {summary(filtered.counts)}"] if filtered.counts else []


def is_covered(
    combine: CombineConfig, entry: DatasetEntry, refused: dict[str, dict[str, str]]
) -> bool:
    """Whether a teacher that weighs anything in the sequence's domain has a row for it.

    Args:
        refused: by teacher, the sequences whose distributions it has quarantined.
    """
    weighing = required_teachers(combine, list(refused), entry.domain)
    return any(entry.sequence_id not in refused[name] for name in weighing)


def fill_caches(
    config: Config,
    layout: Layout,
    prepared: Prepared,
    work: Mapping[str, tuple[CacheLayout, Sequence[DatasetEntry]]],
) -> dict[str, PoolReport]:
    """Scores what the caches lack; neither index nor manifest is written.

    Args:
        work: by name of a cache, where it lies and the sequences that are to be in it.

    Returns:
        The reports by teacher.

    Raises:
        TeacherError: an engine cannot run.
    """
    pools = []
    for teacher in dict.fromkeys(map(teacher_of, work)):
        outputs = [
            (_output(config, prepared, name, cache), entries)
            for name, (cache, entries) in work.items()
            if teacher_of(name) == teacher
        ]
        tasks = plan_scoring(layout.root, outputs)
        entries = [entry for _, members in outputs for entry in members]
        prompts_of = {entry.sequence_id: entry.prompt_id for entry in entries}
        pool = teacher_work(
            config,
            teacher,
            prepared,
            tasks,
            min_model_len=longest_sequence(entries) + 1,
            num_logprobs=config.scoring.num_logprobs,
            hidden_layers=_layers(tasks),
            unit="sequences",
            share_prefixes=len(set(prompts_of.values())) < len(prompts_of),
        )
        pools.append(replace(pool, check_canary=_check_canary(config, teacher, tasks)))
    return run_pools(pools)


def _check_canary(
    config: Config, teacher: str, tasks: Sequence[ScoringTask]
) -> Callable[[Canary], None] | None:
    """Holds engines to those that began the caches; an endpoint is held to its own identity."""
    if not isinstance(config.teachers[teacher], TeacherConfig):
        return None
    filled = {output.cache.canary for task in tasks for output in task.outputs}
    return partial(hold_to_cache, sorted(filled), teacher)


def _output(config: Config, prepared: Prepared, name: str, cache: CacheLayout) -> Output:
    recipe = prepared.scoring_recipes[name]
    rule = (
        HiddenStatesRule.of_identity(recipe)
        if holds_hidden_states(name)
        else config.scoring.selection
    )
    return Output(name, cache, digest_json(recipe), rule, prepared.position_bytes(name))


def _layers(tasks: Sequence[ScoringTask]) -> tuple[int, ...]:
    """The layers that the tasks' outputs keep, all of the same rule; an engine without any needs
    no connector.
    """
    rules = (output.rule for task in tasks for output in task.outputs)
    return next((rule.layers for rule in rules if isinstance(rule, HiddenStatesRule)), ())


def new_shards(report: PoolReport, name: str) -> set[str]:
    """Digests of the shards that the teacher's engines have written to the cache of that name."""
    return {shard.entries[name].digest for shard in report.results if name in shard.entries}


def longest_sequence(entries: Sequence[DatasetEntry]) -> int:
    """Tokens of the longest sequence."""
    return max((entry.num_tokens for entry in entries), default=1)


def scored_summary(name: str, report: PoolReport, num_quarantined: int) -> str:
    """What was scored, for people."""
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
    if any(engine["prefix_sharing"] for engine in report.engines):
        cached = sum(shard.num_cached_tokens for shard in done)
        tokens = sum(shard.num_tokens for shard in done)
        line += (
            f", prefix sharing spared {cached / max(tokens, 1):.0%} of {tokens} tokens, "
            f"{sum(shard.num_rescored for shard in done)} sequences were scored again"
        )
    return f"{line}, {num_quarantined} sequences quarantined" if num_quarantined else line
