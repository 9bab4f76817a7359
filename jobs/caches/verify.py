"""`polystill cache verify`: checks every shard and row, and scores some rows again.

Without `--rescore` only storage is read, in this process. Rows are scored again by a Ray job, which
comes here again with `--inside-job`.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence

from jobs.caches.actions import verify
from jobs.caches.regenerate import prepared_caches, submit_job
from jobs.caches.run_caches import RunCaches, open_caches
from jobs.cluster.stage_jobs import is_visible
from jobs.stages.entry import join_cluster
from jobs.stages.score import longest_sequence
from jobs.stages.teacher_pools import teacher_work
from pipeline import storage
from pipeline.cache.index import load_index
from pipeline.cache.kinds import teacher_of
from pipeline.cache_care.verify import CheckedCache
from pipeline.config.run import Config
from pipeline.errors import CacheError
from teachers.pool.contracts import PoolReport
from teachers.pool.pool import run_pools
from teachers.tasks.rescore import SURPRISE, RescoreTask, RowDifference

logger = logging.getLogger(__name__)


def verify_rows(
    config: Config,
    address: str | None,
    teacher: str | None,
    rescore: int,
    seed: int | None,
) -> None:
    """Checks caches; with `rescore` also scores that many rows of each teacher again, in a Ray job.

    Args:
        teacher: name of a teacher or of a cache; None for all.
        rescore: number of rows to score again.
        seed: seed that draws these rows; None means the config's.

    Raises:
        CacheError: something is wrong; every problem was logged before.
    """
    if rescore == 0 and is_visible(config, address):
        _log_checks(verify(open_caches(config), teacher))
        return
    command = ["cache", "verify", "--inside-job", "--rescore", str(rescore)]
    command += [] if teacher is None else ["--teacher", teacher]
    command += [] if seed is None else ["--seed", str(seed)]
    if is_visible(config, address):
        open_caches(config).chosen(teacher)  # refuses an unknown teacher before a job starts
    submit_job(config, address, "verify", command)


def verify_inside_job(config: Config, teacher: str | None, rescore: int, seed: int | None) -> None:
    """Does the work of `verify_rows`, in its job.

    Raises:
        CacheError: something is wrong; every problem was logged before.
        TeacherError: an engine cannot run.
    """
    caches = prepared_caches(config)
    _log_checks(verify(caches, teacher))
    if rescore:
        join_cluster()
        seed = config.seed if seed is None else seed
        names = caches.distributions(teacher)
        tasks = {name: rows_to_rescore(caches, name, rescore, seed) for name in names}
        _log_differences(run_rescoring(caches, tasks))


def run_rescoring(
    caches: RunCaches, tasks: Mapping[str, Sequence[RescoreTask]]
) -> dict[str, PoolReport]:
    """Scores rows again, on engines with the settings of the score stage."""
    need = longest_sequence(caches.entries) + 1
    width = caches.run.config.scoring.num_logprobs
    return run_pools(
        [
            teacher_work(
                caches.run,
                teacher_of(name),
                own_tasks,
                min_model_len=need,
                num_logprobs=width,
                unit="rows",
            )
            for name, own_tasks in tasks.items()
        ]
    )


def rows_to_rescore(caches: RunCaches, name: str, count: int, seed: int) -> list[RescoreTask]:
    """Tasks for rows that the seed draws from the run's sequences, one for each sequence shard."""
    cache = caches.layouts[name]
    scored = {i for entry in load_index(cache) for i in entry.sequence_ids}
    known = [entry for entry in caches.entries if entry.sequence_id in scored]
    drawn = random.Random(seed).sample(known, min(count, len(known)))
    groups: dict[str, list[str]] = {}
    for entry in drawn:
        groups.setdefault(entry.shard, []).append(entry.sequence_id)
    return [
        RescoreTask(cache, storage.join(caches.run.layout.root, shard), tuple(identifiers))
        for shard, identifiers in groups.items()
    ]


def _log_checks(caches: Mapping[str, CheckedCache]) -> None:
    """Logs every problem, and one line for each cache.

    Raises:
        CacheError: there is a problem.
    """
    for name, checked in caches.items():
        for problem in checked.problems:
            logger.info(f"{name}: {problem}")
        logger.info(
            f"{name}: {checked.num_shards} shards, {checked.num_rows} rows checked, "
            f"{checked.num_compared} of them against their tokens: "
            f"{len(checked.problems) or 'no'} problems"
        )
    bad = sum(len(checked.problems) for checked in caches.values())
    if bad:
        raise CacheError(
            f"the caches have {bad} problems, listed above; `polystill cache regenerate CONFIG` "
            "sets corrupt shards aside and scores their sequences again; with --force and --where "
            "it also scores again rows that were written wrongly"
        )


def _log_differences(reports: Mapping[str, PoolReport]) -> None:
    """Logs mean and largest differences, and every row beyond the tolerance.

    Raises:
        CacheError: a row is beyond the tolerance, or could not be scored again.
    """
    bad = 0
    for name, report in reports.items():
        rows: list[RowDifference] = [row for result in report.results for row in result]
        for label, error in report.quarantined:
            logger.info(f"{name}: {label}: {error}")
        bad += len(report.quarantined)
        if not rows:
            logger.info(f"{name}: no row scored again")
            continue
        engine = report.engines[0]
        tolerances = [row.tolerance(engine) for row in rows]
        wrong = [row for row, most in zip(rows, tolerances, strict=True) if row.is_beyond(most)]
        for row in wrong:
            logger.info(f"{name}: sequence {row.sequence_id} {_described(row)}")
        positions = max(1, sum(row.num_positions for row in rows))
        entries = max(1, sum(row.num_entries for row in rows))
        logger.info(
            f"{name}: {len(rows)} rows scored again; gold differs by "
            f"{sum(row.gold_sum for row in rows) / positions:.2e} nats in the mean, "
            f"{max(row.gold_max for row in rows):.2e} at most; entries by "
            f"{sum(row.exact_sum for row in rows) / entries:.2e} and "
            f"{max(row.exact_max for row in rows):.2e}; tolerance of a row's means "
            f"{min(tolerances):.2g} to {max(tolerances):.2g} ({engine['dtype']}) and the "
            f"rounding of float16{_bound_of_draws(rows)}: {len(wrong) or 'no'} rows beyond it"
        )
        bad += len(wrong)
    if bad:
        raise CacheError(
            f"{bad} rows, listed above, differ from what their teacher says now; score them again "
            "with `polystill cache regenerate CONFIG --force` and --where"
        )


def _described(row: RowDifference) -> str:
    text = (
        f"differs by {row.gold_max:.4g} nats at a gold token and by {row.exact_max:.4g} at an entry"
    )
    if row.surprise > SURPRISE:
        text += f"; its draws have a probability of e^-{row.surprise:.4g} at most"
    return text


def _bound_of_draws(rows: Sequence[RowDifference]) -> str:
    if not any(row.num_draws for row in rows):
        return ""
    worst = max(row.surprise for row in rows)
    return f"; the least likely draws of a row have e^-{worst:.1f}, bound e^-{SURPRISE:.0f}"
