"""Requests to servers that misbehave: tries, waits and messages."""

import asyncio
import os
import pickle
import threading
import time
from collections.abc import Sequence
from email.utils import formatdate
from typing import Any

import pytest

from pipeline.config.teachers import EndpointConfig
from pipeline.errors import ConfigError, DistillationError, TeacherError
from teachers.endpoint.replies import ANY_REPLY, TEXT_REPLY
from teachers.endpoint.transport import LONGEST_WAIT_SECONDS, NotThereError, Requester
from teachers.protocol import EngineDiedError, ItemRefusedError
from tests.support.endpoints import DROPPED, Loopback, Response, at_once, chat_reply, loopback

KEY = "sk-SECRET-0123456789"
GOOD = chat_reply("fine")


def endpoint(url: str, **settings: Any) -> EndpointConfig:
    values = {"url": url, "model": "m", "api": "openai", "scores": False, "max_retries": 3}
    return EndpointConfig.model_validate(values | settings)


def ask(
    responses: Sequence[Response], num_requests: int = 1, **settings: Any
) -> tuple[list[Any], list[float], Loopback]:
    """The outcomes of requests, the seconds waited, and the server; the last response repeats."""
    left = list(responses)

    def respond(path: str, body: dict[str, Any]) -> Response:
        return left.pop(0) if len(left) > 1 else left[0]

    waited: list[float] = []

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    async def run(url: str) -> list[Any]:
        requester = Requester(endpoint(url, **settings), sleep)
        try:
            each = [
                requester.ask("/chat/completions", TEXT_REPLY, {"a": 1})
                for _ in range(num_requests)
            ]
            return await asyncio.gather(*each, return_exceptions=True)
        finally:
            await requester.close()

    with loopback(respond) as server:
        return asyncio.run(run(server.url)), waited, server


@pytest.mark.parametrize(
    "bad",
    [
        Response.of({"error": "busy"}, 429),
        *(Response.of({}, status) for status in (408, 409, 425)),
        Response.of({"error": "oops"}, 500),
        Response.of({}, 503),
        DROPPED,
        Response(b'{"choices": [{"mess'),
        Response(b"<html>Bad gateway</html>", 200, {"Content-Type": "text/html"}),
        Response.of({"choices": []}),
    ],
    ids=["429", "408", "409", "425", "500", "503", "dropped", "cut JSON", "a page", "no choices"],
)
def test_what_may_pass_is_tried_again_and_each_wait_is_longer(bad: Response) -> None:
    (reply,), waited, server = ask([bad, bad, GOOD])
    assert reply["choices"][0]["message"]["content"] == "fine" and len(server.requests) == 3
    assert 0.5 <= waited[0] <= 1.0 <= waited[1] <= 2.0


def test_waits_have_a_bound() -> None:
    _, waited, _ = ask([Response.of({}, 500)], max_retries=9)
    assert len(waited) == 9 and max(waited) <= LONGEST_WAIT_SECONDS


def test_the_server_says_how_long_to_wait() -> None:
    in_a_minute = formatdate(time.time() + 90, usegmt=True)
    busy = [Response.of({}, 429, **{"Retry-After": text}) for text in ("30", in_a_minute, "soon")]
    (reply,), waited, _ = ask([*busy, GOOD])
    assert isinstance(reply, dict)
    assert waited[0] == 30 and 80 <= waited[1] <= 90 and waited[2] <= 4


def test_a_wait_longer_than_any_answer_is_not_begun() -> None:
    (error,), waited, _ = ask([Response.of({}, 429, **{"Retry-After": "3600"})])
    assert (
        waited == []
        and "asks to wait 3600 s, longer than 600 s (endpoint.timeout_seconds)" in str(error)
    )


@pytest.mark.parametrize(
    ("response", "kind", "advice"),
    [
        (Response.of({"error": "no such key"}, 401), ConfigError, "endpoint.api_key_env"),
        (Response.of({"error": "Insufficient credits"}, 402), ConfigError, "no credit left"),
        (Response.of({"error": "not yours"}, 403), ConfigError, "endpoint.api_key_env"),
        (Response.of({"error": "no model x"}, 404), NotThereError, "endpoint.model"),
        (Response(b"", 307, {"Location": "/elsewhere"}), ConfigError, "final address"),
        (Response.of({"error": "prompt too long"}, 400), ItemRefusedError, "prompt too long"),
        (Response.of({"error": "too large"}, 413), ItemRefusedError, "too large"),
        (
            Response.of({"choices": [{"message": {"content": 7}}]}),
            ItemRefusedError,
            "at choices.0.message.content",
        ),
    ],
)
def test_what_cannot_succeed_is_asked_once(
    response: Response, kind: type[DistillationError], advice: str
) -> None:
    (error,), waited, server = ask([response, GOOD])
    assert type(error) is kind and waited == [] and len(server.requests) == 1
    assert f"POST {server.url}/chat/completions: status {response.status}" in str(error)
    assert advice in str(error)


def in_turn(url: str) -> list[Any]:
    """Outcomes of a request for the models and of two requests, one after another."""

    async def run() -> list[Any]:
        requester, found = Requester(endpoint(url), at_once), []
        try:
            for path, body in (("/models", None), ("/chat", {"a": 1}), ("/chat", {"a": 2})):
                try:
                    found.append(await requester.ask(path, ANY_REPLY, body))
                except DistillationError as error:
                    found.append(error)
        finally:
            await requester.close()
        return found

    return asyncio.run(run())


