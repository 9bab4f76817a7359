"""Check before garbage is collected: everything that may name a cache can be read.

A cache is garbage because nobody names it. Runs that were moved away, a link to a disk that is not
mounted, or checkpoints that lie elsewhere would make garbage of rows that are needed.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from pipeline import storage
from pipeline.cache.generations import models_roots, runs_below
from pipeline.cache_care.entries import is_link
from pipeline.errors import CacheError
from pipeline.layout import Layout

DEEPEST = 6
"""Folders below `runs/` down to the checkpoints of a later round."""


def check_runs(layout: Layout) -> None:
    """Checks that the runs below the root are there, with their checkpoints.

    Raises:
        CacheError: there is no prepared run, a link leads nowhere, or the config of a run or the
            folder of its checkpoints is missing.
        StorageError: a file of a run cannot be read.
    """
    if "://" not in layout.root:
        _check_links(layout.runs_folder)
    runs = [replace(layout, run=run) for run in runs_below(layout)]
    if not any(storage.exists(run.prepared) or storage.exists(run.pins) for run in runs):
        raise CacheError(
            f"{layout.runs_folder} holds no prepared run, so every cache would be garbage: if the "
            f"runs were moved, bring them back; if no cache is needed, remove "
            f"{layout.caches_folder} yourself"
        )
    for run in runs:
        _check_config(run)
        for root in sorted(models_roots(run)):
            _check_models(run, root)


def check_caches_folder(layout: Layout) -> None:
    """Checks that the folder of the caches is the root's own.

    Raises:
        CacheError: it is a link, so that other roots may use what lies there.
    """
    if is_link(layout.caches_folder):
        raise CacheError(
            f"{layout.caches_folder} is a link to {os.readlink(layout.caches_folder)!r}, so runs "
            "of another storage root may need these caches: give that root as storage.root"
        )


def _check_links(folder: str) -> None:
    """Refuses links to nowhere, behind which a run or a checkpoint may lie."""
    for depth in range(DEEPEST + 1):
        for path in Path(folder).glob("/".join("*" * depth)) if depth else [Path(folder)]:
            if path.is_symlink() and not path.exists():
                raise CacheError(
                    f"{str(path)!r} is a link to {os.readlink(path)!r}, which is not there, so "
                    "nobody can know which caches are named behind it: mount it, or remove the link"
                )


def _check_config(run: Layout) -> None:
    """Refuses a prepared run without its config, which alone says where its checkpoints lie."""
    is_prepared = any(map(storage.exists, (run.prepared, run.pins, run.stage_record("train"))))
    if is_prepared and not storage.exists(run.resolved_config):
        raise CacheError(
            f"run {run.run} has lost {run.resolved_config}, so nobody can know where its "
            "checkpoints lie, and which caches they name: bring the file back, or remove the run"
        )


def _check_models(run: Layout, root: str) -> None:
    """Refuses a run whose checkpoints cannot be looked up."""
    folder = storage.join(root, "runs", run.run)
    has_trained = any(
        map(storage.exists, (run.stage_record("train"), run.unended_attempts("train")))
    )
    missing = root if not storage.exists(root) else folder
    if not storage.exists(missing) and (missing == root or has_trained):
        raise CacheError(
            f"run {run.run} keeps checkpoints below {root}, and {missing} is not there, so nobody "
            "can know which caches they name: mount it; if they are gone for good, make an empty "
            f"folder {folder}"
        )
