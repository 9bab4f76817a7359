"""Scoring whose processes are killed, whose disk is full, whose shards are damaged, whose twin runs
beside it: afterwards every row is there once, and is what an undisturbed run writes.

The long form, `make faults`, kills 20 times at moments drawn from fixed seeds and prints a table.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from jobs.cluster.local_head import LocalHead
from pipeline.cache.reader import open_cache
from pipeline.errors import CorruptShardError
from pipeline.layout import CacheLayout
from tests.support import faults
from tests.support.command_line import (
    RunningCommand,
    file_times,
    polystill,
    start_polystill,
    token_environment,
)
from tests.support.disks import small_disk
from tests.support.faults import (
    NUM_PROMPTS,
    NUM_SHARDS,
    PROMPTS_PER_SHARD,
    Material,
    Store,
    assert_whole,
    make_material,
)
from tests.support.object_store import object_store

pytestmark = pytest.mark.timeout(1800)
Rows = dict[str, dict[str, np.ndarray]]
SECONDS = 900  # a bound for one command, far above what it needs


@dataclass(frozen=True)
class Bench:
    """What all tests share.

    Attributes:
        env: reaches the head.
        rows: of an undisturbed run.
        finished: the root of that run.
    """

    material: Material
    env: dict[str, str]
    rows: Rows
    finished: Path
    me: psutil.Process

    def fresh(self, folder: Path) -> Store:
        """A root that is prepared and not scored."""
        shutil.copytree(self.material.template, folder)
        return Store(str(folder))

    def start(self, store: Store, logs: Path, run: str = faults.RUN) -> RunningCommand:
        """The score stage, as its Ray job runs it."""
        arguments = self.material.arguments(store.root, run)
        return start_polystill(logs, "stage", "score", *arguments, env=self.env)

    def finish(self, store: Store, logs: Path) -> None:
        """Runs the score stage to its end."""
        assert ended(self.start(store, logs)) == 0, (logs / "stderr").read_text()


@pytest.fixture(scope="module")
def bench(ray_head: LocalHead, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("faults")
    env = token_environment(ray_head.token) | {"RAY_ADDRESS": ray_head.gcs_address}
    material = make_material(folder, env)
    bench = Bench(material, env, {}, folder / "undisturbed", psutil.Process())
    store = bench.fresh(bench.finished)
    bench.finish(store, folder / "log")
    bench.rows.update(assert_whole(material, store, None))
    return bench


def ended(command: RunningCommand) -> int:
    """Waits for the end of a command; its exit code."""
    return command.process.wait(SECONDS)


def wait_for_shards(command: RunningCommand, store: Store, number: int) -> None:
    command.wait_until(f"{number} shards", lambda: len(store.shards()) >= number, SECONDS)


def test_killed_engines_actors_and_jobs_on_an_object_store(bench: Bench, tmp_path: Path) -> None:
    """One cache in S3, behind a wire that breaks; three kills, and the same command again."""
    with object_store() as remote:
        store = Store(f"{remote.root}/faults")
        faults.upload(bench.material.template, store.root)
        settings = bench.material.env | remote.settings(tmp_path / "credentials")
        material = replace(bench.material, env=settings)
        there = replace(bench, material=material, env=bench.env | remote.env)
        command = there.start(store, tmp_path / "first")
        remote.wire.cut("upload", 3000, times=3)
        wait_for_shards(command, store, 5)
        (actor,) = faults.actors(bench.me)
        orphans = actor.children(recursive=True)
        assert faults.kill([actor]) == 1
        _, alive = psutil.wait_procs(orphans, timeout=60)
        assert alive == []
        wait_for_shards(command, store, len(store.shards()) + 5)
        assert faults.kill(faults.engines(bench.me)) == 1
        wait_for_shards(command, store, len(store.shards()) + 5)
        command.process.send_signal(signal.SIGKILL)
        assert ended(command) == -signal.SIGKILL
        kept = store.shards()
        assert 10 < len(kept) < NUM_SHARDS
        assert remote.wire.num_cuts == 3
        remote.wire.cut("download", 2000, times=3)
        there.finish(store, tmp_path / "second")
        assert store.shards().items() > kept.items()
        assert_whole(bench.material, store, bench.rows)
        assert remote.wire.num_cuts == 3


def test_two_jobs_at_once_neither_mix_nor_double_rows(bench: Bench, tmp_path: Path) -> None:
    """Two runs that share a cache and lack the same sequences, grouped differently."""
    store = bench.fresh(tmp_path / "out")
    faults.add_run(Path(store.root), "other", sequences_per_shard=7)
    commands = {
        PROMPTS_PER_SHARD: bench.start(store, tmp_path / "log", faults.RUN),
        7: bench.start(store, tmp_path / "other", "other"),
    }
    meet(commands, store)
    for command in commands.values():
        assert ended(command) == 0, command.printed()
        assert "new shards" in command.stdout.read_text(), command.printed()
    ours, theirs = (written_by_size(store)[size] for size in commands)
    assert min(ours) < max(theirs) and min(theirs) < max(ours), "one had ended before the other"
    twice = sum(len(found) > 1 for found in store.rows().values())
    assert twice > NUM_PROMPTS / 2
    assert_whole(bench.material, store, bench.rows, overlap=True)


def meet(commands: dict[int, RunningCommand], store: Store) -> None:
    """Holds the command that is first to write until the other writes as well.

    Args:
        commands: by the number of rows of their shards.
    """
    some = next(iter(commands.values()))
    some.wait_until("a shard", lambda: bool(written_by_size(store)), SECONDS)
    size = next(iter(written_by_size(store)))
    (late,) = commands.keys() - {size}
    held = commands[size].process
    held.send_signal(signal.SIGSTOP)
    try:
        commands[late].wait_until("its shard", lambda: late in written_by_size(store), SECONDS)
    finally:
        held.send_signal(signal.SIGCONT)


def written_by_size(store: Store) -> dict[int, list[int]]:
    """Times at which the shards of the two jobs were written, by their number of rows."""
    written: dict[int, list[int]] = defaultdict(list)
    for uri in store.shards():
        size = pq.read_metadata(uri).num_rows
        if size in (7, PROMPTS_PER_SHARD):
            written[size].append(Path(uri).stat().st_mtime_ns)
    return written


def test_damaged_shards_are_named_and_never_trained_on(bench: Bench, tmp_path: Path) -> None:
    store = Store(str(shutil.copytree(bench.finished, tmp_path / "out")))
    cache = CacheLayout(store.folder, 1)
    truncated, flipped = (Path(uri) for uri in sorted(store.shards())[7:9])
    whole = flipped.read_bytes()
    flipped.write_bytes(whole[:1000] + bytes([whole[1000] ^ 4]) + whole[1001:])
    with pytest.raises(CorruptShardError) as caught:
        reader = open_cache(cache)
        for identifier in bench.rows:
            reader.row(identifier)
    assert caught.value.path == str(flipped)
    truncated.write_bytes(truncated.read_bytes()[:-100])
    with pytest.raises(CorruptShardError) as caught:
        open_cache(cache)
    assert caught.value.path == str(truncated)
    Path(cache.index).unlink()  # without it nothing vouches for either
    command = bench.start(store, tmp_path / "refused")
    assert ended(command) == 1
    message = command.stderr.read_text()
    assert str(truncated) in message and "polystill cache regenerate CONFIG" in message
    assert "Traceback" not in message
    truncated.unlink()
    with pytest.raises(CorruptShardError) as caught:
        open_cache(cache)
    assert caught.value.path == str(flipped)
    flipped.unlink()
    bench.finish(store, tmp_path / "mended")
    assert_whole(bench.material, store, bench.rows)


VICTIMS = ("engine", "actor", "driver", "job", "head")


@pytest.fixture(scope="module")
def table(pytestconfig: pytest.Config) -> Iterator[list[str]]:
    """Rows that are printed when the module has ended."""
    rows = [f"{'seed':>4}  {'victim':6}  {'killed at':22}  {'seconds':>7}  outcome"]
    yield rows
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        print("\n" + "\n".join(rows))


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_a_random_moment(
    bench: Bench, tmp_path: Path, table: list[str], seed: int
) -> None:
    victim, moment = VICTIMS[seed % len(VICTIMS)], random.Random(seed)
    store, started = bench.fresh(tmp_path / "out"), time.monotonic()
    command = begin(bench, victim, store, tmp_path / "log")
    # One moment in four lies before the first shard: while the engine starts or begins.
    number = max(0, moment.randrange(-NUM_SHARDS // 3, NUM_SHARDS - 8))
    wait_for_shards(command, store, number)
    if not number:
        command.wait_until("an actor", lambda: bool(faults.actors(bench.me)), SECONDS)
        time.sleep(moment.uniform(0, 6))
    if victim == "engine":
        command.wait_until("an engine", lambda: bool(faults.engines(bench.me)), SECONDS)
    time.sleep(moment.uniform(0, 0.2))
    num_killed = faults.kill(processes_of(victim, command, bench.me))
    kept = {name: times for name, times in file_times(Path(store.root)).items() if is_shard(name)}
    code = ended(command)
    assert num_killed > 0
    outcome = "went on by itself"
    if victim in ("driver", "job", "head"):
        assert code == -signal.SIGKILL, command.printed()
        bench.finish(store, tmp_path / "again")
        outcome = "resumed by the same command"
    assert code in (0, -signal.SIGKILL), command.printed()
    assert_whole(bench.material, store, bench.rows)
    now = file_times(Path(store.root))
    assert {name: now[name] for name in kept} == kept
    seconds = time.monotonic() - started
    at = f"{len(kept)} of {NUM_SHARDS} shards"
    table.append(f"{seed:4}  {victim:6}  {at:22}  {seconds:7.0f}  {outcome}; all rows once, equal")


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["job", "head"])
def test_killed_while_the_cache_is_published(
    bench: Bench, tmp_path: Path, table: list[str], victim: str
) -> None:
    store, started = bench.fresh(tmp_path / "out"), time.monotonic()
    command = begin(bench, victim, store, tmp_path / "log")
    command.wait_until("an index", lambda: bool(store.files(".index.parquet")), SECONDS)
    assert faults.kill(processes_of(victim, command, bench.me)) > 0
    assert ended(command) == -signal.SIGKILL, command.printed()
    kept = store.shards()
    bench.finish(store, tmp_path / "again")
    assert store.shards() == kept
    assert_whole(bench.material, store, bench.rows)
    seconds = time.monotonic() - started
    outcome = "resumed by the same command; all rows once, equal"
    table.append(f"{'-':>4}  {victim:6}  {'as its index appeared':22}  {seconds:7.0f}  {outcome}")


def begin(bench: Bench, victim: str, store: Store, logs: Path) -> RunningCommand:
    """The score stage; to kill its head, a whole run that has its own."""
    if victim == "head":
        return start_polystill(logs, "run", *bench.material.arguments(store.root))
    return bench.start(store, logs)


def is_shard(name: str) -> bool:
    return "/g1/" in name and not Path(name).name.startswith(".")


def processes_of(victim: str, command: RunningCommand, me: psutil.Process) -> list[psutil.Process]:
    """The processes that die at once; those of this test's own head stay, its actors excepted."""
    driver = psutil.Process(command.process.pid)
    if victim == "head":
        # Its guardian alone is left, to remove the head's folder.
        family = [each for each in command.family() if "head_guardian" not in faults.title(each)]
        return [driver, *family]
    return {
        "engine": lambda: faults.engines(me),
        "actor": lambda: faults.actors(me),
        "driver": lambda: [driver],
        "job": lambda: [driver, *faults.actors(me), *faults.engines(me)],
    }[victim]()


