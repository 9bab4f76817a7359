"""Addresses of clusters, tokens, and what may answer at an address in a job server's place."""

import gzip
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jobs.cluster.connection import connect
from tests.support.hostile import Case, check_answer

pytestmark = pytest.mark.timeout(30)
SECRET = "hunter2"
NO_URL = ("is not the URL of a job server, such as http://head-node:8265",)

ADDRESSES = [
    Case("nothing", "", NO_URL),
    Case("a host", "head-node", NO_URL),
    Case("a host and a port", "head-node:8265", NO_URL),
    Case("an address and a port", "10.0.0.1:8265", NO_URL),
    Case("the address of Ray Client", "ray://head-node:10001", NO_URL),
    Case("auto", "auto", NO_URL),
    Case("a file", "file:///etc/passwd", NO_URL),
    Case("another protocol", "ftp://head-node:8265", NO_URL),
    Case("no host", "http://", NO_URL),
    Case("a port without a host", "http://:8265", NO_URL),
    Case("three slashes", "http:///head-node:8265", NO_URL),
    Case("a page of the dashboard", "http://head-node:8265/#/jobs", NO_URL),
    Case(
        "a proxy's path", "http://127.0.0.1:9/ray/", ("can be reached at http://127.0.0.1:9/ray",)
    ),
    Case("a query", "http://head-node:8265?token=abc", NO_URL),
    Case("a line break", "http://head-node:8265\r\nX: y", NO_URL),
    Case("a space", "http://head node:8265", NO_URL),
    Case("an escape sequence", "http://head\x1b[2J:8265", NO_URL),
    Case("a bell", "http://head:8265\x07", NO_URL),
    Case("a megabyte", "x" * 10**6, NO_URL),
    Case("a port out of range", "http://head-node:99999", NO_URL),
    Case("a port in letters", "http://head-node:dashboard", NO_URL),
    Case("a negative port", "http://head-node:-1", NO_URL),
    Case("an open bracket", "http://[::1:8265", NO_URL),
    Case("a password", f"http://user:{SECRET}@127.0.0.1:9", ("can be reached at http://***@127",)),
    Case("a password without a scheme", f"user:{SECRET}@head-node:8265", NO_URL),
    Case("a password and three slashes", f"http:///user:{SECRET}@head:8265", NO_URL),
    Case("a token as a user", f"https://{SECRET}@127.0.0.1:9", ("reached at https://***@127",)),
    Case("nobody there", "http://127.0.0.1:9", ("no Ray job server can be reached", "8265")),
    Case("nobody at IPv6", "http://[::1]:9", ("no Ray job server can be reached",)),
    Case(
        "a host of no network", "http://head.invalid:8265", ("can be reached at http://head.inv",)
    ),
]


