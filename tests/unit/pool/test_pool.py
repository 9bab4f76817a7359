"""Decisions of the pool about tasks and replicas, with replicas that live in this process."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from pipeline.config.base import Resources
from pipeline.errors import ClusterError, StorageError, TeacherError
from teachers.pool import dispatch
from teachers.pool.actor import engine_env_vars
from teachers.pool.contracts import PoolReport, ReplicaDied, ReplicaLost
from teachers.pool.dispatch import TASKS_IN_FLIGHT, Dispatcher
from teachers.pool.placement import check_placement, reminders, room_in_words
from teachers.protocol import Canary, Comparison, ItemsFailedError
from teachers.tasks.control import ControlTask
from tests.support.logs import logged


@dataclass(frozen=True)
class NumbersTask:
    """Gives its numbers back."""

    numbers: tuple[int, ...]
    quarantined: list[tuple[int, str]]

    @property
    def label(self) -> str:
        return f"task {self.numbers}"

    def __len__(self) -> int:
        return len(self.numbers)

    def halves(self) -> tuple[NumbersTask, NumbersTask]:
        middle = len(self) // 2
        return (
            NumbersTask(self.numbers[:middle], self.quarantined),
            NumbersTask(self.numbers[middle:], self.quarantined),
        )

    def quarantine(self, error: str) -> None:
        (number,) = self.numbers
        self.quarantined.append((number, error))


@dataclass
class Cluster:
    """Makes replicas that fail on chosen numbers and remembers what happened."""

    raising: dict[int, Exception] = field(default_factory=dict)
    deadly: set[int] = field(default_factory=set)
    deadly_once: set[int] = field(default_factory=set)
    failing_starts: int = 0
    is_sick: bool = False
    gold_logprobs: list[float] = field(default_factory=list)
    calls: Counter[tuple[int, ...]] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)
    room: int = 1000
    launched: int = 0
    alive: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    comparisons: int = 0

    def launch(self) -> FakeReplica:
        self.launched += 1
        self.alive += 1
        return FakeReplica(self)


class FakeReplica:
    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._number = cluster.launched - 1
        self._death = asyncio.Event()
        self._stopped = False

    async def node_is_gone(self) -> bool:
        return self._number in self._cluster.gone

    async def placed(self) -> None:
        if self._cluster.lost[:1] == ["before it has a node"]:
            self._cluster.lost.pop(0)
            raise ReplicaDied("the actor never ran")
        if self._cluster.launched > self._cluster.room:
            await asyncio.Event().wait()

    async def ready(self) -> dict[str, Any]:
        if self._cluster.lost[:1] == ["while it loads"]:
            self._cluster.lost.pop(0)
            raise ReplicaLost("the node is gone")
        if self._cluster.launched <= self._cluster.failing_starts:
            raise RuntimeError("no memory")
        return {"engine": "fake"}

    async def canary(self) -> Canary | None:
        if not self._cluster.gold_logprobs:
            return None
        gold = np.array([-1.0, self._cluster.gold_logprobs[self._number]], np.float32)
        engine = {"engine_version": "1", "quantization": None, "dtype": "bfloat16"}
        return Canary(engine | {"device": f"gpu {self._number}"}, gold, gold[:, None])

    async def compare_with_transformers(self) -> Comparison:
        self._cluster.comparisons += 1
        await asyncio.sleep(0)
        return Comparison(None, num_tokens=128, mean=0.25, tolerance=0.5)

    async def run(self, task: NumbersTask | ControlTask) -> list[int]:
        cluster = self._cluster
        if cluster.is_sick:
            for _ in range(5):  # until what began before is done
                await asyncio.sleep(0)
            raise TeacherError("broken rows")
        if isinstance(task, ControlTask):
            return []
        cluster.calls[task.numbers] += 1
        cluster.in_flight += 1
        cluster.most_in_flight = max(cluster.most_in_flight, cluster.in_flight)
        try:
            await asyncio.sleep(0)
            if cluster.lost[:1] == ["while it works"]:
                cluster.lost.pop(0)
                raise ReplicaLost("the node is gone")
            if cluster.deadly & set(task.numbers):
                self._death.set()
            if cluster.deadly_once & set(task.numbers):
                cluster.deadly_once.clear()
                self._death.set()
            await asyncio.sleep(0)
            if self._death.is_set():
                raise ReplicaDied("killed")
            for number in task.numbers:
                if number in cluster.raising:
                    raise cluster.raising[number]
            return list(task.numbers)
        finally:
            cluster.in_flight -= 1

    async def waits_for(self) -> None: ...

    async def peak_memory_bytes(self) -> int:
        return 7

    async def stop(self) -> None:
        assert not self._stopped
        self._stopped = True
        self._cluster.alive -= 1


def run(cluster: Cluster, sizes: list[int], replicas: int = 2) -> tuple[PoolReport, list, list]:
    quarantined: list[tuple[int, str]] = []
    seen: list[tuple[int, int]] = []
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    tasks = [
        NumbersTask(tuple(range(start, start + size)), quarantined)
        for start, size in zip(starts, sizes, strict=True)
    ]
    dispatcher = Dispatcher(
        "fake", cluster.launch, replicas, tasks, lambda done, total, _: seen.append((done, total))
    )
    try:
        report = asyncio.run(asyncio.wait_for(dispatcher.run(), timeout=20))
    finally:
        assert cluster.alive == 0
    return report, quarantined, seen


def numbers(report: PoolReport) -> list[int]:
    return sorted(number for result in report.results for number in result)


def test_all_results_arrive_once_and_several_tasks_are_in_flight() -> None:
    cluster = Cluster()
    report, quarantined, seen = run(cluster, [4] * 10, replicas=2)
    assert numbers(report) == list(range(40))
    assert not quarantined
    assert [done for done, _ in seen] == list(range(4, 41, 4))
    assert cluster.launched == 2
    assert 2 < cluster.most_in_flight <= 2 * TASKS_IN_FLIGHT
    assert [engine["peak_memory_bytes"] for engine in report.engines] == [7, 7]


def test_no_more_replicas_than_tasks_and_none_for_no_task() -> None:
    cluster = Cluster()
    run(cluster, [3], replicas=5)
    assert cluster.launched == 1
    assert run(Cluster(), [], replicas=5)[0].results == []


@pytest.mark.parametrize("size", [1, 2, 7, 16])
@pytest.mark.parametrize("place", ["raising", "deadly"])
def test_one_bad_item_is_found_and_the_rest_is_done(size: int, place: str) -> None:
    bad = size + size // 2
    cluster = Cluster(raising={bad: TeacherError("bad row")} if place == "raising" else {})
    cluster.deadly = {bad} if place == "deadly" else set()
    report, quarantined, _ = run(cluster, [size] * 3, replicas=1)
    assert numbers(report) == [n for n in range(3 * size) if n != bad]
    assert [number for number, _ in quarantined] == [bad]
    assert [label for label, _ in report.quarantined] == [f"task ({bad},)"]
    assert report.num_deaths == 0 if place == "raising" else report.num_deaths >= 2


def test_bystanders_of_a_death_are_not_cut() -> None:
    cluster = Cluster(deadly={0})
    run(cluster, [1, 4, 4], replicas=1)
    assert not {calls for calls in cluster.calls if len(calls) in (2, 3)}


def test_a_death_without_a_culprit_costs_nothing() -> None:
    cluster = Cluster(failing_starts=1)
    report, quarantined, _ = run(cluster, [4] * 3, replicas=1)
    assert numbers(report) == list(range(12))
    assert (report.num_deaths, quarantined) == (1, [])


def test_work_of_a_lost_replica_is_not_kept_from_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dispatch, "reminders", lambda: itertools.repeat(0.01))
    monkeypatch.setattr(dispatch, "PATIENCE_SECONDS", 0.05)
    cluster = Cluster(deadly_once={0}, room=2)
    report, quarantined, _ = run(cluster, [4] * 12, replicas=2)
    assert numbers(report) == list(range(48))
    assert (report.num_deaths, quarantined) == (1, [])


def test_replicas_within_the_tolerance_share_the_work() -> None:
    report, _, _ = run(Cluster(gold_logprobs=[-2.0, -2.0625]), [4] * 4, replicas=2)
    assert numbers(report) == list(range(16))
    assert len(report.engines) == 2


def test_replicas_that_disagree_are_refused_with_both_values() -> None:
    cluster = Cluster(gold_logprobs=[-2.0, -2.5])
    with pytest.raises(TeacherError, match=r"-2\.00000 on gpu 0 and -2\.50000 on gpu 1") as refusal:
        run(cluster, [4] * 4, replicas=2)
    assert "mean difference 0.25 nats" in str(refusal.value)
    assert "tolerance 0.14 (bfloat16)" in str(refusal.value)


def test_the_successor_of_a_dead_replica_is_compared_with_the_first() -> None:
    cluster = Cluster(deadly_once={5}, gold_logprobs=[-2.0, -3.0])
    with pytest.raises(TeacherError, match=r"-2\.00000 on gpu 0 and -3\.00000 on gpu 1"):
        run(cluster, [4] * 4, replicas=1)


def test_the_first_engine_alone_is_compared_with_transformers_before_any_works() -> None:
    cluster = Cluster(gold_logprobs=[-2.0, -2.0])
    seen: list[tuple[Comparison | None, int]] = []

    def check(canary: Canary) -> None:
        seen.append((canary.comparison, cluster.most_in_flight))

    tasks = [NumbersTask((number,), []) for number in range(4)]
    dispatcher = Dispatcher("fake", cluster.launch, 2, tasks, None, check, True)
    report = asyncio.run(dispatcher.run())
    (first, working), *others = seen
    assert cluster.comparisons == 1 and working == 0
    assert first is not None and all(comparison is None for comparison, _ in others)
    said = [engine["comparison"] for engine in report.engines if "comparison" in engine]
    assert said == ["0.25 nats from transformers in the mean of 128 tokens, tolerance 0.5"]


def test_an_engine_whose_canary_is_refused_does_nothing() -> None:
    def refuse(canary: Canary) -> None:
        raise TeacherError(f"{canary.engine['device']} is not what started the cache")

    cluster, quarantined = Cluster(gold_logprobs=[-2.0]), []
    task = NumbersTask((0, 1), quarantined)
    with pytest.raises(TeacherError, match="gpu 0 is not what started the cache"):
        asyncio.run(Dispatcher("fake", cluster.launch, 1, [task], check_canary=refuse).run())
    assert not cluster.calls and cluster.alive == 0


def test_an_engine_that_never_starts_is_given_up() -> None:
    cluster = Cluster(failing_starts=99)
    with pytest.raises(TeacherError, match="no memory"):
        run(cluster, [4] * 3, replicas=1)
    assert cluster.launched == 2


def test_an_engine_that_dies_of_everything_is_given_up() -> None:
    cluster = Cluster(deadly=set(range(64)))
    with pytest.raises(TeacherError, match="6 replicas died in a row and no task was finished"):
        run(cluster, [16] * 4, replicas=1)


def test_when_everything_fails_nothing_is_quarantined() -> None:
    cluster = Cluster(raising={n: TeacherError("broken") for n in range(64)})
    quarantined: list[tuple[int, str]] = []
    task = NumbersTask(tuple(range(64)), quarantined)
    with pytest.raises(TeacherError, match="broken"):
        asyncio.run(Dispatcher("fake", cluster.launch, 1, [task]).run())
    assert not quarantined


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_sick_engine_condemns_no_item_however_few_there_are(size: int) -> None:
    quarantined: list[tuple[int, str]] = []
    cluster, task = Cluster(is_sick=True), NumbersTask(tuple(range(size)), quarantined)
    with pytest.raises(TeacherError, match=r"broken rows.*control task fails as well"):
        asyncio.run(Dispatcher("fake", cluster.launch, 1, [task]).run())
    assert not quarantined


def test_an_engine_that_falls_sick_before_the_last_items_condemns_none() -> None:
    quarantined: list[tuple[int, str]] = []
    count = TASKS_IN_FLIGHT + 1  # the last one is taken when the first is done
    tasks = [NumbersTask((2 * n, 2 * n + 1), quarantined) for n in range(count)]
    cluster = Cluster()

    def fall_sick(done: int, total: int, _: object) -> None:
        cluster.is_sick = True

    with pytest.raises(TeacherError, match="control task fails as well"):
        asyncio.run(Dispatcher("fake", cluster.launch, 1, tasks, fall_sick).run())
    assert not quarantined


def test_replies_older_than_a_failure_do_not_condemn_its_item() -> None:
    """The engine falls sick while two tasks are half done; the items that the later task has done
    say nothing about the items of the other.
    """
    quarantined: list[tuple[int, str]] = []
    first, second = (NumbersTask(pair, quarantined) for pair in ((0, 1), (2, 3)))
    has_begun, was_set_aside = asyncio.Event(), asyncio.Event()

    class HalfDone(FakeReplica):
        async def run(self, task: NumbersTask | ControlTask) -> list[int]:
            if task is first:
                await has_begun.wait()
            if task is second:
                has_begun.set()
                await was_set_aside.wait()
            if task in (first, second):
                assert isinstance(task, NumbersTask)
                number, other = task.numbers
                alone = NumbersTask((other,), quarantined)
                raise ItemsFailedError([number], [(alone, "out of memory")])
            if isinstance(task, NumbersTask) and task.numbers == (1,):
                asyncio.get_running_loop().call_later(0.01, was_set_aside.set)
            raise TeacherError("out of memory")

    cluster = Cluster(launched=1, alive=1)
    dispatcher = Dispatcher("fake", lambda: HalfDone(cluster), 1, [first, second])
    with pytest.raises(TeacherError, match=r"2 items failed.*control task fails as well"):
        asyncio.run(asyncio.wait_for(dispatcher.run(), timeout=20))
    assert not quarantined


@pytest.mark.parametrize("size", [1, 4, 8])
def test_items_that_fail_on_a_sound_engine_are_quarantined(size: int) -> None:
    cluster = Cluster(raising={n: TeacherError("too odd") for n in range(size)})
    report, quarantined, seen = run(cluster, [size], replicas=1)
    assert sorted(quarantined) == [(n, "too odd") for n in range(size)]
    assert (report.results, seen) == ([], [])


def test_an_only_item_that_kills_its_engine_is_quarantined() -> None:
    report, quarantined, _ = run(Cluster(deadly={0}), [1], replicas=1)
    assert [number for number, _ in quarantined] == [0] and report.num_deaths == 2


def test_a_full_disk_is_no_fault_of_the_items() -> None:
    cluster = Cluster(raising={5: StorageError("disk is full")})
    with pytest.raises(StorageError, match="full"):
        run(cluster, [8, 8], replicas=1)
    assert (1,) not in cluster.calls


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LONGEST_PAUSE_SECONDS", 0.0)


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize(
    "lost",
    [
        ["while it loads"],
        ["while it loads", "before it has a node"],
        ["before it has a node"] * 9,
        ["while it loads", "before it has a node"] * 6,
        ["while it works", "before it has a node"] * 6,
    ],
    ids=lambda lost: f"{len(lost)}: {', '.join(dict.fromkeys(lost))}",
)
def test_lost_nodes_end_no_work_and_no_task_is_to_blame(lost: list[str]) -> None:
    cluster = Cluster(lost=list(lost))
    report, quarantined, _ = run(cluster, [1], replicas=1)
    assert (numbers(report), quarantined) == ([0], [])
    assert (report.num_deaths, cluster.launched) == (len(lost), len(lost) + 1)
    assert set(cluster.calls) == {(0,)}, "nothing was cut in halves"


@pytest.mark.usefixtures("no_pause")
def test_work_that_loses_its_nodes_again_and_again_is_given_up() -> None:
    cluster = Cluster(lost=["while it loads"] * 99)
    with pytest.raises(TeacherError, match=r"21 replicas in a row were lost.*the node is gone"):
        run(cluster, [4] * 3, replicas=1)
    assert cluster.launched == 21


def test_deaths_shortly_before_their_node_was_missed_do_not_count() -> None:
    """A node that is shut down in order ends its processes first, and the cluster sees it later."""
    cluster = Cluster(failing_starts=4, gone={0, 1, 2})
    report, _, _ = run(cluster, [4] * 3, replicas=1)
    assert numbers(report) == list(range(12)) and cluster.launched == 5
    with pytest.raises(TeacherError, match="2 replicas died in a row"):
        run(Cluster(failing_starts=5, gone={0, 1, 2}), [4] * 3, replicas=1)


def test_a_wait_for_room_says_what_is_needed_early_and_then_less_and_less_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert list(itertools.islice(reminders(), 9)) == [10, 20, 40, 80, 160, 320, 600, 600, 600]
    monkeypatch.setattr(dispatch, "reminders", lambda: iter([0.01, 0.02, 20.0]))
    cluster, tasks = Cluster(room=1), [NumbersTask((n,), []) for n in range(2)]
    cluster.raising = {}

    async def work() -> None:
        room = "0.5 teacher_node needed"
        dispatcher = Dispatcher("fake", cluster.launch, 1, tasks, room=lambda: room)
        working = asyncio.create_task(dispatcher.run())
        while len(lines) < 2:
            await asyncio.sleep(0.01)
        working.cancel()

    cluster.room = 0
    with logged("teachers") as lines:
        asyncio.run(asyncio.wait_for(work(), timeout=20))
    assert all(line.endswith("for a node: 0.5 teacher_node needed") for line in lines), lines


def test_room_is_told_as_people_say_it() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "node:10.0.0.1": 1.0, "memory": 1e9}},
        {"Alive": True, "Resources": {"CPU": 2.0, "teacher_node": 1.0}},
        {"Alive": True, "Resources": {"CPU": 2.0, "teacher_node": 1.0}},
        {"Alive": True, "Resources": {}},
        {"Alive": False, "Resources": {"GPU": 8.0}},
    ]
    needs = Resources(num_cpus=1, custom={"teacher_node": 0.5})
    free = {"CPU": 3.5, "memory": 1e9, "node:10.0.0.1": 1.0}
    assert room_in_words(needs, nodes, free) == (
        "1 CPU + 0.5 teacher_node needed; nodes have 4 CPU, 2 x (2 CPU + 1 teacher_node), "
        "nothing; free in all: 3.5 CPU"
    )
    assert room_in_words(Resources(num_gpus=1, num_cpus=0), [], {}) == (
        "1 GPU needed; nodes have nothing; free in all: nothing"
    )


def test_placement_names_request_and_nodes() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "node:10.0.0.1": 1.0}},
        {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}},
    ]
    check_placement("small", Resources(num_cpus=4), nodes)
    with pytest.raises(ClusterError, match=r"big: 1 CPU \+ 2 GPU needed, nodes have 4 CPU;"):
        check_placement("big", Resources(num_gpus=2), nodes)


def test_placement_of_several_counts_what_each_node_holds() -> None:
    nodes = [
        {"Alive": True, "Resources": {"CPU": 5.0, "slot": 1.0}},
        {"Alive": True, "Resources": {"CPU": 3.0, "slot": 1.0}},
    ]
    worker = Resources(num_cpus=2, custom={"slot": 0.1})
    check_placement("workers", worker, nodes, count=3)
    with pytest.raises(ClusterError, match=r"4 x \(2 CPU"):
        check_placement("workers", worker, nodes, count=4)
    check_placement("tenths", Resources(num_cpus=0, custom={"slot": 0.1}), nodes[:1], count=10)


def test_environment_of_the_user_and_of_the_job_wins() -> None:
    mine = engine_env_vars(
        Resources(), {"VLLM_LOGGING_LEVEL": "DEBUG"}, {"VLLM_CPU_KVCACHE_SPACE": "4"}
    )
    assert mine["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert "VLLM_CPU_KVCACHE_SPACE" not in mine
    assert mine["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert mine["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    bound = engine_env_vars(Resources(), {"VLLM_CPU_OMP_THREADS_BIND": "0-7"}, {})
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in bound, "only a worker process binds threads"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in engine_env_vars(Resources(num_gpus=1), {}, {})
