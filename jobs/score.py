"""The score stage: every teacher's row for every sequence, and the dataset to train on."""

from __future__ import annotations

import logging
import time
from typing import Any

from jobs.engines import engine_cost, pool_job
from jobs.plan import score_key
from pipeline import storage
from pipeline.cache_index import publish, quarantined
from pipeline.config import Config
from pipeline.datasets import DatasetEntry, read_dataset, write_dataset
from pipeline.fingerprint import digest_json
from pipeline.layout import Layout
from pipeline.prepared import Prepared
from pipeline.targets import required_teachers
from teachers.dispatch import PoolReport
from teachers.pool import run_pools
from teachers.scoring import ScoredShard, plan_scoring

logger = logging.getLogger(__name__)


def score(config: Config, layout: Layout, prepared: Prepared, dataset: str) -> dict[str, Any]:
    """Fills the teachers' caches for a dataset.

    Raises:
        TeacherError: an engine cannot run.
    """
    entries = read_dataset(layout, dataset)
    started = time.monotonic()
    reports = run_pools(_pools(config, layout, prepared, entries))
    seconds = time.monotonic() - started
    _publish(config, layout, prepared, reports)
    caches = prepared.caches(layout)
    refused = {name: quarantined(cache) for name, cache in caches.items()}
    covered = [entry for entry in entries if is_covered(config, entry, refused)]
    if len(covered) < len(entries):
        logger.warning(
            "%d sequences are left out of training: every teacher that weighs anything in their "
            "domain has quarantined them",
            len(entries) - len(covered),
        )
    return {
        "key": score_key(config, layout, prepared),
        "dataset": write_dataset(layout, covered),
        "engines": {name: report.engines for name, report in reports.items()},
        "quarantined": {name: len(errors) for name, errors in refused.items()},
        "cost": engine_cost(config, reports, seconds),
        "summary": "; ".join(
            _summary(name, report, len(refused[name])) for name, report in reports.items()
        ),
    }


def is_covered(config: Config, entry: DatasetEntry, refused: dict[str, dict[str, str]]) -> bool:
    """Whether a teacher that weighs anything in the sequence's domain has a row for it."""
    weighing = required_teachers(config.combine, list(config.teachers), entry.domain)
    return any(entry.sequence_id not in refused[name] for name in weighing)


def _pools(config: Config, layout: Layout, prepared: Prepared, entries: list[DatasetEntry]) -> list:
    need = max(entry.num_tokens for entry in entries) + 1
    share_prefixes = len({entry.prompt_id for entry in entries}) < len(entries)
    pools = []
    for name, cache in prepared.caches(layout).items():
        fingerprint = digest_json(prepared.scoring_recipes[name])
        tasks = plan_scoring(layout.root, entries, cache, fingerprint, config.scoring.selection)
        pools.append(
            pool_job(
                config,
                name,
                prepared,
                tasks,
                min_model_len=need,
                num_logprobs=config.scoring.num_logprobs,
                unit="sequences",
                share_prefixes=share_prefixes,
            )
        )
    return pools


def _publish(
    config: Config, layout: Layout, prepared: Prepared, reports: dict[str, PoolReport]
) -> None:
    """Writes index and manifest of every cache that has changed or has none yet."""
    for name, cache in prepared.caches(layout).items():
        engines = reports[name].engines
        if engines or not storage.exists(cache.manifest):
            provenance = {
                "engines": engines,
                "teacher": name,
                "model": config.teachers[name].model,
            }
            publish(cache, prepared.scoring_recipes[name], provenance)


def _summary(name: str, report: PoolReport, num_quarantined: int) -> str:
    done: list[ScoredShard] = report.results
    positions = sum(shard.entry.num_positions for shard in done)
    size = sum(shard.entry.num_bytes for shard in done)
    line = (
        f"{name}: {positions} positions in {len(done)} new shards, "
        f"{size / max(positions, 1):.1f} bytes each"
    )
    if report.engines:
        line += f", captured by {' and '.join(sorted({e['capture'] for e in report.engines}))}"
    if any(engine["prefix_sharing"] for engine in report.engines):
        cached = sum(shard.num_cached_tokens for shard in done)
        tokens = sum(shard.num_tokens for shard in done)
        line += (
            f", prefix sharing spared {cached / max(tokens, 1):.0%} of {tokens} tokens, "
            f"{sum(shard.num_rescored for shard in done)} sequences were scored again"
        )
    return f"{line}, {num_quarantined} sequences quarantined" if num_quarantined else line