@pytest.mark.faults
def test_a_full_disk_is_told_and_scoring_goes_on_when_there_is_room(
    bench: Bench, tmp_path: Path
) -> None:
    with small_disk(tmp_path / "disk", mebibytes=4) as disk:
        store = bench.fresh(disk.folder / "out")
        assert disk.mounted, "a disk that fills up is a tmpfs here: mounting one needs root"
        disk.fill(leave_bytes=100_000)
        command = bench.start(store, tmp_path / "full")
        assert ended(command) == 1, command.printed()
        message = command.stderr.read_text()
        assert all(part in message for part in disk.message_parts) and "Traceback" not in message
        assert not [name for name in file_times(disk.folder) if name.endswith(".tmp")]
        kept = store.shards()
        assert len(kept) < NUM_SHARDS
        disk.free()
        bench.finish(store, tmp_path / "room")
        assert store.shards().items() >= kept.items()
        assert_whole(bench.material, store, bench.rows)


DRAWS = "{type: head_and_sampled, head_mass: 0.5, max_head_entries: 8, num_draws: 12}"


@pytest.mark.faults
def test_rows_with_draws_survive_kills_and_are_what_the_teacher_says(
    bench: Bench, tmp_path: Path
) -> None:
    """Compared with an undisturbed run, and judged under a fresh capture."""
    selection = (f"scoring.selection={DRAWS}", "scoring.num_logprobs=64")
    there = replace(bench, material=replace(bench.material, overrides=selection))
    stores = [bench.fresh(tmp_path / name) for name in ("undisturbed", "killed")]
    for store in stores:
        prepared = polystill("stage", "prepare", *there.material.arguments(store.root), seconds=300)
        assert prepared.returncode == 0, prepared.stderr
    there.finish(stores[0], tmp_path / "log")
    expected = assert_whole(there.material, stores[0], None)
    assert sum(len(row["counts"]) for row in expected.values()) > NUM_SHARDS
    command = there.start(stores[1], tmp_path / "first")
    wait_for_shards(command, stores[1], 10)
    assert faults.kill(faults.engines(bench.me)) == 1
    wait_for_shards(command, stores[1], 20)
    faults.kill(processes_of("job", command, bench.me))
    assert ended(command) == -signal.SIGKILL
    there.finish(stores[1], tmp_path / "second")
    assert_whole(there.material, stores[1], expected)
    arguments = there.material.arguments(stores[1].root)
    words = ["cache", "verify", *arguments, "--rescore", "1000", "--inside-job"]
    verified = polystill(*words, seconds=SECONDS, env=bench.env)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    found = f"{faults.TEACHER}: {len(expected)} rows scored again"
    assert found in verified.stdout and "no rows beyond it" in verified.stdout
