"""Submits stages as Ray jobs: the upload, the attempt to use, and all that is done by job id.

Every stage is a Ray job with an idempotent entry point, so this module never decides whether work
is needed: it attaches to the job of the same run, stage and config that is still going, or submits
the next attempt.
"""

import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import requests
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from jobs.bookkeeping.plan import STAGE_NAMES
from jobs.cluster.connection import cluster_errors
from pipeline.errors import ClusterError, ConfigError

# Code, configs and templates; never results that somebody keeps inside a package's folder.
UPLOADED_SUFFIXES = (".py", ".yaml", ".j2", ".txt")
PACKAGES = ("pipeline", "teachers", "students", "jobs")
# Metadata of our jobs; a run is found by these, since its name may hold the hyphens that separate a
# submission id.
RUN, STAGE, DIGEST = "polystill.run", "polystill.stage", "polystill.digest"
FOLDER = "polystill.folder"
# The stage of a job that submits all others of its run.
DETACHED = "run"


def build_upload(packages_root: Path, config_text: str, folder: Path) -> Path:
    """Stages what a job unpacks: the four packages with their data files, and `config.yaml`.

    Ray names the upload by a hash of relative names and contents, so equal inputs are uploaded
    once.

    Args:
        packages_root: the folder that holds the four packages.
        config_text: content of `config.yaml`.
        folder: where to stage; made here, or empty.

    Returns:
        `folder`.

    Raises:
        ConfigError: a package is missing, or `folder` holds something.
    """
    missing = [name for name in PACKAGES if not (packages_root / name / "__init__.py").is_file()]
    if missing:
        raise ConfigError(
            f"{packages_root} has no package {', '.join(missing)}; an upload needs all of "
            f"{', '.join(PACKAGES)}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ConfigError(f"The staging folder {folder} is not empty.")
    for name in PACKAGES:
        for source in sorted((packages_root / name).rglob("*")):
            relative = source.relative_to(packages_root)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
            if hidden or source.suffix not in UPLOADED_SUFFIXES or not source.is_file():
                continue
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    (folder / "config.yaml").write_text(config_text, encoding="utf-8")
    return folder


def submission_id(run: str, stage: str, digest: str, attempt: int) -> str:
    """Names one attempt: `<run>-<stage>-<digest>-a<attempt>`.

    Raises:
        ConfigError: the id cannot stand in a URL and a file name.
    """
    name = f"{run}-{stage}-{digest}-a{attempt}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise ConfigError(
            f"{name!r} cannot be a job's id: a run's name has letters, digits, '.', '_' and '-' "
            "only, starts with a letter or digit, and the id has at most 200 characters."
        )
    return name


def choose_submission(
    jobs: Iterable[tuple[str, JobStatus]], run: str, stage: str, digest: str
) -> tuple[str, bool]:
    """Picks an id: (the attempt that still goes, True) or (the next attempt, False)."""
    prefix = submission_id(run, stage, digest, 1).removesuffix("1")
    attempts = {
        int(name.removeprefix(prefix)): status
        for name, status in jobs
        if name.startswith(prefix) and name.removeprefix(prefix).isdecimal()
    }
    going = [attempt for attempt, status in attempts.items() if not status.is_terminal()]
    if going:
        return f"{prefix}{max(going)}", True
    return f"{prefix}{max(attempts, default=0) + 1}", False


def submit_stage(
    client: JobSubmissionClient,
    *,
    run: str,
    stage: str,
    digest: str,
    folder: str,
    entrypoint: str,
    working_dir: Path | None,
    env_vars: Mapping[str, str],
    num_cpus: float = 0,
    num_gpus: float = 0,
    custom_resources: Mapping[str, float] | None = None,
) -> str:
    """Submits a stage, or attaches to its job of the same run and digest if that still goes.

    Args:
        folder: of the run; a stage works in it with one config at a time.
        entrypoint: shell command; it runs in the unpacked upload.
        working_dir: the staged upload; None for none.
        env_vars: for the job and all its tasks and actors. Ray expands `$NAME` in the values, and
            whoever can reach the job server can read them.
        num_cpus: reserved for the entry point alone. With all three resources zero it runs on the
            head node.
        num_gpus: likewise.
        custom_resources: likewise.

    Returns:
        The submission id of the job.

    Raises:
        ClusterError: the stage still goes with another config, or the job server refused or cannot
            be reached.
    """
    runtime_env: dict[str, Any] = {"env_vars": dict(env_vars)}
    if working_dir is not None:
        runtime_env["working_dir"] = str(working_dir)
    for _ in range(3):
        jobs = list_jobs(client)
        known = [(job.submission_id or "", job.status) for job in jobs]
        name, going = choose_submission(known, run, stage, digest)
        if going:
            return name
        _refuse_other_configs(jobs, run, stage, folder)
        try:
            return client.submit_job(
                entrypoint=entrypoint,
                submission_id=name,
                runtime_env=runtime_env,
                metadata={RUN: run, STAGE: stage, DIGEST: digest, FOLDER: folder},
                entrypoint_num_cpus=num_cpus,
                entrypoint_num_gpus=num_gpus,
                entrypoint_resources=dict(custom_resources or {}),
            )
        except (RuntimeError, requests.RequestException) as error:
            # Another submitter was quicker: look again and attach to its job.
            if "already exists" not in str(error):
                raise ClusterError(f"The cluster did not take the job {name}: {error}") from error
    raise ClusterError(
        f"The ids of {run}-{stage}-{digest} are all taken: other submitters are quicker. Try again."
    )


