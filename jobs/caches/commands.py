"""`polystill cache …`: the arguments of its commands, and the function that each one calls.

A command that makes a text returns it; the command line prints it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from jobs.caches.run_caches import open_caches
from pipeline.cache_care.regeneration import parse_where
from pipeline.config.load import load_config
from pipeline.config.run import Config

Command = Callable[..., argparse.ArgumentParser]
EXPORTS = ("parquet-long", "distillkit")
IMPORTS = ("distillkit",)


def add_cache_commands(
    commands: Any,
    add_command: Command,
    add_config: Callable[[argparse.ArgumentParser], None],
    confirm: Callable[[str, str], bool],
) -> None:
    """Adds `cache` and its own commands to the command line.

    Args:
        confirm: function that shows a text and asks a question about it.
    """
    parser = commands.add_parser("cache", help="inspect and repair the caches of teachers' rows")
    inner = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, action: Callable[[argparse.Namespace], str | None], text: str
    ) -> argparse.ArgumentParser:
        command = add_command(inner, name, action, text)
        add_config(command)
        return command

    add(
        "status",
        _status,
        "shards, stale caches, missing and quarantined rows, and runs that use them",
    )
    command = add(
        "regenerate",
        _regenerate,
        "score rows that are missing, corrupt or asked for anew, and no others",
    )
    _regenerate_arguments(command)
    text = "check every shard and row; exit code 1 if something is wrong"
    _verify_arguments(add("verify", _verify, text))
    add("retry", _retry, "forget quarantine notes, so that the next run asks again")
    command = add("show", _show, "one sequence, token by token")
    _teacher(command, "the caches of this teacher only")
    text = "id or beginning of the id; default: the first one"
    command.add_argument("--sequence", metavar="ID", help=text)
    command = add("export", _export, "write a teacher's rows in another format")
    _teacher(command, "teacher whose rows are written", required=True)
    command.add_argument("--format", choices=EXPORTS, required=True)
    command.add_argument("--output", metavar="FOLDER", required=True)
    command = add("import", _import, "take rows from another project's format")
    _teacher(command, "teacher whose rows they are", required=True)
    command.add_argument("--format", choices=IMPORTS, required=True)
    command.add_argument("--input", metavar="FOLDER", required=True)
    command = add(
        "gc", _gc, "remove caches and generations that no run, checkpoint or manifest names"
    )
    command.add_argument("--dry-run", action="store_true", help="list the garbage; remove nothing")
    command.set_defaults(confirm=confirm)
    text = "remove what is listed without asking, as scripts must"
    command.add_argument("--yes", action="store_true", help=text)
    text = "also remove unfinished forced regenerations"
    command.add_argument("--unfinished", action="store_true", help=text)


def _regenerate_arguments(command: argparse.ArgumentParser) -> None:
    _job_arguments(command)
    command.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="these sequences only, e.g. domain=words; all conditions must hold",
    )
    text = "score sequences that have a row, too, into a new generation"
    command.add_argument("--force", action="store_true", help=text)


def _verify_arguments(command: argparse.ArgumentParser) -> None:
    _job_arguments(command)
    command.add_argument(
        "--rescore", type=_count, default=0, metavar="N", help="score N rows again"
    )
    text = "seed that draws these rows; default: the config's seed"
    command.add_argument("--seed", type=_count, metavar="S", help=text)


def _job_arguments(command: argparse.ArgumentParser) -> None:
    """Arguments of the commands that need engines, and therefore a job."""
    _teacher(command, "the caches of this teacher only")
    command.add_argument("--address", metavar="URL", help="job server of a cluster")
    command.add_argument("--inside-job", action="store_true", help=argparse.SUPPRESS)


def _teacher(command: argparse.ArgumentParser, text: str, required: bool = False) -> None:
    command.add_argument("--teacher", metavar="NAME", help=text, required=required)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def _load(options: argparse.Namespace) -> Config:
    return load_config(options.config, options.overrides)


def _status(options: argparse.Namespace) -> str:
    from jobs.caches.actions import status

    return status(open_caches(_load(options)))


def _regenerate(options: argparse.Namespace) -> None:
    from jobs.caches import regenerate

    request = regenerate.RegenerationRequest(
        options.teacher, parse_where(options.where), options.force
    )
    if options.inside_job:
        regenerate.regenerate_inside_job(_load(options), request)
    else:
        regenerate.regenerate(_load(options), options.address, request)


def _verify(options: argparse.Namespace) -> None:
    from jobs.caches import verify

    config, choice = _load(options), (options.teacher, options.rescore, options.seed)
    if options.inside_job:
        verify.verify_inside_job(config, *choice)
    else:
        verify.verify_rows(config, options.address, *choice)


def _retry(options: argparse.Namespace) -> str:
    from jobs.caches.actions import retry

    return retry(_load(options))


def _show(options: argparse.Namespace) -> str:
    from jobs.caches.actions import show

    return show(open_caches(_load(options)), options.teacher, options.sequence)


def _export(options: argparse.Namespace) -> str:
    from jobs.caches.actions import export

    return export(open_caches(_load(options)), options.teacher, options.format, options.output)


def _import(options: argparse.Namespace) -> str:
    from jobs.caches.actions import import_distillkit

    return import_distillkit(open_caches(_load(options)), options.teacher, options.input)


def _gc(options: argparse.Namespace) -> str:
    from jobs.caches.actions import collect_garbage

    asked = None if options.yes else options.confirm
    return collect_garbage(_load(options), options.dry_run, options.unfinished, asked)
