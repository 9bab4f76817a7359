"""A stage or a cache command as a Ray job: uploaded, submitted, followed to its end."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

import jobs
from jobs.cluster.follow import PREAMBLE, failure_message, follow
from jobs.cluster.local_head import local_head
from jobs.cluster.placement import local_custom_resources
from jobs.cluster.submit import DETACHED, build_upload, job_logs, submit_stage
from pipeline import storage
from pipeline.config.base import Resources
from pipeline.config.load import dump_config, local_paths
from pipeline.config.rounds import layout_of, round_layouts
from pipeline.config.run import Config
from pipeline.errors import ClusterError, StorageError
from pipeline.fingerprint import digest_json

PACKAGES_ROOT = Path(jobs.__file__).resolve().parent.parent
Say = Callable[[str], object]


def submit_and_follow_stage(
    client: JobSubmissionClient, address: str | None, config: Config, stage: str, say: Say
) -> None:
    """Submits one stage, or attaches to it where it already runs, and follows it to its end.

    Args:
        address: of the cluster; None for a local head, whose logs are kept with the run's outputs.

    Raises:
        ClusterError: the job failed or was stopped; the message has its last lines.
    """
    submit_and_follow(client, address, config, stage, ["stage", stage], say)


def submit_and_follow(
    client: JobSubmissionClient,
    address: str | None,
    config: Config,
    name: str,
    command: Sequence[str],
    say: Say,
) -> None:
    """Submits one of our commands as a job, or attaches to it where it already runs, and follows it
    to its end.

    Args:
        name: of the work, as it stands in the job's id; equal names mean equal commands.

    An interrupt ends the following alone, unless the job's head ends with this command.

    Raises:
        ClusterError: the job failed or was stopped; the message has its last lines.
    """
    identifier = submit(client, config, name, command)
    say(f"job {identifier}")
    try:
        status = follow(client, identifier, lambda line: PREAMBLE.match(line) or say(line))
    except KeyboardInterrupt:
        if address is not None:
            say(
                f"the job {identifier} goes on; stop it with: polystill stop {identifier} "
                f"--address {address}"
            )
        raise
    show_all = f"polystill logs {identifier} --address {address}"
    if address is None:
        show_all = _keep_log(config, client, identifier)
    if status != JobStatus.SUCCEEDED:
        raise ClusterError(failure_message(client, identifier, show_all))


def _keep_log(config: Config, client: JobSubmissionClient, identifier: str) -> str:
    """Keeps the log of a job whose head is about to end; returns the command that shows it.

    A job that failed because nothing can be written there must still say so.
    """
    kept = layout_of(config).job_log(identifier)
    try:
        storage.write_bytes(kept, job_logs(client, identifier).encode())
    except StorageError as error:
        return f"not kept: {error}"
    return f"less {kept}"


def submit(client: JobSubmissionClient, config: Config, stage: str, command: Sequence[str]) -> str:
    """Uploads packages and config, submits `python -m jobs <command> …`; returns the job's id."""
    # The orchestration of a detached run asks for nothing, which keeps it beside the job server on
    # the head node.
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
    """The environment of all stages; what the config names wins. Job logs are no place for bars."""
    return {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", **config.cluster.env_vars}


@contextmanager
def cluster(config: Config, address: str | None) -> Iterator[str]:
    """The job server to use: that at `address`, or of a head that lives as long as the context."""
    if address is not None:
        yield address
        return
    custom = local_custom_resources(config)
    with local_head(config.cluster.local_num_cpus, config.cluster.local_num_gpus, custom) as head:
        yield head.address


def is_visible(config: Config, address: str | None) -> bool:
    """Whether this machine sees the run's files, so that a finished stage needs no job to tell."""
    if address is None:
        return True
    inputs = [path for key, path in local_paths(config).items() if not key.startswith("storage.")]
    return "://" not in config.storage.root and all(storage.exists(path) for path in inputs)