def _refuse_other_configs(jobs: Iterable[JobDetails], run: str, stage: str, folder: str) -> None:
    """Two trainings in one folder would write one another's checkpoints.

    Raises:
        ClusterError: the stage still goes in this folder; with another config, or its job would
            have been attached to.
    """
    for job in jobs:
        found = job.metadata or {}
        if job.status.is_terminal() or (found.get(STAGE), found.get(FOLDER)) != (stage, folder):
            continue
        raise ClusterError(
            f"The job {job.submission_id} does {stage} of the run {run} with another config. Wait "
            f"for its end, stop it (polystill stop {job.submission_id} --address …), or give this "
            "run another name."
        )


def list_jobs(client: JobSubmissionClient, run: str | None = None) -> list[JobDetails]:
    """Lists submitted jobs, oldest first: those of one run, or all, whoever submitted them.

    Raises:
        ClusterError: the job server cannot be reached.
    """
    with cluster_errors("The jobs cannot be listed"):
        jobs = [job for job in client.list_jobs() if job.submission_id is not None]
    if run is not None:
        jobs = [job for job in jobs if (job.metadata or {}).get(RUN) == run]
    return sorted(jobs, key=lambda job: job.start_time or 0)


def job_table(client: JobSubmissionClient, run: str | None = None) -> str:
    """Lists jobs for people, oldest first, one a line: id, status, start (UTC) and seconds so far.

    Raises:
        ClusterError: the job server cannot be reached.
    """
    jobs = list_jobs(client, run)
    if not jobs:
        return "no jobs" if run is None else f"no jobs of the run {run}"
    width = max(len(job.submission_id or "") for job in jobs)
    rows = []
    for job in jobs:
        started = (job.start_time or 0) / 1000
        seconds = (job.end_time / 1000 if job.end_time else time.time()) - started
        start = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(started))
        rows.append(f"{job.submission_id:{width}}  {job.status!s:9}  {start}  {seconds:7.0f} s")
    return "\n".join(rows)


def stop_job(client: JobSubmissionClient, submission_id: str, timeout: float = 60.0) -> JobStatus:
    """Stops a job and waits until it has ended; its own last status if it had ended before.

    Ray sends SIGTERM to the entry point and what it started, and SIGKILL after
    RAY_JOB_STOP_WAIT_TIME_S (3) seconds.

    Args:
        timeout: seconds to wait for the end.

    Raises:
        ClusterError: the job is unknown or has not ended in time; a job that still waits for
            resources cannot be stopped before it starts.
    """
    deadline = time.monotonic() + timeout
    with cluster_errors(f"The job {submission_id} cannot be stopped"):
        client.stop_job(submission_id)
        while True:
            status = client.get_job_status(submission_id)
            if status.is_terminal():
                return status
            if time.monotonic() > deadline:
                break
            time.sleep(0.25)
    raise ClusterError(
        f"The job {submission_id} is still {status}, {timeout:.0f} seconds after it was asked to "
        "stop."
    )


def stop_with_stages(
    client: JobSubmissionClient, submission_id: str, timeout: float = 60.0
) -> Iterator[tuple[str, JobStatus]]:
    """Stops a job; with the job of a detached run also that of the stage which it has begun.

    Yields:
        The id and last status of each, as it has ended.

    Raises:
        ClusterError: as in `stop_job`.
    """
    # In this order: else the run would begin its next stage.
    yield submission_id, stop_job(client, submission_id, timeout)
    jobs = list_jobs(client)
    stopped = next((job.metadata or {} for job in jobs if job.submission_id == submission_id), {})
    if stopped.get(STAGE) != DETACHED:
        return
    going = {
        job.submission_id or "": found[STAGE]
        for job in jobs
        if not job.status.is_terminal()
        and (found := job.metadata or {}).get(FOLDER) == stopped[FOLDER]
    }
    if DETACHED in going.values():
        return  # a later attempt, whose stages these are
    for name, stage in going.items():
        if re.sub(r"^round\d+-", "", stage) in STAGE_NAMES:
            yield name, stop_job(client, name, timeout)


def job_logs(client: JobSubmissionClient, submission_id: str) -> str:
    """Returns everything that a job has printed.

    Raises:
        ClusterError: the job is unknown, or the node that holds its log is gone.
    """
    with cluster_errors(f"The log of {submission_id} cannot be read"):
        return client.get_job_logs(submission_id)
