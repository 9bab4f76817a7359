"""Lines for the driver's log: told once, in order, and a wait is not silent."""

from datetime import datetime
from pathlib import Path

import pytest

from pipeline.messages import resources_in_words
from students.launching.notices import Notices, give_notice

START = datetime(2026, 1, 2, 12, 0, 0).timestamp()


@pytest.fixture
def notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Notices:
    monkeypatch.setattr("students.launching.notices.time.time", lambda: START)
    return Notices(str(tmp_path), "2 workers of 1 CPU each", lambda: "1 CPU")


def test_lines_are_told_once_and_in_order(tmp_path: Path, notices: Notices) -> None:
    assert notices.lines(START) == []
    for text in ("runs on n-s1", "resumed from step 60"):
        give_notice(str(tmp_path), text, waits=False)
    assert sorted(notices.lines(START)) == ["resumed from step 60", "runs on n-s1"]
    assert notices.lines(START) == []


def test_a_wait_for_workers_is_told_again_and_again(tmp_path: Path, notices: Notices) -> None:
    told = [second for second in range(1000) if notices.lines(START + second)]
    assert told == [30, 90, 390, 690, 990]


def test_a_reminder_says_since_when_for_what_and_what_there_is(notices: Notices) -> None:
    (line,) = notices.lines(START + 30)
    assert line == ("waits since 12:00:00 for 2 workers of 1 CPU each; the cluster has 1 CPU free")


def test_a_training_that_runs_waits_for_nothing_until_a_worker_is_lost(
    tmp_path: Path, notices: Notices
) -> None:
    give_notice(str(tmp_path), "runs on n-s1", waits=False)
    assert notices.lines(START + 10) == ["runs on n-s1"]
    assert notices.lines(START + 10_000) == []
    give_notice(str(tmp_path), "failed", waits=True)
    assert notices.lines(START + 20_000) == ["failed"]
    assert notices.lines(START + 20_029) == []
    assert len(notices.lines(START + 20_030)) == 1


@pytest.mark.parametrize(
    ("resources", "text"),
    [
        ({"CPU": 1.0}, "1 CPU"),
        ({"CPU": 1.0, "student_node": 0.6}, "1 CPU + 0.6 student_node"),
        ({"CPU": 0.0, "GPU": 8.0}, "8 GPU"),
        ({"GPU": 0.0}, "nothing"),
        ({}, "nothing"),
    ],
)
def test_resources_are_described(resources: dict[str, float], text: str) -> None:
    assert resources_in_words(resources) == text