def test_forbidden_is_the_keys_fault_until_a_request_was_answered() -> None:
    flagged = Response.of({"error": "your input was flagged"}, 403)
    models = Response.of({"data": []})
    with loopback(lambda path, body: flagged if body.get("a") == 2 else GOOD) as server:
        models_reply, first, second = in_turn(server.url)
    assert isinstance(models_reply, dict) and isinstance(first, dict)
    assert type(second) is ItemRefusedError and "your input was flagged" in str(second)
    with loopback(lambda path, body: flagged if body else models) as server:
        _, first, second = in_turn(server.url)
    assert type(first) is type(second) is ConfigError, "a list of models is shown to everybody"


@pytest.mark.parametrize("status", [401, 402])
def test_a_key_or_credit_that_is_used_up_meanwhile_is_no_fault_of_the_request(status: int) -> None:
    refused = Response.of({"error": "no"}, status)
    with loopback(lambda path, body: refused if body.get("a") == 2 else GOOD) as server:
        *_, second = in_turn(server.url)
    assert type(second) is ConfigError


def test_a_good_reply_is_not_made_into_a_text_that_nobody_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown: list[str] = []
    monkeypatch.setattr(
        "teachers.endpoint.transport.foreign", lambda text, width: shown.append(text) or text
    )
    (reply,), _, _ = ask([GOOD])
    assert isinstance(reply, dict) and shown == []
    ask([Response.of({}, 400)])
    ask([Response.of({"choices": []})], max_retries=0)
    assert [text for text in shown if text != "choices"] == ["{}", '{"choices": []}']


@pytest.mark.parametrize(
    ("response", "kind"),
    [
        (Response.of({"detail": "x" * 1000}, 500), TeacherError),
        (Response.of({"error": {"message": "no capacity"}}), TeacherError),
        (Response.of({}, 429), EngineDiedError),
        (Response.of({}, 502), EngineDiedError),
        (DROPPED, EngineDiedError),
    ],
)
def test_after_the_last_try_the_error_says_whether_the_server_is_gone(
    response: Response, kind: type[DistillationError]
) -> None:
    (error,), _, server = ask([response])
    assert type(error) is kind and len(server.requests) == 4
    assert (
        "given up after 4 tries (endpoint.max_retries: 3)" in str(error) and len(str(error)) < 600
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_server_that_is_not_there_is_said_to_be_gone() -> None:
    with loopback(lambda path, body: GOOD) as server:
        url = server.url

    async def run() -> None:
        requester = Requester(endpoint(url, max_retries=0))
        try:
            await requester.ask("/models", TEXT_REPLY)
        finally:
            await requester.close()

    with pytest.raises(EngineDiedError, match=f"GET {url}/models: ClientConnectorError"):
        asyncio.run(run())


def test_no_answer_in_time_is_tried_again() -> None:
    release = threading.Event()

    def respond(path: str, body: dict[str, Any]) -> Response:
        release.wait(30)
        return GOOD

    async def run(url: str) -> None:
        requester = Requester(endpoint(url, max_retries=1, timeout_seconds=0.05), at_once)
        try:
            await requester.ask("/chat/completions", TEXT_REPLY, {"a": 1})
        finally:
            await requester.close()

    with loopback(respond) as server:
        try:
            with pytest.raises(EngineDiedError, match=r"no answer within 0.05 s.*after 2 tries"):
                asyncio.run(run(server.url))
        finally:
            release.set()
    assert len(server.requests) == 2


def test_no_more_requests_are_open_than_allowed() -> None:
    replies, _, server = ask([GOOD], num_requests=20, max_concurrency=3)
    assert len(replies) == len(server.requests) == 20 and 1 <= server.open_at_once <= 3


def test_the_key_is_sent_and_never_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the server repeats it, in the middle of what is shown or across its end."""
    caplog.set_level(0)
    monkeypatch.setenv("TEST_API_KEY", f"{KEY}\n")
    for text in (f"the key {KEY} is wrong", "x" * 285 + KEY):
        for status in (401, 500):
            response = Response.of({"error": text}, status)
            (error,), _, server = ask([response], api_key_env="TEST_API_KEY")
            assert server.requests[0][2]["Authorization"] == f"Bearer {KEY}"
            chain = [error, error.__cause__, error.__context__]
            assert not any("sk-SECRET" in repr(each) for each in chain)
            assert b"sk-SECRET" not in pickle.dumps(error)
    assert "sk-SECRET" not in caplog.text
    assert os.environ["TEST_API_KEY"].strip() == KEY


@pytest.mark.parametrize("value", [None, "", " \n"])
def test_a_key_that_is_not_there_is_missed_by_name(
    monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("TEST_API_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("TEST_API_KEY", value)
    with pytest.raises(ConfigError, match=r"TEST_API_KEY.*export it before Ray is started"):
        ask([GOOD], api_key_env="TEST_API_KEY")


def test_without_a_key_no_header_is_sent() -> None:
    _, _, server = ask([GOOD])
    assert "Authorization" not in server.requests[0][2]
