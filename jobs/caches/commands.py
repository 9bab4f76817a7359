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
    commands: Any, add_command: Command, add_config: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Adds `cache` and its own commands to the command line."""
    parser = commands.add_parser("cache", help="look after the caches of teachers' rows")
    inner = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, action: Callable[[argparse.Namespace], str | None], text: str) -> Any:
        command = add_command(inner, name, action, text)
        add_config(command)
        return command

    add("status", _status, "shards, missing, stale and quarantined rows, and who uses them")
    for name, action, text in (
        ("regenerate", _regenerate, "score what is stale, missing or corrupt, and no more"),
        ("verify", _verify, "check every shard and row; exit code 1 if something is wrong"),
    ):
        command = add(name, action, text)
        _teacher(command, "of one teacher only")
        command.add_argument("--address", metavar="URL", help="job server of a cluster")
        command.add_argument("--inside-job", action="store_true", help=argparse.SUPPRESS)
        if name == "verify":
            command.add_argument(
                "--rescore", type=_count, default=0, metavar="N", help="score N rows again"
            )
            command.add_argument(
                "--seed",
                type=_count,
                metavar="S",
                help="draws them; the config's if not given",
            )
        else:
            command.add_argument(
                "--where",
                action="append",
                default=[],
                metavar="FIELD=VALUE",
                help="of these sequences only, such as domain=words; all conditions must hold",
            )
            command.add_argument(
                "--force", action="store_true", help="into a new generation, rows or not"
            )
    add("retry", _retry, "forget what was quarantined: the next run asks for it again")
    command = add("show", _show, "one sequence, token by token")
    _teacher(command, "of one teacher only")
    command.add_argument(
        "--sequence", metavar="ID", help="or its beginning; the first if not given"
    )
    command = add("export", _export, "write a teacher's rows in another format")
    _teacher(command, "whose rows", required=True)
    command.add_argument("--format", choices=EXPORTS, required=True)
    command.add_argument("--output", metavar="FOLDER", required=True)
    command = add("import", _import, "take rows from another project's format")
    _teacher(command, "whose rows they are", required=True)
    command.add_argument("--format", choices=IMPORTS, required=True)
    command.add_argument("--input", metavar="FOLDER", required=True)
    command = add("gc", _gc, "remove what no run, checkpoint or manifest names")
    command.add_argument("--dry-run", action="store_true", help="list it, remove nothing")
    command.add_argument(
        "--unfinished", action="store_true", help="forced regenerations that have not ended as well"
    )


def _teacher(command: argparse.ArgumentParser, text: str, required: bool = False) -> None:
    command.add_argument("--teacher", metavar="NAME", help=text, required=required)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
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

    return collect_garbage(_load(options), options.dry_run, options.unfinished)
