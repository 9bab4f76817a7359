"""One prompt that a server refuses, among many: how often each prompt is asked, what is kept, and
what is quarantined.
"""

import asyncio
import pickle
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.student import StudentConfig
from pipeline.config.teachers import EndpointConfig
from pipeline.errors import ConfigError, TeacherError
from pipeline.layout import Layout
from pipeline.records import AnswerEnds, Prompt
from pipeline.synthesis.answered_shards import read_answered_shards
from pipeline.synthesis.rewriting import PromptRequest
from teachers.endpoint.teacher import EndpointTeacher
from teachers.pool.contracts import PoolReport, Task
from teachers.pool.dispatch import Dispatcher
from teachers.protocol import EndpointSpec, ItemsFailedError
from teachers.tasks.answer import AnswerTask, plan_answers
from teachers.tasks.control import CONTROL_MESSAGE
from teachers.tasks.judge import JudgeTask, plan_judging, read_grades
from teachers.tasks.rewrite import RewriteTask, plan_rewrites
from tests.support.endpoints import Json, Loopback, Response, at_once, by_text, chat_reply, loopback
from tests.support.replicas import EndpointReplica
from tests.support.tokenizers_for_tests import save_byte_tokenizer

COUNT = 64
REFUSED = Response.of({"error": "your input was flagged"}, 400)
CONTROL = CONTROL_MESSAGE["content"]


def asked_of(server: Loopback) -> Counter[str]:
    """Number of requests for each prompt."""
    return Counter(body["messages"][-1]["content"] for _, body, _ in server.requests)


class Tasks:
    """Shards of each kind, of prompts that are their own ids."""

    def __init__(self, root: Path) -> None:
        self.tokenizer = save_byte_tokenizer(root / "student")
        self.layout = Layout(str(root / "root"), "run")
        self.student = StudentConfig(model=str(root / "student"), initialization="random")
        self.sampling = {"max_tokens": 50}

    def answers(self, names: Sequence[str], per_shard: int = COUNT) -> list[AnswerTask]:
        template = AnswerTask(
            self.layout,
            "t",
            "recipe",
            (),
            self.student,
            self.sampling,
            1,
            None,
            1,
            AnswerEnds(1, 1),
        )
        return plan_answers(template, [chat(name) for name in names], per_shard)

    def rewrites(self, names: Sequence[str]) -> list[RewriteTask]:
        template = RewriteTask(self.layout, "t", "recipe", (), self.student, self.sampling, 1)
        requests = [PromptRequest(chat(name), chat(f"source of {name}")) for name in names]
        return plan_rewrites(template, requests, COUNT)

    def grades(self, names: Sequence[str]) -> list[JudgeTask]:
        template = JudgeTask(self.layout, "recipe", (), self.student, is_bound=False)
        return plan_judging(template, [(name, chat(name)) for name in names], COUNT)

    def finished(self) -> set[str]:
        """Prompts that an answered shard holds without an error."""
        shards = read_answered_shards(self.layout, "recipe")
        names = [name for s in shards for name in s.prompts if name not in s.errors]
        assert len(names) == len(set(names)), "each is done once"
        return set(names)

    def errors(self) -> dict[str, str]:
        shards = read_answered_shards(self.layout, "recipe")
        return {name: error for s in shards for name, error in s.errors.items()}


def chat(name: str) -> Prompt:
    return Prompt(name, "d", "train", messages=({"role": "user", "content": name},))


@pytest.fixture
def tasks(tmp_path: Path) -> Tasks:
    return Tasks(tmp_path)


def dispatched(
    tasks: Tasks, todo: Sequence[Task], reply: Callable[[str], Response], **settings: Any
) -> tuple[PoolReport | ValueError, Loopback]:
    """Report or error of a dispatcher that runs the tasks, and the server that was asked."""
    with loopback(by_text(reply)) as server:
        values = {"url": server.url, "model": "m", "api": "openai", "scores": False}
        endpoint = EndpointConfig.model_validate(values | {"max_retries": 0} | settings)
        spec = EndpointSpec(endpoint, tasks.student, 64)
        dispatcher = Dispatcher("helper", lambda: EndpointReplica(spec, at_once), 1, todo)
        try:
            return asyncio.run(asyncio.wait_for(dispatcher.run(), 60)), server
        except ValueError as error:
            return error, server


NAMES = [f"prompt {number}" for number in range(COUNT)]


