"""The whole run, in order: every stage a Ray job, followed to its end; a failure stops it."""

from __future__ import annotations

import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from ray.job_submission import JobStatus, JobSubmissionClient

import jobs
from jobs.connection import connect
from jobs.follow import PREAMBLE, failure_message, follow
from jobs.local_head import local_head
from jobs.placement import check_local_head, local_custom_resources
from jobs.plan import STAGES, StagePlan, make_plan, plan_rounds, stages_of
from jobs.run_lock import alone
from jobs.submit import DETACHED, build_upload, job_logs, submit_stage
from pipeline import storage
from pipeline.config import Config
from pipeline.config_base import Resources
from pipeline.errors import ClusterError, StorageError
from pipeline.fingerprint import digest_json
from pipeline.loading import check_shared_paths, dump_config, local_paths
from pipeline.rounds import layout_of, round_layouts, rounds_of

PACKAGES_ROOT = Path(jobs.__file__).resolve().parent.parent

Say = Callable[[str], object]


def run(config: Config, address: str | None, say: Say, stages: Sequence[str] = STAGES) -> None:
    """Runs every stage of every round that has something to do, on a cluster or on a head of its
    own.

    Args:
        stages: all, or the first of them.

    Raises:
        DistillationError: a stage failed, the cluster cannot be reached, or the config cannot be
            honoured.
    """
    say(f"run {config.name}: {' -> '.join(stages)}")
    if address is not None:
        check_shared_paths(config)
    visible = is_visible(config, address)
    plans = plan_rounds(config, stages) if visible else []
    if plans and not any(plan.todo for of_round in plans for plan in of_round):
        say("nothing to do: every stage is complete")
        say(where(config, stages))
        return
    if address is None:
        check_local_head(config, {p.stage for of_round in plans for p in of_round if p.todo})
    # A head of its own knows no job of another's.
    lock = round_layouts(config)[0].lock("run")
    only_one = alone(lock, f"the run {config.name}") if address is None else nullcontext()
    with only_one, cluster(config, address) as url:
        client = connect(url)
        for each in rounds_of(config):
            _run_round(client, address, each, stages_of(each, stages), visible, say)
    say(where(config, stages))


def _run_round(
    client: JobSubmissionClient,
    address: str | None,
    config: Config,
    stages: Sequence[str],
    visible: bool,
    say: Say,
) -> None:
    of_round = f"round {config.round}/{config.rounds}, " if config.rounds > 1 else ""
    for number, stage in enumerate(stages, start=1):
        say_stage = _prefixed(say, f"[{of_round}{number}/{len(stages)} {stage}]")
        plan = _plan_of(config, stage) if visible else None
        if plan is not None and plan.todo == 0:
            say_stage(f"up to date ({plan.summary})")
            continue
        started = time.monotonic()
        run_stage(client, address, config, stage, say_stage)
        say_stage(f"done in {time.monotonic() - started:.0f} s")


def run_stage(
    client: JobSubmissionClient, address: str | None, config: Config, stage: str, say: Say
) -> None:
    """Submits one stage, or attaches to it where it already runs, and follows it to its end.

    Args:
        address: of the cluster; None for a local head, whose logs are kept with the run's outputs.

    Raises:
        ClusterError: the job failed or was stopped; the message has its last lines.
    """
    run_job(client, address, config, stage, ["stage", stage], say)


def run_job(
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


def where(config: Config, stages: Sequence[str]) -> str:
    """Where the results of a run's stages lie, of its last round, one a line."""
    layout = layout_of(rounds_of(config)[-1])
    report = {"report": layout.report_html, "figures": layout.report_json}
    places = (report if stages[-1] == STAGES[-1] else {}) | {
        "caches": layout.caches_folder,
        "student": layout.export_folder("student"),
        "metrics": layout.metrics("student"),
    }
    return "\n".join(f"{name + ':':9} {path}" for name, path in places.items())


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


def _plan_of(config: Config, stage: str) -> StagePlan:
    return next(plan for plan in make_plan(config) if plan.stage == stage)


def _prefixed(say: Say, prefix: str) -> Say:
    return lambda line: say(f"{prefix} {line}")