@pytest.mark.parametrize("case", ADDRESSES, ids=str)
def test_an_address_is_answered(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    told = []
    try:
        check_answer(case, lambda: connect_and_tell(case.given, told))
    finally:
        assert SECRET not in "".join(told)


def connect_and_tell(address: str, told: list[str]) -> None:
    try:
        connect(address)
    except Exception as error:
        told.append(str(error))
        raise


TOKENS = [
    Case("two lines", f"{SECRET}\nX-Other: header", ("RAY_AUTH_TOKEN holds no token",)),
    Case("two words", f"Bearer {SECRET}", ("RAY_AUTH_TOKEN holds no token", "one word")),
    Case("no ASCII", f"{SECRET}é", ("RAY_AUTH_TOKEN holds no token",)),
    Case("an escape sequence", f"{SECRET}\x1b[2J", ("RAY_AUTH_TOKEN holds no token",)),
    Case("endless", SECRET * 10**4, ("RAY_AUTH_TOKEN holds no token",)),
    Case("a sound one", SECRET, ("no Ray job server can be reached",)),
    Case("a sound one with a line's end", f"{SECRET}\n", ("no Ray job server can be reached",)),
]
TOKEN_FILES = [
    Case("missing", None, ("there is no token", "is missing")),
    Case("empty", b"", ("token.txt holds no token",)),
    Case("blank lines", b" \n\n", ("token.txt holds no token",)),
    Case("two lines", f"{SECRET}\n{SECRET}\n".encode(), ("token.txt holds no token",)),
    Case("a page", b"<html>not found</html>", ("token.txt holds no token",)),
    Case("no text", b"\xff\xfe\x00\x01", ("token.txt holds no token",)),
    Case("UTF-16", SECRET.encode("utf-16"), ("token.txt holds no token",)),
    Case("a megabyte", b"x" * 10**6, ("token.txt holds no token",)),
    Case("a sound one", f"{SECRET}\n".encode(), ("no Ray job server can be reached",)),
]


@pytest.mark.parametrize("case", TOKENS, ids=str)
def test_a_token_is_answered_and_not_repeated(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", case.given)
    told = []
    check_answer(case, lambda: connect_and_tell("http://127.0.0.1:9", told))
    assert SECRET not in "".join(told)


@pytest.mark.parametrize("case", TOKEN_FILES, ids=str)
def test_a_file_with_a_token_is_answered_and_not_repeated(
    case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "token.txt"
    if case.given is not None:
        path.write_bytes(case.given)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    told = []
    check_answer(case, lambda: connect_and_tell("http://127.0.0.1:9", told))
    assert SECRET not in "".join(told)


def http(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


NOT_RAY = ("but not as a Ray job server does",)
VERSION = json.dumps({"ray_version": "2.60.0", "version": "4"}).encode()
BOMB = gzip.compress(b"x" * (20 * 2**20), 1)
ENDLESS = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
SERVERS = [
    Case("another page", http("200 OK", b"<html>hello</html>"), NOT_RAY),
    Case("not found", http("404 Not Found"), ("HTTP 404", *NOT_RAY)),
    Case("an error", http("500 Oops", b"\x1b[2J\x07"), ("HTTP 500", r"\x1b[2J\x07")),
    Case("a proxy that refuses", http("401 No", b"proxy"), ("HTTP 401", "NO_PROXY")),
    Case("a proxy that forbids", http("403 No", b"proxy"), ("HTTP 403", "NO_PROXY")),
    Case("no token sent", http("401 No", b"no authentication token"), ("none was sent",)),
    Case("a wrong token", http("403 No", b"bad authentication token"), ("does not accept",)),
    Case(
        "somewhere else",
        http("302 Found", b"", "Location: http://127.0.0.1:9/"),
        ("HTTP 302", *NOT_RAY),
    ),
    Case("itself again", http("301 Moved", b"", "Location: /api/version"), ("HTTP 301",)),
    Case("no text", http("200 OK", bytes(range(256))), NOT_RAY),
    Case("nothing", b"", ("no Ray job server can be reached",)),
    Case("no HTTP", b"SSH-2.0-OpenSSH_9.6\r\n", ("no Ray job server can be reached",)),
    Case("a body that ends early", http("200 OK", b"x" * 9)[:-4], ("no Ray job server can",)),
    Case("an empty page", http("200 OK"), NOT_RAY),
    Case("a bomb", http("200 OK", BOMB, "Content-Encoding: gzip"), NOT_RAY),
    Case("no gzip", http("200 OK", b"plain", "Content-Encoding: gzip"), ("no Ray job server",)),
    Case("endless headers", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10**5, ("no Ray job server",)),
    Case("an endless page", ENDLESS, NOT_RAY),
    Case("a job server", http("200 OK", VERSION, "Content-Type: application/json")),
]


@pytest.mark.parametrize("case", SERVERS, ids=str)
def test_what_answers_is_a_job_server_or_refused(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    told = []
    with server(case.given) as address:
        check_answer(case, lambda: connect_and_tell(address, told) or address)
    assert SECRET not in "".join(told)


@contextmanager
def server(answer: bytes) -> Iterator[str]:
    """Answers every connection with the same bytes; behind `ENDLESS` it goes on as long as one
    listens.
    """
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.recv(2**16)
                    connection.sendall(answer)
                    while answer == ENDLESS and not stopped.is_set():
                        connection.sendall(os.urandom(2**12).hex().encode())
                except OSError:
                    continue

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        stopped.set()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)
