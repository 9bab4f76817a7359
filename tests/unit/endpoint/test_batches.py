"""Requests in batches of a provider: few batches, found again after a death, paid for once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.config.student import StudentConfig
from pipeline.config.teachers import EndpointConfig
from pipeline.errors import ConfigError
from pipeline.layout import Layout
from pipeline.records import AnswerEnds, Prompt
from pipeline.synthesis.answered_shards import read_answered_shards
from teachers.endpoint import batches
from teachers.endpoint.teacher import EndpointTeacher
from teachers.pool import dispatch
from teachers.pool.contracts import PoolReport
from teachers.pool.dispatch import Dispatcher
from teachers.protocol import EndpointSpec
from teachers.tasks.answer import AnswerTask, plan_answers
from tests.support.endpoints import FakeBatchApi, Json, Loopback, Response, chat_reply, loopback
from tests.support.replicas import EndpointReplica
from tests.support.tokenizers_for_tests import save_byte_tokenizer

NAMES = [f"prompt {number}" for number in range(40)]
REFUSED = Response.of({"error": "your input was flagged"}, 400)


async def soon(seconds: float) -> None:
    """Stand-in for `asyncio.sleep` that waits a little, so that others can go on."""
    await asyncio.sleep(0.02)


@pytest.fixture
def student(tmp_path: Path) -> StudentConfig:
    save_byte_tokenizer(tmp_path / "student")
    return StudentConfig(model=str(tmp_path / "student"), initialization="random")


def spec_of(student: StudentConfig, url: str, folder: Path, **settings: Any) -> EndpointSpec:
    values = {"url": url, "model": "m", "api": "openai", "scores": False, "batch": True}
    endpoint = EndpointConfig.model_validate(values | {"max_retries": 0} | settings)
    return EndpointSpec(endpoint, student, 64, batches_folder=str(folder / "batches"))


def tasks_of(student: StudentConfig, folder: Path, samples: int = 1) -> list[AnswerTask]:
    layout = Layout(str(folder / "root"), "run")
    ends, sampling = AnswerEnds(1, 1), {"max_tokens": 50}
    template = AnswerTask(layout, "t", "recipe", (), student, sampling, samples, None, 1, ends)
    return plan_answers(template, [chat(name) for name in NAMES], 10)


def chat(name: str) -> Prompt:
    return Prompt(name, "d", "train", messages=({"role": "user", "content": name},))


def dispatched(
    spec: EndpointSpec, tasks: Sequence[AnswerTask], seconds: float = 60
) -> PoolReport | ValueError:
    """Report or error of all tasks at once, as the pool has them where requests wait."""
    replica = lambda: EndpointReplica(spec, soon)  # noqa: E731
    dispatcher = Dispatcher("writer", replica, 1, tasks, tasks_in_flight=len(tasks))
    try:
        return asyncio.run(asyncio.wait_for(dispatcher.run(), seconds))
    except ValueError as error:
        return error


def finished(tasks: Sequence[AnswerTask]) -> set[str]:
    shards = read_answered_shards(tasks[0].layout, "recipe")
    return {name for shard in shards for name in shard.prompts if name not in shard.errors}


def asked_at_once(server: Loopback) -> list[str]:
    bodies = server.bodies("/v1/chat/completions")
    return [body["messages"][-1]["content"] for body in bodies]


def test_all_tasks_share_one_batch_and_the_first_request_goes_before_it(
    student: StudentConfig, tmp_path: Path
) -> None:
    api, tasks = FakeBatchApi(lambda text: chat_reply(f"answer to {text}")), []
    with loopback(api) as server:
        tasks = tasks_of(student, tmp_path, samples=2)
        report = dispatched(spec_of(student, server.url, tmp_path), tasks)
    assert isinstance(report, PoolReport) and finished(tasks) == set(NAMES)
    (requests,) = api.batches.values()
    assert len(requests) == 2 * len(NAMES) - 1 and len(asked_at_once(server)) == 1
    assert len({request["custom_id"] for request in requests}) == len(requests)
    assert {(request["method"], request["url"]) for request in requests} == {
        ("POST", "/v1/chat/completions")
    }
    assert requests[0]["body"]["model"] == "m" and "seed" in requests[0]["body"]
    (begun,) = api.begun.values()
    assert begun["endpoint"] == "/v1/chat/completions" and begun["completion_window"] == "24h"


def test_a_run_that_died_finds_its_batch_and_pays_for_nothing_twice(
    student: StudentConfig, tmp_path: Path
) -> None:
    api = FakeBatchApi(lambda text: chat_reply("yes"), status=lambda polls: "in_progress")
    with loopback(api) as server:
        spec, tasks = spec_of(student, server.url, tmp_path), tasks_of(student, tmp_path)
        with pytest.raises(TimeoutError):
            dispatched(spec, tasks, seconds=2)
        assert len(api.batches) == 1 and finished(tasks) == set()
        api.status = lambda polls: "completed"
        report = dispatched(spec, tasks)
    assert isinstance(report, PoolReport) and finished(tasks) == set(NAMES)
    assert len(api.batches) == 1, "the second run began none"
    assert len(asked_at_once(server)) == 2, "each run sees first that its requests are taken"


def test_the_stage_says_what_it_waits_for(
    student: StudentConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(dispatch, "WATCH_SECONDS", 0.05)
    caplog.set_level("INFO", "teachers")
    api = FakeBatchApi(
        lambda text: chat_reply("yes"), lambda polls: "completed" if polls > 20 else "in_progress"
    )
    with loopback(api) as server:
        tasks = tasks_of(student, tmp_path)
        assert isinstance(dispatched(spec_of(student, server.url, tmp_path), tasks), PoolReport)
    said = [record.getMessage() for record in caplog.records if "waits" in record.getMessage()]
    assert said == ["writer waits: batch batch-0: in_progress, 0 of 39 requests"]


def test_a_batch_that_nobody_recorded_is_known_by_its_mark(
    student: StudentConfig, tmp_path: Path
) -> None:
    api = FakeBatchApi(lambda text: chat_reply("yes"), status=lambda polls: "in_progress")
    with loopback(api) as server:
        spec, tasks = spec_of(student, server.url, tmp_path), tasks_of(student, tmp_path)
        with pytest.raises(TimeoutError):
            dispatched(spec, tasks, seconds=2)
        for info in storage.list_files(str(tmp_path / "batches"), ".json"):
            storage.remove(str(tmp_path / "batches" / info.base_name))
        api.status = lambda polls: "completed"
        assert isinstance(dispatched(spec, tasks), PoolReport)
    assert len(api.batches) == 1 and finished(tasks) == set(NAMES)


def test_a_batch_that_the_provider_has_forgotten_is_sent_anew(
    student: StudentConfig, tmp_path: Path
) -> None:
    api = FakeBatchApi(lambda text: chat_reply("yes"), status=lambda polls: "in_progress")
    with loopback(api) as server:
        spec, tasks = spec_of(student, server.url, tmp_path), tasks_of(student, tmp_path)
        with pytest.raises(TimeoutError):
            dispatched(spec, tasks, seconds=2)
        api.batches.clear()
        api.status = lambda polls: "completed"
        assert isinstance(dispatched(spec, tasks), PoolReport)
    assert len(api.batches) == 1 and finished(tasks) == set(NAMES)


def test_what_an_expired_batch_left_goes_into_the_next(
    student: StudentConfig, tmp_path: Path
) -> None:
    lost = {*NAMES[5:9], *NAMES[20:22]}
    api = FakeBatchApi(lambda text: chat_reply("yes"))
    api.answered = lambda line: (
        line["body"]["messages"][-1]["content"] not in lost or len(api.batches) > 1
    )
    with loopback(api) as server:
        tasks = tasks_of(student, tmp_path)
        report = dispatched(spec_of(student, server.url, tmp_path), tasks)
    assert isinstance(report, PoolReport) and finished(tasks) == set(NAMES)
    _, *later = api.batches.values()
    again = [line["body"]["messages"][-1]["content"] for batch in later for line in batch]
    assert sorted(again) == sorted(lost), "only the lost ones are sent again"


def test_a_refused_request_costs_one_more_and_no_second_batch(
    student: StudentConfig, tmp_path: Path
) -> None:
    api = FakeBatchApi(lambda text: REFUSED if text == NAMES[7] else chat_reply("yes"))
    with loopback(api) as server:
        tasks = tasks_of(student, tmp_path)
        report = dispatched(spec_of(student, server.url, tmp_path), tasks)
    assert isinstance(report, PoolReport) and len(report.quarantined) == 1
    assert len(api.batches) == 1 and asked_at_once(server).count(NAMES[7]) == 1
    assert finished(tasks) == set(NAMES) - {NAMES[7]}


def test_a_batch_that_the_provider_fails_ends_the_work_with_its_words(
    student: StudentConfig, tmp_path: Path
) -> None:
    api = FakeBatchApi(lambda text: chat_reply("yes"), status=lambda polls: "failed")
    with loopback(api) as server:
        error = dispatched(spec_of(student, server.url, tmp_path), tasks_of(student, tmp_path))
    assert type(error) is ConfigError and "the provider failed batch batch-0 of m" in str(error)


def test_a_request_that_the_server_does_not_take_begins_no_batch(
    student: StudentConfig, tmp_path: Path
) -> None:
    unknown = Response.of({"error": "unknown field seed"}, 422)
    api = FakeBatchApi(lambda text: unknown)
    with loopback(api) as server:
        error = dispatched(spec_of(student, server.url, tmp_path), tasks_of(student, tmp_path))
    assert type(error) is ConfigError and "unknown field seed" in str(error)
    assert api.batches == {} and len(asked_at_once(server)) == 4


def test_what_a_partly_done_batch_lost_goes_into_one_more(
    student: StudentConfig, tmp_path: Path
) -> None:
    api = FakeBatchApi(lambda text: chat_reply("yes"))
    api.answered = lambda line: (
        len(api.batches) > 1 or int(line["body"]["messages"][-1]["content"].split()[1]) % 2 == 0
    )
    with loopback(api) as server:
        tasks = tasks_of(student, tmp_path)
        assert isinstance(dispatched(spec_of(student, server.url, tmp_path), tasks), PoolReport)
    assert sorted(map(len, api.batches.values())) == [20, 39] and finished(tasks) == set(NAMES)


def test_a_batch_that_answers_nothing_ends_the_work(student: StudentConfig, tmp_path: Path) -> None:
    api = FakeBatchApi(lambda text: chat_reply("yes"))
    api.answered = lambda line: False
    with loopback(api) as server:
        tasks = tasks_of(student, tmp_path)
        error = dispatched(spec_of(student, server.url, tmp_path), tasks)
        assert type(error) is ConfigError and "without a reply to any of its 39" in str(error)
        assert len(api.batches) == 1
        api.answered = lambda line: True
        assert isinstance(dispatched(spec_of(student, server.url, tmp_path), tasks), PoolReport)
    assert len(api.batches) == 2 and finished(tasks) == set(NAMES), "the dead one is not found"


def test_lines_that_cannot_be_read_cost_no_others(student: StudentConfig, tmp_path: Path) -> None:
    class Cutting(FakeBatchApi):
        def _line(self, request: Json) -> str:
            line = super()._line(request)
            is_first = len(self.batches) == 1
            content = request["body"]["messages"][-1]["content"]
            if is_first and content == NAMES[5]:
                return line[:-20]
            return line.replace("yes", "cut \\ud83d") if content == NAMES[6] else line

    api = Cutting(lambda text: chat_reply("yes"))
    with loopback(api) as server:
        tasks = tasks_of(student, tmp_path)
        assert isinstance(dispatched(spec_of(student, server.url, tmp_path), tasks), PoolReport)
    assert sorted(map(len, api.batches.values())) == [1, 39] and finished(tasks) == set(NAMES)


def test_a_batch_that_was_begun_behind_a_failing_gateway_is_not_begun_twice(
    student: StudentConfig, tmp_path: Path
) -> None:
    api, failed = FakeBatchApi(lambda text: chat_reply("yes")), []

    def respond(path: str, body: Json) -> Response:
        response = api(path, body)
        if path == "/v1/batches" and body and not failed:
            failed.append(path)
            return Response.of({"error": "gateway timeout"}, 504)
        return response

    with loopback(respond) as server:
        tasks = tasks_of(student, tmp_path)
        assert isinstance(dispatched(spec_of(student, server.url, tmp_path), tasks), PoolReport)
    assert failed and len(api.batches) == 1 and finished(tasks) == set(NAMES)


def test_an_outage_while_a_batch_runs_is_waited_for(student: StudentConfig, tmp_path: Path) -> None:
    api, looks = FakeBatchApi(lambda text: chat_reply("yes")), []

    def respond(path: str, body: Json) -> Response:
        if path.startswith("/v1/batches/batch"):
            looks.append(path)
            if len(looks) < 5:
                return Response.of({"error": "busy"}, 503)
        return api(path, body)

    with loopback(respond) as server:
        tasks = tasks_of(student, tmp_path)
        report = dispatched(spec_of(student, server.url, tmp_path), tasks)
    assert isinstance(report, PoolReport) and report.num_deaths == 0
    assert len(api.batches) == 1 and len(asked_at_once(server)) == 1


def test_batches_have_bounds(
    student: StudentConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MAX_REQUESTS", 16)
    api = FakeBatchApi(lambda text: chat_reply("yes"))
    with loopback(api) as server:
        tasks = tasks_of(student, tmp_path)
        assert isinstance(dispatched(spec_of(student, server.url, tmp_path), tasks), PoolReport)
    assert sorted(map(len, api.batches.values())) == [7, 16, 16]
    assert finished(tasks) == set(NAMES)


def test_equal_requests_have_answers_of_their_own(student: StudentConfig, tmp_path: Path) -> None:
    api = FakeBatchApi(lambda text: chat_reply("yes"))
    with loopback(api) as server:
        spec = spec_of(student, server.url, tmp_path, request={"omit": ["seed"]})

        async def run() -> int:
            teacher = await EndpointTeacher.start(spec, soon)
            try:
                answers = await teacher.generate([3], {"max_tokens": 5, "seed": 1}, 4, chat("a"))
                return len(answers)
            finally:
                teacher.shutdown()
                await asyncio.sleep(0)

        assert asyncio.run(run()) == 4
    (requests,) = api.batches.values()
    assert len({request["custom_id"] for request in requests}) == 3
