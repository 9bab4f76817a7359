"""Notice that a node goes away: asked seldom, by all workers at the same steps."""

import os
import signal
import threading
from datetime import datetime

import pytest
import torch.distributed as dist

from students import departure
from students.departure import ASK_SECONDS, Departure, steps_between
from students.launching.preemption import going_away, heed_sigterm, notices_heeded


@pytest.mark.parametrize(
    ("seconds", "steps"), [(0.01, 500), (1.0, 5), (3.0, 1), (600.0, 1), (0.0, 5_000_000)]
)
def test_a_question_comes_about_every_few_seconds(seconds: float, steps: int) -> None:
    assert ASK_SECONDS == 5.0
    assert steps_between(seconds) == steps


class Workers:
    """A second worker, whose answers are given, beside the one that is tested."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.asked = 0.0, []
        self.other: tuple[str | None, float] = (None, 0.0)
        monkeypatch.setattr(departure.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(dist, "all_gather_object", self.gather)

    def gather(self, answers: list, own: tuple) -> None:
        self.asked.append(own)
        answers[:] = [own, self.other]


def asked_at(workers: Workers, steps: range, seconds: float) -> list[int]:
    ask, found = Departure(lambda: None), []
    for step in steps:
        workers.now += seconds
        count = len(workers.asked)
        assert ask.after_step(step) is None
        found += [step] * (len(workers.asked) - count)
    return found


def test_questions_become_rare_where_steps_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked_at(Workers(monkeypatch), range(1, 1000), 0.01) == [
        *(1, 3, 7, 15, 31, 63, 127, 255, 511)
    ]


def test_a_resumed_training_asks_after_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked_at(Workers(monkeypatch), range(301, 321), 1.0)[:4] == [301, 303, 307, 312]


def test_the_slowest_worker_sets_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(monkeypatch)
    workers.other = (None, 2.4)
    assert asked_at(workers, range(1, 12), 0.01) == [1, 3, 5, 7, 9, 11]


def test_the_notice_of_one_worker_reaches_all(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers(monkeypatch)
    workers.other = ("node n-s2 (10.77.0.13) goes away soon", 1.0)
    assert Departure(lambda: None).after_step(1) == "node n-s2 (10.77.0.13) goes away soon"


def test_a_line_names_nodes_and_time() -> None:
    at = datetime(2026, 1, 2, 12, 3, 20).timestamp() * 1000
    assert going_away(["n-s1 (10.77.0.12)"], int(at)) == (
        "node n-s1 (10.77.0.12) goes away at 12:03:20"
    )
    assert going_away(["a", "b"], None) == "nodes a, b go away soon"
    assert going_away([], None) == "node of a worker goes away soon"


def test_sigterm_is_a_notice_while_steps_are_taken_and_ends_the_process_otherwise() -> None:
    before, ended = signal.getsignal(signal.SIGTERM), threading.Event()
    try:
        signal.signal(signal.SIGTERM, lambda *_: ended.set())
        heed_sigterm()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended.is_set()
        ended.clear()
        with notices_heeded():
            os.kill(os.getpid(), signal.SIGTERM)
            assert not ended.is_set()
            os.kill(os.getpid(), signal.SIGTERM)  # whoever asks twice does not want to wait
            assert ended.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