@pytest.mark.parametrize("kind", ["answers", "rewrites", "grades"])
def test_one_refused_prompt_costs_no_other_a_second_request(tasks: Tasks, kind: str) -> None:
    todo = getattr(tasks, kind)(NAMES)
    report, server = dispatched(
        tasks, todo, lambda text: REFUSED if text == NAMES[40] else chat_reply("4")
    )
    assert isinstance(report, PoolReport)
    asked = asked_of(server)
    assert {asked[name] for name in NAMES if name != NAMES[40]} == {1}
    assert asked[NAMES[40]] == 2 and asked[CONTROL] == 1 and asked.total() == COUNT + 2
    ((label, error),) = report.quarantined
    assert "flagged" in error and "1 " in label
    if kind == "grades":
        grades = read_grades(tasks.layout, "recipe")
        assert grades == dict.fromkeys(NAMES, 4) | {NAMES[40]: None}
    else:
        assert tasks.finished() == set(NAMES) - {NAMES[40]}
        assert tasks.errors().keys() == {NAMES[40]}
        assert "flagged" in tasks.errors()[NAMES[40]]


def test_many_refusals_in_many_shards_are_no_sign_of_a_sick_server(tasks: Tasks) -> None:
    """No shard is done as a whole, and in the last ones every second prompt is refused."""
    refused = {*NAMES[3:32:8], *NAMES[33::2]}
    report, server = dispatched(
        tasks,
        tasks.answers(NAMES, per_shard=8),
        lambda text: REFUSED if text in refused else chat_reply("yes"),
    )
    assert isinstance(report, PoolReport)
    asked = asked_of(server)
    assert {asked[name] for name in refused} == {2}
    assert {asked[name] for name in NAMES if name not in refused} == {1}
    assert len(report.quarantined) == len(refused) and tasks.errors().keys() == refused
    assert tasks.finished() == set(NAMES) - refused


def test_a_server_that_falls_sick_within_a_shard_condemns_no_prompt(tasks: Tasks) -> None:
    asked: list[str] = []

    def reply(text: str) -> Response:
        asked.append(text)
        return chat_reply("yes") if len(asked) <= 30 else Response.of({"error": "oops"}, 500)

    error, _ = dispatched(tasks, tasks.answers(NAMES), reply, max_concurrency=1)
    assert "34 items failed" in str(error) and "control task fails as well" in str(error)
    assert tasks.errors() == {} and tasks.finished() == set(asked[:30])


def test_where_credit_ends_the_others_are_not_asked_any_more(tasks: Tasks) -> None:
    asked: list[str] = []

    def reply(text: str) -> Response:
        asked.append(text)
        return chat_reply("yes") if len(asked) <= 11 else Response.of({"error": "empty"}, 402)

    error, _ = dispatched(tasks, tasks.answers(NAMES, 10), reply, max_concurrency=1)
    assert type(error) is ConfigError and "no credit left" in str(error)
    # Each of six shards in flight is refused twice at most; what waited for its turn is dropped.
    assert len(asked) < 40 and len(tasks.finished()) == 10 and tasks.errors() == {}


def test_a_shard_whose_prompts_are_all_refused_is_asked_twice(tasks: Tasks) -> None:
    report, _ = dispatched(tasks, tasks.answers(NAMES[:3]), lambda text: REFUSED)
    assert type(report) is ConfigError and tasks.errors() == {}, "the control is refused as well"
    known = {CONTROL: chat_reply("yes")}
    report, server = dispatched(tasks, tasks.answers(NAMES), lambda text: known.get(text, REFUSED))
    assert isinstance(report, PoolReport) and tasks.errors().keys() == set(NAMES)
    asked = asked_of(server)
    assert {asked[name] for name in NAMES} == {2} and asked[CONTROL] <= len(NAMES) / 4


def test_many_refused_prompts_in_shards_of_their_own_say_nothing_against_the_teacher(
    tasks: Tasks,
) -> None:
    known = {CONTROL: chat_reply("yes")}
    todo = tasks.answers(NAMES[:12], per_shard=1)
    report, server = dispatched(tasks, todo, lambda text: known.get(text, REFUSED))
    assert isinstance(report, PoolReport) and tasks.errors().keys() == set(NAMES[:12])
    asked = asked_of(server)
    assert {asked[name] for name in NAMES[:12]} == {2} and asked[CONTROL] <= 4


