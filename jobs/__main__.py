"""The command line: `polystill …`, or `python -m jobs …` in the repository's root."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_ROOTS = {
    Path(spec.origin).resolve().parents[1]
    if (spec := importlib.util.find_spec(name)) and spec.origin
    else None
    for name in ("pipeline", "teachers", "students", "jobs")
}
if len(_ROOTS) != 1 or None in _ROOTS:
    sys.exit(
        f"polystill: its packages come from different places ({_ROOTS}); run it from its own "
        "environment or from its repository's root"
    )

import argparse  # noqa: E402
import json  # noqa: E402
import logging  # noqa: E402

from jobs.bookkeeping.plan import STAGE_NAMES  # noqa: E402
from jobs.caches.commands import add_cache_commands  # noqa: E402
from jobs.console import confirm, discard, log_to_console, write  # noqa: E402
from jobs.faults import fault_message  # noqa: E402
from pipeline.config.load import check_shared_paths, dump_config, load_config  # noqa: E402
from pipeline.config.run import Config  # noqa: E402
from pipeline.credentials import shown_url, without_secrets  # noqa: E402
from pipeline.errors import ClusterError, ConfigError, DistillationError  # noqa: E402
from pipeline.messages import printable  # noqa: E402

# This module has another name when it is run as a program.
logger = logging.getLogger("jobs")
INTERRUPTED = 130
"""Exit code of a command that Ctrl-C has ended, as in shells."""
PIPE_CLOSED = 141
"""Exit code of a command whose reader has gone, as of other commands: `polystill logs … | head`."""


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, or 1 for an error, told in one message."""
    options = parse(arguments)
    log_to_console()
    try:
        product = options.action(options)
        if product is not None:
            write(product)
    except DistillationError as error:
        logger.error("polystill: %s", printable(str(error)))
        return 1
    except KeyboardInterrupt:
        logger.error("polystill: interrupted; run the same command again to go on")
        return INTERRUPTED
    except BrokenPipeError:
        discard(sys.stdout)
        return PIPE_CLOSED
    except Exception as error:  # a traceback helps nobody at a terminal
        words = sys.argv[1:] if arguments is None else arguments
        logger.error("polystill: %s", fault_message(error, words))
        return 1
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parses arguments; overrides may also follow options, where argparse does not expect them."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    misplaced = [text for text in rest if text.startswith("-") or "overrides" not in options]
    if misplaced:
        shown = printable(" ".join(map(without_secrets, misplaced)))
        parser.error(f"unrecognized arguments: {shown}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polystill", description="Distil several large language models into one."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run_commands(commands)
    _add_job_commands(commands)
    add_cache_commands(commands, _command, _config_arguments, confirm)
    text = "run one stage in this process, as the stage's Ray job does"
    stage = _command(commands, "stage", _stage, text)
    stage.add_argument("stage", choices=STAGE_NAMES)
    _config_arguments(stage)
    _allow_argument(stage)
    return parser


def _add_run_commands(commands) -> None:
    """Adds the commands that run all stages, or the first few."""
    address = "job server of a cluster; without it a local Ray head is started"
    run = _command(commands, "run", _run, "run all stages as Ray jobs, doing only what is missing")
    _config_arguments(run)
    _allow_argument(run)
    run.add_argument("--address", metavar="URL", help=address)
    text = "check the config and the prompts, print plan and resources; start nothing"
    run.add_argument("--dry-run", action="store_true", help=text)
    text = "with --dry-run: print the resolved config, too"
    run.add_argument("--show-config", action="store_true", help=text)
    text = "leave the run to the cluster; needs --address"
    run.add_argument("--detach", action="store_true", help=text)
    text = (
        "run on the cluster whose Ray job this command is, as the entry point of a KubeRay RayJob"
    )
    run.add_argument("--inside-job", action="store_true", help=text)

    text = "run the stages up to the export of the trained student"
    train = _command(commands, "train", _train, text)
    _config_arguments(train)
    _allow_argument(train)
    text = "start from the weights of a complete checkpoint or of an exported student"
    train.add_argument("--from-checkpoint", metavar="PATH", help=text)
    train.add_argument("--address", metavar="URL", help=address)


def _add_job_commands(commands) -> None:
    """Adds the commands about single jobs of a cluster."""
    submit = _command(commands, "submit", _submit, "submit one stage and follow it")
    submit.add_argument("stage", choices=STAGE_NAMES)
    _config_arguments(submit)
    _allow_argument(submit)
    submit.add_argument("--address", metavar="URL", required=True)
    submit.add_argument("--detach", action="store_true", help="submit it without following it")

    status = _command(commands, "status", _status, "list the jobs of a cluster")
    status.add_argument("--address", metavar="URL", required=True)
    status.add_argument("--run", metavar="NAME", help="list the jobs of this run only")

    logs = _command(commands, "logs", _logs, "print the log of a job")
    logs.add_argument("--follow", action="store_true", help="also print new lines until it ends")
    stop = _command(commands, "stop", _stop, "stop a job; if it is a detached run, also its stage")
    for command in (logs, stop):
        command.add_argument("submission_id")
        command.add_argument("--address", metavar="URL", required=True)


def _command(commands, name: str, action, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(action=action)
    return parser


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="dotted overrides, e.g. training.steps=100",
    )


def _allow_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="resume even if this differs from the checkpoint, e.g. caches, losses, "
        "training.learning_rate",
    )


