"""`polystill cache regenerate`: scores stale, missing or corrupt rows.

Outside of a job it first looks for something to do, and starts no cluster if there is nothing. Then
it submits itself as a Ray job, which comes here again with `--inside-job` and does the work.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from jobs.caches.run_caches import RunCaches, open_caches
from jobs.cluster.connection import connect
from jobs.cluster.stage_jobs import cluster, is_visible, submit_and_follow
from jobs.stages.entry import join_cluster, run_stage
from jobs.stages.score import fill_caches, new_shards, scored_summary
from pipeline import storage
from pipeline.cache.generations import (
    begin_generation,
    current_generation,
    end_generation,
    is_regenerated,
)
from pipeline.cache.index import missing_sequences, quarantined
from pipeline.cache.kinds import entries_of, teacher_of
from pipeline.cache.manifest import is_published, publish
from pipeline.cache_care.regeneration import (
    Damage,
    check_complete,
    find_damage,
    matching,
    retry_quarantined,
    sequences_to_score,
    set_aside,
    take_over,
)
from pipeline.config.load import check_shared_paths
from pipeline.config.run import Config
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout
from pipeline.records import DatasetEntry
from pipeline.run.identities import provenance_of
from pipeline.sequences import Dataset
from teachers.pool.contracts import PoolReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RegenerationRequest:
    """The options of one regeneration.

    Attributes:
        teacher: name of a teacher or of a cache; None means all.
        where: conditions that a sequence must meet; see `pipeline/cache_care/regeneration.py`.
        force: whether sequences that have a row are scored again, too.
    """

    teacher: str | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    force: bool = False

    @property
    def arguments(self) -> list[str]:
        """The options as words of the command line."""
        words = [] if self.teacher is None else ["--teacher", self.teacher]
        for key, value in self.where.items():
            words += ["--where", f"{key}={value}"]
        return [*words, "--force"] if self.force else words


@dataclass(frozen=True)
class CacheWork:
    """Work that is to be done in one cache.

    Attributes:
        cache: folder of the cache, in the generation that is written.
        entries: sequences that shall have a row in `cache`.
        source: generation that `cache` follows; None if `cache` is mended in place.
    """

    cache: CacheLayout
    entries: list[DatasetEntry]
    source: CacheLayout | None = None


def regenerate(config: Config, address: str | None, request: RegenerationRequest) -> None:
    """Scores stale, missing or corrupt rows in a Ray job; if there are none, starts no cluster.

    Raises:
        DistillationError: the run has no sequences yet, the request names what does not exist, or
            the job failed.
    """
    if is_visible(config, address):
        caches = open_caches(config)
        lines = _open_work(caches, request)
        for line in lines:
            logger.info(line)
        if not lines and caches.is_current:
            logger.info(
                "nothing to do: every sequence asked for has a row in a shard that can be read"
            )
            return
    command = ["cache", "regenerate", "--inside-job", *request.arguments]
    submit_job(config, address, "regenerate", command)


def regenerate_inside_job(config: Config, request: RegenerationRequest) -> None:
    """Does the work of `regenerate`, in its job.

    Raises:
        CacheError: another forced regeneration is unfinished, or the new generation is not whole.
        TeacherError: an engine cannot run.
    """
    caches = prepared_caches(config)
    work = {name: _begin(caches, name, request) for name in caches.chosen(request.teacher)}
    join_cluster()
    reports = fill_caches(
        caches.run, {name: (w.cache, Dataset.of(w.entries)) for name, w in work.items()}
    )
    for name, of_cache in work.items():
        report = reports[teacher_of(name)]
        _publish(caches, name, of_cache, report)
        logger.info(scored_summary(name, report, len(quarantined(of_cache.cache))))
        logger.info(_who_uses(caches, name, of_cache))
    if request.force:
        # Ended only when all are published: after an interruption the same command must know
        # which generations are complete.
        for of_cache in work.values():
            end_generation(of_cache.cache)


def submit_job(config: Config, address: str | None, name: str, command: list[str]) -> None:
    """Runs a cache command as a job, on a cluster or on a local Ray head.

    Args:
        name: beginning of the job's name.
        command: words of the command line, without the config.

    Raises:
        ClusterError: the job failed.
    """
    if address is not None:
        check_shared_paths(config)
    with cluster(config, address) as url:
        # Equal commands share a name, so that the second one attaches to the first one's job.
        job = f"{name}-{digest_json(command)[:8]}"
        submit_and_follow(connect(url), address, config, job, command)


def prepared_caches(config: Config) -> RunCaches:
    """Opens the caches of a run, which is prepared again first if its config has changed."""
    caches = open_caches(config)
    if caches.is_current:
        return caches
    run_stage("prepare", caches.run.config)
    return open_caches(config)


def _open_work(caches: RunCaches, request: RegenerationRequest) -> list[str]:
    """One line for each cache in which there is something to do."""
    chosen = matching(caches.entries, request.where)
    lines = []
    for name in caches.chosen(request.teacher):
        cache, own = caches.layouts[name], entries_of(name, chosen)
        damage = find_damage(cache, caches.fingerprint(name))
        parts = [f"{len(damage.corrupt)} corrupt shards"] if damage.corrupt else []
        parts += [f"{len(damage.gone)} shards that are gone"] if damage.gone else []
        parts += ["an index that is wrong"] if damage.index else []
        if request.force and own:
            parts.append(f"{len(own)} sequences to score anew")
        elif not damage.corrupt and (missing := missing_sequences(own, cache)):
            parts.append(f"{len(missing)} sequences without a row")
        elif not parts and not is_published(cache):
            parts.append("an index or a manifest to be written")
        lines += [f"{name}: {', '.join(parts)}"] if parts else []
    return lines


def _begin(caches: RunCaches, name: str, request: RegenerationRequest) -> CacheWork:
    """Sets corrupt shards aside and, with `force`, begins or continues the next generation."""
    chosen = entries_of(name, matching(caches.entries, request.where))
    cache = caches.layouts[name]
    if request.force:
        cache = CacheLayout(cache.folder, current_generation(cache.folder))
    damage = find_damage(cache, caches.fingerprint(name))
    _mend(cache, damage, name)
    entries = sequences_to_score(caches.run.layout, cache, chosen, damage.lost)
    is_new = not storage.list_files(cache.shards_folder, ".parquet")
    if not request.force or not chosen or is_new:
        return CacheWork(cache, entries)
    purpose = {"dataset": caches.dataset, "where": dict(request.where)}
    if is_regenerated(cache, purpose):
        logger.info(
            f"{name}: generation {cache.generation} was complete when this command was "
            "interrupted, so nothing is scored now; run the command once more to score it anew"
        )
        return CacheWork(cache, entries)
    if not storage.exists(cache.manifest):
        _publish(caches, name, CacheWork(cache, []), PoolReport())
    target = begin_generation(cache.folder, purpose)
    anew = {entry.sequence_id for entry in chosen}
    retry_quarantined(target, anew)
    taken = take_over(cache, target, anew, caches.fingerprint(name))
    logger.info(
        f"{name}: generation {target.generation} takes over {taken} shards of generation "
        f"{cache.generation}"
    )
    others = [entry for entry in entries if entry.sequence_id not in anew]
    return CacheWork(target, [*chosen, *others], source=cache)


def _publish(caches: RunCaches, name: str, work: CacheWork, report: PoolReport) -> None:
    """Writes index and manifest if rows were added or one of the two is missing.

    The manifest of a new generation makes it the current one, so the generation must be whole.
    """
    run, cache = caches.run, work.cache
    written = new_shards(report, name)
    if work.source is not None:
        check_complete(work.source, cache)
    if work.source is not None or written or not is_published(cache):
        identity = run.prepared.all_cache_identities[name]
        publish(cache, identity, provenance_of(run.config, name), written)


def _mend(cache: CacheLayout, damage: Damage, name: str) -> None:
    for digest, reason in damage.corrupt.items():
        logger.info(f"{name}: shard {digest} is corrupt and set aside in {cache.aside}: {reason}")
    if damage.index is not None:
        logger.info(f"{name}: the index {cache.index} is made anew: {damage.index}")
    for digest in sorted(damage.gone):
        logger.info(f"{name}: shard {digest} is gone")
    set_aside(cache, damage)


def _who_uses(caches: RunCaches, name: str, work: CacheWork) -> str:
    run = caches.run
    used, written = caches.layouts[name].generation, work.cache.generation
    if used == written:
        return f"{name}: run {run.config.name} uses generation {written}"
    return (
        f"{name}: generation {written} is the current one, which runs of other names use; run "
        f"{run.config.name} continues to use generation {used}, which it has pinned"
    )
