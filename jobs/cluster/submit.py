"""Submission of Ray jobs: the number of the attempt, and the list, the stop and the logs of jobs.

The entry point of every stage is idempotent, so this module never decides whether work is needed.
If a job of the same run, stage and config has not ended, it attaches to it; otherwise it submits
the next attempt.
"""

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import requests
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from jobs.bookkeeping.plan import STAGE_NAMES
from jobs.cluster.connection import cluster_errors
from pipeline.errors import ClusterError, ConfigError

# Metadata keys of our jobs. A run is found by its metadata, since its name may hold the hyphens
# that separate the parts of a submission id.
RUN, STAGE, DIGEST = "polystill.run", "polystill.stage", "polystill.digest"
FOLDER = "polystill.folder"
# Stage name of a detached run: the job that submits all other jobs of its run.
DETACHED = "run"


def submission_id(run: str, stage: str, digest: str, attempt: int) -> str:
    """Submission id of one attempt: `<run>-<stage>-<digest>-a<attempt>`.

    Raises:
        ConfigError: the id cannot stand in a URL and a file name.
    """
    name = f"{run}-{stage}-{digest}-a{attempt}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", name):
        raise ConfigError(
            f"{name!r} cannot be a job's id: give the run a name of letters, digits, '.', '_' and "
            "'-' that starts with a letter or digit; the id has at most 200 characters"
        )
    return name


def choose_submission(
    jobs: Iterable[tuple[str, JobStatus]], run: str, stage: str, digest: str
) -> tuple[str, bool]:
    """Chooses an attempt.

    Returns:
        Submission id of the attempt, and whether its job has not ended yet. If every job has ended,
        the id is that of the next attempt.
    """
    prefix = submission_id(run, stage, digest, 1).removesuffix("1")
    attempts = {
        int(name.removeprefix(prefix)): status
        for name, status in jobs
        if name.startswith(prefix) and name.removeprefix(prefix).isdecimal()
    }
    alive = [attempt for attempt, status in attempts.items() if not status.is_terminal()]
    if alive:
        return f"{prefix}{max(alive)}", True
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
    """Submits a stage, or attaches to its job of the same run and digest that has not ended.

    Args:
        client: client of the job server.
        run: name of the run.
        stage: name of the stage.
        digest: digest of the config.
        folder: folder of the run, in which a stage works with one config at a time.
        entrypoint: shell command, which runs in the unpacked upload.
        working_dir: folder of the upload; None for none.
        env_vars: environment variables of the job and all its tasks and actors. Ray expands `$NAME`
            in the values, and everybody who can reach the job server can read them.
        num_cpus: CPUs that are reserved for the entry point alone. If all three resources are zero,
            it runs on the head node.
        num_gpus: GPUs that are reserved for the entry point alone.
        custom_resources: custom resources that are reserved for the entry point alone.

    Returns:
        The submission id of the job.

    Raises:
        ClusterError: the stage runs with another config, or the job server has refused the job or
            cannot be reached.
    """
    runtime_env: dict[str, Any] = {"env_vars": dict(env_vars)}
    if working_dir is not None:
        runtime_env["working_dir"] = str(working_dir)
    for _ in range(3):
        jobs = list_jobs(client)
        known = [(job.submission_id or "", job.status) for job in jobs]
        name, is_alive = choose_submission(known, run, stage, digest)
        if is_alive:
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
            # Another submitter was quicker: list the jobs again and attach to its job.
            if "already exists" not in str(error):
                raise ClusterError(f"the cluster did not take the job {name}: {error}") from error
    raise ClusterError(
        f"other submitters have taken three ids of {run}-{stage}-{digest} in a row: try again"
    )


def _refuse_other_configs(jobs: Iterable[JobDetails], run: str, stage: str, folder: str) -> None:
    """Refuses a stage that already runs in the folder with another config.

    Otherwise two trainings would overwrite one another's checkpoints. A job with the same config
    does not come here, since the caller attaches to it.

    Raises:
        ClusterError: the stage runs in this folder.
    """
    for job in jobs:
        metadata = job.metadata or {}
        place = metadata.get(STAGE), metadata.get(FOLDER)
        if job.status.is_terminal() or place != (stage, folder):
            continue
        raise ClusterError(
            f"the job {job.submission_id} runs {stage} of the run {run} with another config: wait "
            f"for its end, stop it (polystill stop {job.submission_id} --address …), or give this "
            "run another name"
        )


def list_jobs(client: JobSubmissionClient, run: str | None = None) -> list[JobDetails]:
    """Submitted jobs, oldest first; those of other submitters, too.

    Args:
        client: client of the job server.
        run: name of a run; None for the jobs of all runs, and for jobs that are not polystill's.

    Raises:
        ClusterError: the job server cannot be reached.
    """
    with cluster_errors("the jobs cannot be listed"):
        jobs = [job for job in client.list_jobs() if job.submission_id is not None]
    if run is not None:
        jobs = [job for job in jobs if (job.metadata or {}).get(RUN) == run]
    return sorted(jobs, key=lambda job: job.start_time or 0)


def job_table(client: JobSubmissionClient, run: str | None = None) -> str:
    """Jobs as a table for people, oldest first: id, status, start (UTC) and seconds so far.

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
    """Stops a job, waits until it has ended, and returns its last status.

    Ray sends SIGTERM to the entry point and what it started, and SIGKILL after
    RAY_JOB_STOP_WAIT_TIME_S (3) seconds.

    Args:
        client: client of the job server.
        submission_id: id of the job.
        timeout: seconds to wait for the end.

    Raises:
        ClusterError: the job is unknown or has not ended in time. A job that waits for resources
            cannot be stopped before it starts.
    """
    deadline = time.monotonic() + timeout
    with cluster_errors(f"the job {submission_id} cannot be stopped"):
        client.stop_job(submission_id)
        while True:
            status = client.get_job_status(submission_id)
            if status.is_terminal():
                return status
            if time.monotonic() > deadline:
                break
            time.sleep(0.25)
    raise ClusterError(
        f"the job {submission_id} is still {status}, {timeout:.0f} seconds after it was asked to "
        "stop: try again, or look at its log"
    )


def stop_with_stages(
    client: JobSubmissionClient, submission_id: str, timeout: float = 60.0
) -> Iterator[tuple[str, JobStatus]]:
    """Stops a job. If it is a detached run, also stops the job of the stage that it has begun.

    Yields:
        Submission id and last status of each job, once it has ended.

    Raises:
        ClusterError: as in `stop_job`.
    """
    # The run is stopped before its stage; otherwise it would begin the next stage.
    yield submission_id, stop_job(client, submission_id, timeout)
    jobs = list_jobs(client)
    stopped = next((job.metadata or {} for job in jobs if job.submission_id == submission_id), {})
    if stopped.get(STAGE) != DETACHED:
        return
    alive = {
        job.submission_id or "": metadata[STAGE]
        for job in jobs
        if not job.status.is_terminal()
        and (metadata := job.metadata or {}).get(FOLDER) == stopped[FOLDER]
    }
    if DETACHED in alive.values():
        return  # the stages belong to a later attempt of the run
    for name, stage in alive.items():
        if re.sub(r"^round\d+-", "", stage) in STAGE_NAMES:
            yield name, stop_job(client, name, timeout)


def job_logs(client: JobSubmissionClient, submission_id: str) -> str:
    """Log of a job: everything that it has printed.

    Raises:
        ClusterError: the job is unknown, or the node that holds its log is gone.
    """
    with cluster_errors(f"the log of {submission_id} cannot be read"):
        return client.get_job_logs(submission_id)
