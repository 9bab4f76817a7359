"""What servers name: models, batches, files, ends of answers; and their answers in text."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.student import StudentConfig
from pipeline.config.teachers import EndpointConfig
from pipeline.records import Prompt
from teachers.endpoint import transport
from teachers.endpoint.batches import Batches
from teachers.endpoint.completions import Completions
from teachers.endpoint.replies import ANY_REPLY, BATCH, FILE, MODELS_REPLY, TEXT_REPLY
from teachers.endpoint.teacher import EndpointTeacher
from teachers.endpoint.transport import Requester
from teachers.protocol import EndpointSpec, GeneratedAnswer
from teachers.tokenizing import answer_text, student_tokenizer
from tests.support.endpoints import SERVED, FakeBatchApi, Response, at_once, loopback
from tests.support.hostile import Case, check_answer
from tests.support.tokenizers_for_tests import save_byte_tokenizer

pytestmark = pytest.mark.timeout(30)

KEY = "sk-SECRET-0123456789"
FINE = b'{"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}'
ALLOWED = 100_000
SHAPE = ("not as expected",)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "ALLOWANCE_BYTES", ALLOWED)
    monkeypatch.setenv("TEST_API_KEY", KEY)


def endpoint(url: str, **settings: Any) -> EndpointConfig:
    values = {"url": url, "model": SERVED, "api": "openai", "scores": False, "max_retries": 0}
    return EndpointConfig.model_validate(values | settings)


def shaped(kind: Any, text: str) -> Any:
    return asyncio.run(_parsed(kind, text))


async def _parsed(kind: Any, text: str) -> Any:
    with loopback(lambda path, body: Response(text.encode())) as server:
        requester = Requester(endpoint(server.url), at_once)
        try:
            return await requester.ask("/x", kind)
        finally:
            await requester.close()


IDS = [
    *(
        Case(f"id {name}", name)
        for name in ("batch_abc123", "file-Abc", "batches/1x2", "a.b:c=d", "0f-9_" * 40)
    ),
    *(
        Case(f"bad id {name[:30]!r}", name, ("not as expected", "id"))
        for name in (
            *("", "..", "../../x", "/etc/passwd", "a/../b", "a//b", "a/", "./a", ".hidden", "a b"),
            *("a\n", "a\x00", "a\x1b[2J", "a?x=1", "a#b", "a%2e%2e", "a\\b", "http://evil/x", "ä"),
            "x" * 201,
        )
    ),
    *(Case(f"no id {value!r}", value, ("not as expected",)) for value in (7, None, True, ["a"])),
]


@pytest.mark.parametrize("case", IDS, ids=str)
def test_an_id_of_a_provider_is_a_name_and_no_path(case: Case) -> None:
    file = json.dumps({"id": case.given})
    batch = json.dumps({"id": "b", "status": "DONE", "output_file_id": case.given})
    taken = check_answer(case, lambda: shaped(FILE, file))
    assert taken is None or taken["id"] == case.given
    if case.given is not None:
        check_answer(case, lambda: shaped(BATCH, batch))


MODELS = [
    Case("the served one", [{"id": SERVED}]),
    Case("more than it says", [{"id": SERVED, "max_model_len": 10**400}]),
    Case("others without names", [{}, {"id": SERVED, "x": 1}]),
    Case("another", [{"id": "other"}], ("does not serve", "other")),
    Case("none", [], ("does not serve",)),
    Case("names that clear the screen", [{"id": "\x1b[2J\x07"}], (r"\x1b[2J\x07",)),
    Case("a name with the key", [{"id": KEY}], ("['***']",)),
    Case("ten thousand", [{"id": f"m{i}"} for i in range(5000)], ("m0", "...")),
    Case("a long name", [{"id": "n" * 90_000}], ("nnn...",)),
    Case("a name that is a number", [{"id": 7}], ("not as expected",)),
    Case("no room", [{"id": SERVED, "max_model_len": 0}], ("holds 0 tokens",)),
    Case("less than no room", [{"id": SERVED, "max_model_len": -5}], ("holds -5 tokens",)),
    Case("room that is a text", [{"id": SERVED, "max_model_len": "much"}], ("not as expected",)),
    Case("an object", {"id": SERVED}, ("not as expected", "data")),
    Case("null", None, ("not as expected", "data")),
]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> StudentConfig:
    folder = tmp_path_factory.mktemp("student")
    save_byte_tokenizer(folder)
    return StudentConfig(model=str(folder), initialization="random")


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_listed_models_are_names(case: Case, student: StudentConfig) -> None:
    async def start(url: str) -> Any:
        settings = {"api": "vllm", "tokenizer": "t", "api_key_env": "TEST_API_KEY"}
        teacher = await EndpointTeacher.start(
            EndpointSpec(endpoint(url, **settings), student, 64), at_once
        )
        teacher.shutdown()
        await asyncio.sleep(0)
        return teacher.metadata()

    def respond(path: str, body: Any) -> Response:
        if path == "/version":
            return Response.of({"version": "0.32\x1b[2J" + "9" * 999})
        return Response.of({"data": case.given})

    with loopback(respond) as server:
        taken = check_answer(case, lambda: asyncio.run(start(server.url)))
    assert taken is None or taken["engine_version"] == r"0.32\x1b[2J" + "9" * 46 + "..."


def message(content: Any, reason: str = "stop", **fields: Any) -> dict[str, Any]:
    return {"message": {"content": content} | fields, "finish_reason": reason}


TEXTS = [
    Case("plain", (message("fine"), "fine", "stop")),
    Case("special tokens", (message("<eos> <user>"), "<eos> <user>", "stop")),
    Case("NUL and an escape", (message("a\x00\x1b[2J"), "a\x00\x1b[2J", "stop")),
    Case("half of a character", (message("a\ud800b"), "a\ufffdb", "stop")),
    Case("halves in the wrong order", (message("\udc00\ud800"), "\ufffd\ufffd", "stop")),
    Case("a character in halves", (message("🙂"), "🙂", "stop")),
    Case("nothing", (message(""), "", "stop")),
    Case("null", (message(None), "", "stop")),
    Case("tool calls", (message(None, "tool_calls", tool_calls=[{"x": 1}]), "", "unknown")),
    Case("a refusal", (message(None, refusal="No."), "No.", "content_filter")),
    Case("a refusal beside text", (message("Well", refusal="No."), "Well", "content_filter")),
    Case("an empty refusal", (message("fine", refusal=""), "fine", "stop")),
    Case("no refusal", (message("fine", refusal=None), "fine", "stop")),
    Case(
        "a refusal in parts",
        (message([{"type": "refusal", "refusal": "No."}]), "No.", "content_filter"),
    ),
    Case("as much as can be", (message("x" * 256 * 9), "x" * 256 * 9, "stop")),
    Case("more than was asked", (message("x" * (256 * 9 + 1)), "", ""), ("9 tokens", "rename")),
    Case(
        "thoughts that max_tokens does not count", (message("x", reasoning="y" * 9999), "x", "stop")
    ),
    Case("broken off", (message("x", "error"), "", ""), ("'error'", "broke it off")),
    Case("content in an object", (message({"text": "x"}), "", ""), SHAPE),
    Case("a refusal that is a number", (message("x", refusal=7), "", ""), SHAPE),
    Case("an end that is a number", (message("x") | {"finish_reason": 7}, "", ""), SHAPE),
]


@pytest.mark.parametrize("case", TEXTS, ids=str)
def test_answers_in_text_are_text(case: Case, student: StudentConfig) -> None:
    choice, text, end = case.given
    tokenizer, _ = student_tokenizer(student.files)
    prompt = Prompt("p", "d", "train", messages=({"role": "user", "content": "hello"},))

    async def ask(url: str) -> GeneratedAnswer:
        spec = EndpointSpec(endpoint(url), student, 64)
        requester = Requester(spec.endpoint, at_once)
        try:
            server = Completions(spec, requester, None, tokenizer)
            return await server.text_answer([3], prompt, {"max_tokens": 9})
        finally:
            await requester.close()

    with loopback(lambda path, body: Response.of({"choices": [choice]})) as server:
        taken = check_answer(case, lambda: asyncio.run(ask(server.url)))
    if taken is not None:
        ids = taken.token_ids[: -1 if end == "stop" else None]
        assert (answer_text(tokenizer, ids), taken.finish_reason) == (text, end)
        assert not set(ids) & set(tokenizer.all_special_ids)


def told(**fields: Any) -> Callable[[str, Any], Any]:
    """A provider that says this of its batches."""
    return lambda path, value: value | fields if "/batches/" in path else value


def output(*lines: Any) -> Callable[[str, Any], Any]:
    """A provider whose output has further lines before its own."""

    def change(path: str, value: Any) -> Any:
        if not path.endswith("/content"):
            return value
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        return "\n".join([*texts, value if isinstance(value, str) else json.dumps(value)])

    return change


def instead(**fields: Any) -> Callable[[str, Any], Any]:
    """A provider whose one line of output has these fields."""
    return lambda path, value: value | fields if path.endswith("/content") else value


OTHER = {"custom_id": "x", "response": {"status_code": 200, "body": json.loads(FINE)}}
BATCHES = [
    Case("plain", told()),
    Case("lines of others", output(OTHER, OTHER, {"custom_id": "../../x", "error": None})),
    Case("lines that are none", output("", "{", "null", "[" * 9999, "\x00", '{"custom_id": 7}')),
    Case("a status in capitals", told(status="COMPLETED", output_file_id="batch-0-out")),
    Case("failed", told(status="failed", errors="\x1b[2J"), ("provider failed", r"\x1b[2J")),
    Case("failed at length", told(status="failed", errors=["e" * 90_000]), ("['eee", "...")),
    Case("failed with the key", told(status="failed", errors=[KEY]), ("['***']",)),
    Case(
        "an escape in a refusal",
        instead(response={"status_code": 400, "body": "\x1b]0;x\x07" + "y" * 90_000}),
        ("status 400", r"\x1b]0;x\x07yyy", "..."),
    ),
    Case("no body", instead(response={"status_code": 200, "body": None}), SHAPE),
    Case("another body", instead(response={"status_code": 200, "body": {"choices": 7}}), SHAPE),
    Case("an output of a megabyte", output("x" * 2**20), ("the reply has more than",)),
    Case("a file that is a path", told(output_file_id="../../x"), ("output_file_id",)),
    Case("a file of another server", told(error_file_id="http://evil/x"), ("error_file_id",)),
]


@pytest.mark.parametrize("case", BATCHES, ids=str)
def test_batches_are_bounded_and_their_words_shown(case: Case, tmp_path: Path) -> None:
    api = FakeBatchApi(lambda text: Response(FINE))

    def respond(path: str, body: Any) -> Response:
        content = api(path, body).content
        value = case.given(path, json.loads(content or b""))
        return Response(value.encode()) if isinstance(value, str) else Response.of(value)

    async def ask(url: str) -> Any:
        settings = endpoint(url, batch=True, api_key_env="TEST_API_KEY")
        requester = Requester(settings, at_once)
        batches = Batches(settings, requester, str(tmp_path / "records"), at_once)
        question = {"messages": [{"role": "user", "content": "hello"}]}
        try:
            return await batches.ask("/chat/completions", TEXT_REPLY, question, 640)
        finally:
            batches.close()
            await requester.close()

    with loopback(respond) as server:
        taken = check_answer(case, lambda: asyncio.run(ask(server.url)))
    assert taken is None or taken["choices"][0]["message"]["content"] == "fine"


def test_any_reply_of_a_sign_of_life_is_bounded_as_well() -> None:
    case = Case("large", None, ("more than 100,000 bytes",))
    check_answer(case, lambda: shaped(ANY_REPLY, json.dumps("x" * ALLOWED)))
    assert shaped(MODELS_REPLY, '{"data": []}') == {"data": []}


def test_nothing_is_written_outside_of_the_folder_of_records(tmp_path: Path) -> None:
    """The record of a batch is named by the provider's id, whose slashes make no folders."""

    async def record() -> None:
        settings = endpoint("http://127.0.0.1:9/v1", batch=True)
        requester = Requester(settings, at_once)
        await Batches(settings, requester, str(tmp_path / "records"), at_once)._record("b/1", ["k"])
        await requester.close()

    asyncio.run(record())
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.json")] == ["records/b_1.json"]
