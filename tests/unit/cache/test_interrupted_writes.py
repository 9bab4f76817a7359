"""Killed before any one of its writes, a command that fills a cache is repeated: the cache is then
what an undisturbed command makes, index and manifest included.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.caches.regenerate import RegenerationRequest as Request
from jobs.caches.regenerate import regenerate_inside_job
from jobs.caches.run_caches import open_caches
from pipeline import storage
from pipeline.cache.generations import current_generation
from tests.support.fabricated import FabricatedRun, FakePools

WRITES = ("write_bytes", "link_or_copy", "move", "remove")
MOST_WRITES = 40
Command = Callable[[FabricatedRun], None]


class Killed(Exception):
    """Stands for SIGKILL: nothing catches it."""


def killed_before(number: int, command: Command, run: FabricatedRun) -> bool:
    """Runs a command up to its write of that number; whether it has as many."""
    count = 0

    def counted(write: Callable) -> Callable:
        def count_and_write(*arguments):
            nonlocal count
            count += 1
            if count > number:
                raise Killed
            return write(*arguments)

        return count_and_write

    with pytest.MonkeyPatch.context() as patch:
        for name in WRITES:
            patch.setattr(storage, name, counted(getattr(storage, name)))
        try:
            command(run)
        except Killed:
            return True
    return False


def prepared(root: Path) -> FabricatedRun:
    run = FabricatedRun(root)
    run.prepare()
    run.write_answers(0, 2)
    return run


def scored(root: Path) -> FabricatedRun:
    run = prepared(root)
    run.score()
    return run


def with_new_prompts(root: Path) -> FabricatedRun:
    run = scored(root)
    run.write_answers(2, 4)
    return run


def damaged(root: Path) -> FabricatedRun:
    """A shard is corrupt, and another run's is gone."""
    other = FabricatedRun(root, "other")
    other.prepare()
    other.write_answers(4, 6)
    other.score()
    gone = next(iter(other.shards("words")))
    run = scored(root)
    cache = open_caches(run.config).layouts["words"]
    Path(cache.shard(gone)).unlink()
    corrupt = next(digest for digest in run.shards("words"))
    Path(cache.shard(corrupt)).write_bytes(b"nothing")
    return run


def score(run: FabricatedRun) -> None:
    run.score()


def regenerate(**asked) -> Command:
    return lambda run: regenerate_inside_job(run.config, Request(**asked))


def caches(run: FabricatedRun) -> dict[str, bytes]:
    folder = run.root / "caches"
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


PART = {"teacher": "words", "where": {"domain": "words"}, "force": True}


@pytest.mark.parametrize(
    ("begin", "command", "generation"),
    [
        (prepared, score, 1),
        (with_new_prompts, score, 1),
        (damaged, regenerate(), 1),
        (scored, regenerate(teacher="words", force=True), 2),
        (damaged, regenerate(**PART), 2),
    ],
    ids=["first", "new prompts", "mending", "forced", "a part forced, and damage"],
)
def test_killed_before_each_write_and_repeated(
    tmp_path: Path, pools: FakePools, begin: Callable, command: Command, generation: int
) -> None:
    undisturbed = begin(tmp_path / "undisturbed")
    pools.scored.clear()
    command(undisturbed)
    expected, asked = caches(undisturbed), len(pools.scored)
    for number in range(MOST_WRITES):
        run = begin(tmp_path / str(number))
        pools.scored.clear()
        was_killed = killed_before(number, command, run)
        if was_killed:
            command(run)
        assert caches(run) == expected, f"killed before write {number}"
        folder = open_caches(run.config).layouts["words"].folder
        assert current_generation(folder) == generation
        # A sequence shard's rows, at most, were lost with the process and are scored again.
        assert len(pools.scored) <= asked + 2
        if not was_killed:
            return
    raise AssertionError(f"more than {MOST_WRITES} writes")