def _load(options: argparse.Namespace, *overrides: str) -> Config:
    allowed = [f"training.allow_resume_with={json.dumps(options.allow)}"] if options.allow else []
    return load_config(options.config, [*options.overrides, *allowed, *overrides])


def _run(options: argparse.Namespace) -> str | None:
    config = _load(options)
    if options.dry_run:
        from jobs.dry_run import dry_run_text

        if options.show_config:
            write(dump_config(config))  # before the plan, which may refuse it
        return dry_run_text(config, options.address)
    if options.show_config:
        raise ConfigError("--show-config prints a config without a run, so it needs --dry-run")
    from jobs import distill
    from jobs.cluster.connection import connect, job_server_address_inside_job
    from jobs.cluster.stage_jobs import submit
    from jobs.cluster.submit import DETACHED

    if not options.detach:
        inside = options.inside_job and job_server_address_inside_job()
        distill.run(config, inside or options.address)
        return None
    if options.address is None:
        raise ConfigError("--detach leaves the run to a cluster, so it needs --address")
    check_shared_paths(config)
    client = connect(options.address)
    identifier = submit(client, config, DETACHED, ["run", "--inside-job"])
    logger.info("submitted %s", identifier)
    following = f"polystill logs {identifier} --address {shown_url(options.address)} --follow"
    logger.info("follow it with: %s", following)
    return None


def _train(options: argparse.Namespace) -> None:
    from jobs import distill

    overrides = []
    if options.from_checkpoint is not None:
        path = str(Path(options.from_checkpoint).resolve())
        overrides = [f"student.initial_weights={json.dumps(path)}"]
    config = _load(options, *overrides)
    distill.run(config, options.address, STAGE_NAMES[: STAGE_NAMES.index("export") + 1])


def _submit(options: argparse.Namespace) -> None:
    from jobs.cluster.connection import connect
    from jobs.cluster.stage_jobs import submit, submit_and_follow_stage

    config = _load(options)
    check_shared_paths(config)
    client = connect(options.address)
    if options.detach:
        identifier = submit(client, config, options.stage, ["stage", options.stage])
        logger.info("submitted %s", identifier)
    else:
        submit_and_follow_stage(client, options.address, config, options.stage)


def _status(options: argparse.Namespace) -> str:
    from jobs.cluster.connection import connect
    from jobs.cluster.submit import job_table

    return job_table(connect(options.address), options.run)


def _logs(options: argparse.Namespace) -> str | None:
    from jobs.cluster.connection import connect
    from jobs.cluster.follow import follow
    from jobs.cluster.submit import job_logs

    client = connect(options.address)
    if not options.follow:
        return job_logs(client, options.submission_id)
    status = follow(client, options.submission_id, write)
    if status != "SUCCEEDED":
        raise ClusterError(f"the job {options.submission_id} ended as {status}")
    return None


def _stop(options: argparse.Namespace) -> None:
    from jobs.cluster.connection import connect
    from jobs.cluster.submit import stop_with_stages

    for name, status in stop_with_stages(connect(options.address), options.submission_id):
        logger.info("%s: %s", name, status)


def _stage(options: argparse.Namespace) -> None:
    from jobs.stages.entry import run_stage

    run_stage(options.stage, _load(options))


if __name__ == "__main__":
    sys.exit(main())