@pytest.mark.parametrize("message", ["prompt of 9000 tokens exceeds 4096", "Content Exists Risk"])
def test_prompts_that_are_at_fault_end_no_stage(tasks: Tasks, message: str) -> None:
    """Here the first three, and then many in a row; a short question is answered in between."""
    refused = {*NAMES[:3], *NAMES[20:50]}
    long = Response.of({"error": message}, 400)
    report, _ = dispatched(
        tasks, tasks.answers(NAMES), lambda text: long if text in refused else chat_reply("yes")
    )
    assert isinstance(report, PoolReport) and tasks.errors().keys() == refused
    assert tasks.finished() == set(NAMES) - refused


def test_ids_of_requests_do_not_hide_that_a_refusal_is_the_same(tasks: Tasks) -> None:
    def reply(text: str) -> Response:
        return Response.of({"error": "unknown field seed", "request_id": str(uuid.uuid4())}, 400)

    error, server = dispatched(tasks, tasks.answers(NAMES), reply)
    assert type(error) is ConfigError and len(server.requests) == 4


def test_a_server_that_fails_keeps_nobody_waiting_for_the_first(tasks: Tasks) -> None:
    def reply(text: str) -> Response:
        time.sleep(0.05)
        return Response.of({"error": "oops"}, 500)

    error, server = dispatched(tasks, tasks.answers(NAMES), reply)
    assert type(error) is TeacherError and server.open_at_once > 1


UNKNOWN_SEED = Response.of({"detail": [{"type": "extra_forbidden", "loc": ["body", "seed"]}]}, 422)
ODD = Response.of({"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]})


@pytest.mark.parametrize("reply", [UNKNOWN_SEED, ODD], ids=["refused", "of another shape"])
def test_three_prompts_show_that_the_server_takes_no_such_request(
    tasks: Tasks, reply: Response
) -> None:
    error, server = dispatched(tasks, tasks.answers(NAMES, 10), lambda text: reply)
    assert type(error) is ConfigError and "refused 3 different prompts in the same words" in str(
        error
    )
    assert "endpoint.request (rename, omit, extra)" in str(error)
    assert len(server.requests) == 4 and server.open_at_once == 1 and tasks.errors() == {}
    assert asked_of(server)[CONTROL] == 1, "a short question tells whose fault it is"


def test_a_server_that_begins_to_refuse_ends_the_work_as_well(tasks: Tasks) -> None:
    asked: list[str] = []

    def reply(text: str) -> Response:
        asked.append(text)
        time.sleep(0.02)  # as long as a connection takes, so that the short question is not late
        limit = Response.of({"error": "hard limit of 12 answers reached"}, 400)
        return chat_reply("yes") if len(asked) <= 12 else limit

    error, server = dispatched(tasks, tasks.answers(NAMES, 32), reply, max_concurrency=1)
    assert type(error) is ConfigError and "different prompts in the same words" in str(error)
    assert len(server.requests) < 40


def test_the_first_request_of_each_form_goes_alone(tasks: Tasks) -> None:
    seen: Counter[int] = Counter()
    others = threading.Barrier(len(NAMES[1:8]), timeout=30)

    def respond(path: str, body: Json) -> Response:
        if not body:
            return Response.of({}, 404)
        seen[body["max_tokens"]] += 1
        if seen[body["max_tokens"]] > 1:
            others.wait()  # each meets all others
        else:
            time.sleep(0.2)
            assert seen[body["max_tokens"]] == 1
        return chat_reply("yes")

    with loopback(respond) as server:
        spec = EndpointSpec(
            EndpointConfig(url=server.url, model="m", api="openai", scores=False),
            tasks.student,
            64,
        )

        async def run() -> None:
            teacher = await EndpointTeacher.start(spec, at_once)
            for sampling in ({"max_tokens": 5}, {"max_tokens": 6}):
                first = [teacher.generate([3], sampling, 1, chat(name)) for name in NAMES[:8]]
                await asyncio.gather(*first)
            teacher.shutdown()
            await asyncio.sleep(0)

        asyncio.run(run())
    assert seen == {5: 8, 6: 8} and server.open_at_once == 7


def test_the_error_that_says_which_items_failed_travels(tasks: Tasks) -> None:
    (task,) = tasks.answers(NAMES[:1])
    error = pickle.loads(pickle.dumps(ItemsFailedError({"shard": "s"}, [(task, "flagged")])))
    assert error.result == {"shard": "s"} and error.failed == [(task, "flagged")]
    assert str(error) == f"1 item failed, the first is {task.label}: flagged"
