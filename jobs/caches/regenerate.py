"""`polystill cache regenerate`: scores what is stale, missing or corrupt.

Outside of a job it first looks whether there is anything to do and starts no cluster if not; then
it submits itself as a Ray job, which comes here again with `--inside-job` and does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from jobs.caches.actions import RunCaches, open_run
from jobs.cluster.connection import connect
from jobs.cluster.stage_jobs import cluster, is_visible, submit_and_follow
from jobs.stages.entry import join_cluster, log_our_lines, run_stage
from jobs.stages.score import fill_caches, new_shards, scored_summary
from pipeline import storage
from pipeline.cache.generations import (
    begin_generation,
    current_generation,
    end_generation,
    is_regenerated,
)
from pipeline.cache.index import missing_sequences, quarantined
from pipeline.cache.manifest import is_published, publish
from pipeline.cache.projection import teacher_of
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
from teachers.pool.dispatch import PoolReport

Say = Callable[[str], object]


@dataclass(frozen=True)
class Request:
    """What a regeneration is asked for.

    Attributes:
        teacher: None means all.
        where: conditions that a sequence must meet; see `pipeline/cache_care/regeneration.py`.
        force: score anew what has a row as well.
    """

    teacher: str | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    force: bool = False

    @property
    def arguments(self) -> list[str]:
        """As words of the command line."""
        words = [] if self.teacher is None else ["--teacher", self.teacher]
        for key, value in self.where.items():
            words += ["--where", f"{key}={value}"]
        return [*words, "--force"] if self.force else words


@dataclass(frozen=True)
class Work:
    """What there is to do in one cache.

    Attributes:
        entries: sequences that are to have a row in `cache`.
        source: generation that `cache` follows; None where it is mended in place.
    """

    cache: CacheLayout
    entries: list[DatasetEntry]
    source: CacheLayout | None = None


def regenerate(config: Config, address: str | None, request: Request, say: Say) -> None:
    """Scores what is stale, missing or corrupt as a Ray job; without any of it starts no cluster.

    Raises:
        DistillationError: the run has no sequences yet, the request names what does not exist, or
            the job failed.
    """
    if is_visible(config, address):
        run = open_run(config)
        lines = _open_work(run, request)
        for line in lines:
            say(line)
        if not lines and run.is_current:
            say("nothing to do: every sequence asked for has a row in a shard that can be read")
            return
    command = ["cache", "regenerate", "--inside-job", *request.arguments]
    submit_job(config, address, "regenerate", command, say)


def regenerate_inside_job(config: Config, request: Request, say: Say) -> None:
    """What the job of `regenerate` does.

    Raises:
        CacheError: another forced regeneration is unfinished, or the new generation is not whole.
        TeacherError: an engine cannot run.
    """
    log_our_lines()
    run = prepared_run(config)
    work = {name: _begin(run, name, request, say) for name in run.chosen(request.teacher)}
    join_cluster()
    asked = {name: (each.cache, each.entries) for name, each in work.items()}
    reports = fill_caches(config, run.layout, run.prepared, asked)
    for name, each in work.items():
        report = reports[teacher_of(name)]
        _publish(run, name, each, report)
        say(scored_summary(name, report, len(quarantined(each.cache))))
        say(_who_uses(run, name, each))
    if request.force:  # only when all are published: interrupted, the same command knows which are
        for each in work.values():
            end_generation(each.cache)


def submit_job(
    config: Config, address: str | None, name: str, command: list[str], say: Say
) -> None:
    """Runs a cache command as a job, on a cluster or on a head of its own.

    Args:
        command: words of our command line, without the config.

    Raises:
        ClusterError: the job failed.
    """
    if address is not None:
        check_shared_paths(config)
    with cluster(config, address) as url:
        # Equal commands share a name, so that a running one is attached to.
        job = f"{name}-{digest_json(command)[:8]}"
        submit_and_follow(connect(url), address, config, job, command, say)


def prepared_run(config: Config) -> RunCaches:
    """A run as its config is now: prepared anew, where that has changed."""
    run = open_run(config)
    if run.is_current:
        return run
    run_stage("prepare", run.config)
    return open_run(config)


def _open_work(run: RunCaches, request: Request) -> list[str]:
    """One line for each cache in which there is something to do."""
    chosen = matching(run.entries, request.where)
    lines = []
    for name in run.chosen(request.teacher):
        cache = run.caches[name]
        damage = find_damage(cache, run.fingerprint(name))
        parts = [f"{len(damage.corrupt)} corrupt shards"] if damage.corrupt else []
        parts += [f"{len(damage.gone)} shards that are gone"] if damage.gone else []
        parts += ["an index that is wrong"] if damage.index else []
        if request.force:
            parts.append(f"{len(chosen)} sequences to score anew")
        elif not damage.corrupt and (missing := missing_sequences(chosen, cache)):
            parts.append(f"{len(missing)} sequences without a row")
        elif not parts and not is_published(cache):
            parts.append("an index or a manifest to be written")
        lines += [f"{name}: {', '.join(parts)}"] if parts else []
    return lines


def _begin(run: RunCaches, name: str, request: Request, say: Say) -> Work:
    """Sets corrupt shards aside and, by force, begins the next generation or goes on with it."""
    chosen, cache = matching(run.entries, request.where), run.caches[name]
    if request.force:
        cache = CacheLayout(cache.folder, current_generation(cache.folder))
    damage = find_damage(cache, run.fingerprint(name))
    _mend(cache, damage, name, say)
    entries = sequences_to_score(run.layout, cache, chosen, damage.lost)
    if not request.force or not storage.list_files(cache.shards_folder, ".parquet"):
        return Work(cache, entries)
    asked = {"dataset": run.dataset, "where": dict(request.where)}
    if is_regenerated(cache, asked):
        say(
            f"{name}: generation {cache.generation} was complete when this command was "
            "interrupted; the command after this one scores anew again"
        )
        return Work(cache, entries)
    if not storage.exists(cache.manifest):
        _publish(run, name, Work(cache, []), PoolReport())
    target = begin_generation(cache.folder, asked)
    anew = {entry.sequence_id for entry in chosen}
    retry_quarantined(target, anew)
    taken = take_over(cache, target, anew, run.fingerprint(name))
    say(
        f"{name}: generation {target.generation} takes over {taken} shards of generation "
        f"{cache.generation}"
    )
    others = [entry for entry in entries if entry.sequence_id not in anew]
    return Work(target, [*chosen, *others], source=cache)


def _publish(run: RunCaches, name: str, work: Work, report: PoolReport) -> None:
    """Writes index and manifest where rows have come or an index is gone; moves the manifest to a
    new generation that is whole.
    """
    cache, recipe = work.cache, run.prepared.scoring_recipes[name]
    written = new_shards(report, name)
    if work.source is not None:
        check_complete(work.source, cache)
    if work.source is not None or written or not is_published(cache):
        publish(cache, recipe, provenance_of(run.config, name), written)


def _mend(cache: CacheLayout, damage: Damage, name: str, say: Say) -> None:
    for digest, reason in damage.corrupt.items():
        say(f"{name}: shard {digest} is corrupt and set aside in {cache.aside}: {reason}")
    if damage.index is not None:
        say(f"{name}: {cache.index} is made anew: {damage.index}")
    for digest in sorted(damage.gone):
        say(f"{name}: shard {digest} is gone")
    set_aside(cache, damage)


def _who_uses(run: RunCaches, name: str, work: Work) -> str:
    used, written = run.caches[name].generation, work.cache.generation
    if used == written:
        return f"{name}: run {run.config.name} uses generation {written}"
    return (
        f"{name}: generation {written} is the current one; run {run.config.name} goes on with "
        f"generation {used}, which it has pinned, and runs of other names use generation {written}"
    )
