"""OpenAI-compatible servers on loopback, in threads of the test's own process."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from teachers.endpoint.teacher import EndpointTeacher
from teachers.pool.contracts import PoolReport
from teachers.protocol import ScoringRequest
from tests.support.fabricated import FakeTeacher

Json = dict[str, Any]
SERVED = "served"
MAX_MODEL_LEN = 512


@dataclass(frozen=True)
class Response:
    """Response of a server; with `content` None the server drops the connection instead."""

    content: bytes | None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any, status: int = 200, **headers: str) -> Response:
        return cls(json.dumps(value).encode(), status, headers)


DROPPED = Response(None)


@dataclass
class Loopback:
    """Server whose responses are a function of path and body.

    Attributes:
        requests: path, body and headers of all POST requests, in order.
        open_at_once: largest number of requests that were open at the same time.
    """

    respond: Callable[[str, Json], Response]
    url: str = ""
    requests: list[tuple[str, Json, dict[str, str]]] = field(default_factory=list)
    open_at_once: int = 0

    def bodies(self, path: str) -> list[Json]:
        return [body for its_path, body, _ in self.requests if its_path == path]


class PatientServer(ThreadingHTTPServer):
    """A server with room for all connections that a teacher opens at once.

    The standard library's queue holds five; a busy machine loses further connections, whose
    requests then wait for more than a minute.
    """

    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says nothing of a client that is gone; a test may have ended it."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def loopback(
    respond: Callable[[str, Json], Response], host: str = "127.0.0.1"
) -> Iterator[Loopback]:
    server, lock, now_open = Loopback(respond), threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Content-Type"].startswith("multipart/form-data"):
                form = b"Content-Type: " + self.headers["Content-Type"].encode() + b"\n\n" + content
                parts = message_from_bytes(form).walk()
                texts = [part.get_payload(decode=True) for part in parts]
                self._answer(
                    {"parts": [text.decode() for text in texts if isinstance(text, bytes)]}
                )
            else:
                self._answer(json.loads(content))

        def _answer(self, body: Json) -> None:
            nonlocal now_open
            with lock:
                now_open += 1
                server.open_at_once = max(server.open_at_once, now_open)
                if body:
                    server.requests.append((self.path, body, dict(self.headers)))
            response = server.respond(self.path, body)
            with lock:
                now_open -= 1
            if response.content is None:
                self.close_connection = True
                return
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            with suppress(ConnectionError):  # the client has given up
                self.wfile.write(response.content)

        def log_message(self, format: str, *args: Any) -> None:
            """Logs nothing."""

    http = PatientServer((host, 0), Handler)
    http.daemon_threads = True
    server.url = f"http://{host}:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def chat_reply(text: str | None, finish_reason: str = "stop", **message: Any) -> Response:
    """Response of `/chat/completions`."""
    content = {"role": "assistant", "content": text} | message
    choice = {"index": 0, "message": content, "finish_reason": finish_reason}
    return Response.of({"id": "c", "choices": [choice], "usage": {"completion_tokens": 3}})


def by_text(reply: Callable[[str], Response]) -> Callable[[str, Json], Response]:
    """A text API whose reply is a function of the last message; it lists no models."""
    missing = Response.of({"error": "Not Found"}, 404)
    return lambda path, body: reply(body["messages"][-1]["content"]) if body else missing


@dataclass
class FakeBatchApi:
    """Text API with batches.

    Attributes:
        reply: function from the last message to the reply, also inside of a batch.
        status: function from the number of polls of a batch to its status.
        batches: requests of every batch, by its id.
        begun: what each batch was begun with.
    """

    reply: Callable[[str], Response]
    status: Callable[[int], str] = lambda polls: "completed" if polls > 2 else "in_progress"
    batches: dict[str, list[Json]] = field(default_factory=dict)
    begun: dict[str, Json] = field(default_factory=dict)
    answered: Callable[[Json], bool] = lambda line: True
    _files: dict[str, str] = field(default_factory=dict)
    _polls: Counter[str] = field(default_factory=Counter)

    def __call__(self, path: str, body: Json) -> Response:
        place = path.removeprefix("/v1").partition("?")[0].split("/")[1:]
        if place == ["chat", "completions"]:
            return self.reply(body["messages"][-1]["content"])
        if place == ["files"]:
            name = f"file-{len(self._files)}"
            self._files[name] = body["parts"][-1]
            assert body["parts"][0] == "batch"
            return Response.of({"id": name})
        if place == ["batches"] and not body:
            return Response.of({"data": [self._told(name, "in_progress") for name in self.batches]})
        if place == ["batches"]:
            name = f"batch-{len(self.batches)}"
            lines = self._files[body["input_file_id"]].splitlines()
            self.batches[name], self.begun[name] = [*map(json.loads, lines)], body
            return Response.of(self._told(name, "validating"))
        if place[0] == "batches" and place[1] in self.batches:
            self._polls[place[1]] += 1
            return Response.of(self._told(place[1], self.status(self._polls[place[1]])))
        if place[0] == "files" and place[1].removesuffix("-out") in self.batches:
            lines = self.batches[place[1].removesuffix("-out")]
            return Response("\n".join(map(self._line, filter(self.answered, lines))).encode())
        return Response.of({"error": "Not Found"}, 404)

    def _told(self, name: str, status: str) -> Json:
        begun = self.begun.get(name, {})
        told = {"id": name, "status": status, "metadata": begun.get("metadata")}
        told["input_file_id"] = begun.get("input_file_id")
        return told | ({"output_file_id": f"{name}-out"} if status == "completed" else {})

    def _line(self, request: Json) -> str:
        response = self.reply(request["body"]["messages"][-1]["content"])
        value = {"status_code": response.status, "body": json.loads(response.content or b"")}
        return json.dumps({"custom_id": request["custom_id"], "response": value, "error": None})


@dataclass
class FakeVllm:
    """vLLM server of a model whose distributions are a hash of the preceding tokens.

    Attributes:
        salt: part of the hash; another salt makes another model.
        answer: function from a prompt to the token ids and finish reason of its answer.
    """

    salt: str = "model"
    answer: Callable[[list[int]], tuple[list[int], str]] = lambda ids: ([5, 1], "stop")

    def __call__(self, path: str, body: Json) -> Response:
        if path == "/version":
            return Response.of({"version": "0.32.0"})
        if path == "/v1/models":
            return Response.of({"data": [{"id": SERVED, "max_model_len": MAX_MODEL_LEN}]})
        prompt = body["prompt"]
        token_ids, finish_reason = self.answer(prompt)
        if len(token_ids) > body["max_tokens"]:
            token_ids, finish_reason = token_ids[: body["max_tokens"]], "length"
        choice: Json = {"prompt_token_ids": prompt, "token_ids": token_ids, "text": "…"}
        choice["finish_reason"] = finish_reason
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = self.prompt_logprobs(prompt, body["prompt_logprobs"])
        return Response.of({"choices": [choice]})

    def prompt_logprobs(self, prompt: list[int], width: int) -> list[Any]:
        """Log-probabilities in vLLM's form: the gold token first, the others descending."""
        rows = asyncio.run(FakeTeacher(self.salt).score(ScoringRequest(prompt, 1)))
        positions: list[Any] = [None]
        for j, gold in enumerate(prompt[1:]):
            entries = {gold: float(rows.gold_logprobs[j])}
            for token, logprob in zip(rows.token_ids[j], rows.logprobs[j], strict=True):
                if len(entries) <= width - (gold in rows.token_ids[j, :width]):
                    entries.setdefault(int(token), float(logprob))
            positions.append(
                {
                    str(token): {"logprob": logprob, "rank": 1, "decoded_token": "x"}
                    for token, logprob in entries.items()
                }
            )
        return positions


async def at_once(seconds: float) -> None:
    """Stand-in for `asyncio.sleep` that does not wait."""


def run_in_process(all_work: Sequence[Any]) -> dict[str, PoolReport]:
    """Stand-in for `run_pools` with the real teacher of each endpoint, but without Ray."""
    return {work.name: asyncio.run(_run(work)) for work in all_work}


async def _run(work: Any) -> PoolReport:
    report = PoolReport()
    if not work.tasks:
        return report
    teacher = await EndpointTeacher.start(work.spec, sleep=at_once)
    try:
        report.results = [await task.run(teacher) for task in work.tasks]
        report.engines = [teacher.metadata() | {"peak_memory_bytes": None}]
    finally:
        teacher.shutdown()
        await asyncio.sleep(0)
    return report
