"""Stages and cache commands as Ray jobs: uploaded, submitted, followed to their end."""

from __future__ import annotations

import logging
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

import jobs
from jobs.bookkeeping.plan import unseen_inputs
from jobs.cluster.follow import SILENCE_SECONDS, OwnLines, failure_message, follow
from jobs.cluster.local_head import local_head
from jobs.cluster.placement import local_custom_resources
from jobs.cluster.submit import DETACHED, job_logs, submit_stage
from jobs.cluster.upload import build_upload
from pipeline import storage
from pipeline.config.base import Resources
from pipeline.config.load import dump_config
from pipeline.config.rounds import layout_of, round_layouts
from pipeline.config.run import Config
from pipeline.credentials import shown_url, without_passwords
from pipeline.errors import ClusterError, StorageError
from pipeline.fingerprint import digest_json

PACKAGES_ROOT = Path(jobs.__file__).resolve().parent.parent
logger = logging.getLogger(__name__)


def submit_and_follow_stage(
    client: JobSubmissionClient, address: str | None, config: Config, stage: str, prefix: str = ""
) -> None:
    """Submits one stage, or attaches to its job if it already runs, and follows it to its end.

    Args:
        client: client of the job server.
        address: URL of the cluster's job server; None for a local Ray head, whose job logs are
            kept with the run's outputs.
        config: config of the round.
        stage: name of the stage.
        prefix: beginning of every line that is logged.

    Raises:
        ClusterError: the job failed or was stopped; the message has its last lines.
    """
    submit_and_follow(client, address, config, stage, ["stage", stage], prefix)


def submit_and_follow(
    client: JobSubmissionClient,
    address: str | None,
    config: Config,
    name: str,
    command: Sequence[str],
    prefix: str = "",
) -> None:
    """Submits a polystill command as a job, or attaches to its job, and follows it to its end.

    An interrupt only ends the following, unless the job runs on a local Ray head, which ends with
    this process.

    Args:
        client: client of the job server.
        address: URL of the cluster's job server; None for a local Ray head.
        config: config of the round.
        name: name of the work in the job's id; equal names mean equal commands.
        command: words of the command line, without the config.
        prefix: beginning of every line that is logged.

    Raises:
        ClusterError: the job failed or was stopped; the message has its last lines.
    """
    identifier = submit(client, config, name, command)
    logger.info("%sjob %s", prefix, identifier)

    is_own = OwnLines()

    def log_line(line: str) -> None:
        if is_own(line):
            logger.info("%s%s", prefix, line)

    try:
        status = follow(client, identifier, log_line, silence_seconds=SILENCE_SECONDS)
    except KeyboardInterrupt:
        if address is not None:
            logger.info(
                "%sthe job %s goes on; stop it with: polystill stop %s --address %s",
                prefix,
                identifier,
                identifier,
                shown_url(address),
            )
        raise
    if address is None:
        show_all = _keep_log(config, client, identifier)
    else:
        show_all = f"polystill logs {identifier} --address {shown_url(address)}"
    if status != JobStatus.SUCCEEDED:
        raise ClusterError(failure_message(client, identifier, show_all))


def _keep_log(config: Config, client: JobSubmissionClient, identifier: str) -> str:
    """Keeps the log of a job whose Ray head is about to end; returns the command that shows it.

    Logs quote prompts and answers, so only their user may read them.
    If the log cannot be written, the error is returned instead: the job may have failed for the
    same reason, and its message must still reach the user.
    """
    path = layout_of(config).job_log(identifier)
    try:
        log = without_passwords(job_logs(client, identifier))
        storage.write_bytes(path, log.encode(errors="replace"), private=True)
    except StorageError as error:
        return f"not kept: {error}"
    return f"less {path}"


def submit(client: JobSubmissionClient, config: Config, stage: str, command: Sequence[str]) -> str:
    """Uploads packages and config, submits `python -m jobs <command> …`; returns the job's id."""
    # A detached run only submits and follows stages. It reserves nothing, so that Ray runs it on
    # the head node, beside the job server.
    resources = Resources(num_cpus=0) if stage == DETACHED else config.cluster.job_resources
    with tempfile.TemporaryDirectory(prefix="polystill-upload-") as folder:
        upload = build_upload(PACKAGES_ROOT, dump_config(config), Path(folder))
        return submit_stage(
            client,
            run=config.name,
            stage=stage if config.round == 1 else f"round{config.round}-{stage}",
            digest=digest_json(config.model_dump(mode="json"))[:12],
            folder=round_layouts(config)[0].models_folder,
            entrypoint=f"python -u -m jobs {shlex.join(command)} config.yaml",
            working_dir=upload,
            env_vars=stage_environment(config),
            num_cpus=resources.num_cpus,
            num_gpus=resources.num_gpus,
            custom_resources=resources.custom,
        )


def stage_environment(config: Config) -> dict[str, str]:
    """Environment variables of all stages: no progress bars, unless the config says otherwise."""
    return {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", **config.cluster.env_vars}


@contextmanager
def cluster(config: Config, address: str | None) -> Iterator[str]:
    """Yields the URL of the job server: `address`, or that of a local Ray head for the context."""
    if address is not None:
        yield address
        return
    custom = local_custom_resources(config)
    with local_head(config.cluster.local_num_cpus, config.cluster.local_num_gpus, custom) as head:
        yield head.address


def is_visible(config: Config, address: str | None) -> bool:
    """Whether this machine sees the run's files, and so knows without a job what is finished."""
    if address is None:
        return True
    return "://" not in config.storage.root and not unseen_inputs(config)
