"""Servers that send too much, too little, something else or control characters, and bad keys."""

import asyncio
import gzip
import json
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from jobs.bookkeeping.plan import key_cautions
from pipeline.config.load import load_config
from pipeline.config.teachers import EndpointConfig
from pipeline.errors import DistillationError
from teachers.endpoint import transport
from teachers.endpoint.reading import Inflater, expected_bytes
from teachers.endpoint.replies import TEXT_REPLY
from teachers.endpoint.transport import Requester
from tests.support.endpoints import SERVED, Response, at_once, loopback
from tests.support.hostile import Case, check_answer
from tests.support.quickstart import QUICKSTART

pytestmark = pytest.mark.timeout(30)

KEY = "sk-SECRET-0123456789"
FINE = b'{"choices": [{"message": {"content": "fine"}, "finish_reason": "stop"}]}'
ALLOWED = 100_000
MEBIBYTE = b"x" * 2**20

Serve = Callable[[asyncio.StreamWriter], Awaitable[None]]


def endpoint(url: str, **settings: Any) -> EndpointConfig:
    values = {"url": url, "model": SERVED, "api": "openai", "scores": False, "max_retries": 0}
    return EndpointConfig.model_validate(values | settings)


def asked(serve: Serve, **settings: Any) -> Any:
    """The reply of a server that writes to its connection what it wants."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await serve(writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has seen enough
        finally:
            writer.close()

    async def run() -> Any:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        requester = Requester(endpoint(f"http://127.0.0.1:{port}/v1", **settings), at_once)
        try:
            return await requester.ask("/chat/completions", TEXT_REPLY, {"a": 1})
        finally:
            await requester.close()
            server.close()

    return asyncio.run(run())


def raw(*parts: bytes) -> Serve:
    async def serve(writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)

    return serve


def reply(content: bytes, status: str = "200 OK", **headers: str) -> Serve:
    told = {"Content-Length": str(len(content))} | {
        name.replace("_", "-"): value for name, value in headers.items()
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return raw(f"HTTP/1.1 {status}\r\n{lines}\r\n".encode("latin-1"), content)


def packed(content: bytes, encoding: str) -> Serve:
    return reply(content, Content_Encoding=encoding)


def endless(begin: bytes, part: bytes) -> Serve:
    async def serve(writer: asyncio.StreamWriter) -> None:
        writer.write(begin)
        while True:
            writer.write(part)
            await writer.drain()

    return serve


def drip(begin: bytes, part: bytes) -> Serve:
    async def serve(writer: asyncio.StreamWriter) -> None:
        writer.write(begin)
        for _ in range(1000):
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.02)

    return serve


async def silence(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(20)


def deflated(content: bytes, window: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, window)
    return packer.compress(content) + packer.flush()


def bomb(window: int, megabytes: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, window)
    return b"".join(packer.compress(MEBIBYTE) for _ in range(megabytes)) + packer.flush()


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
TOO_LARGE = ("more than 100,000 bytes", "endpoint.url")
SHAPE = ("not as expected",)
TAKEN = [
    Case("plain", reply(FINE)),
    Case("without a length", raw(OK + b"Connection: close\r\n\r\n", FINE)),
    Case("in chunks", raw(CHUNKED, b"%x\r\n%b\r\n0\r\n\r\n" % (len(FINE), FINE))),
    Case("gzip", packed(gzip.compress(FINE), "gzip")),
    Case("gzip in capitals", packed(gzip.compress(FINE), "GZIP")),
    Case("gzip by its old name", packed(gzip.compress(FINE), "x-gzip")),
    Case("gzip in two members", packed(gzip.compress(FINE[:9]) + gzip.compress(FINE[9:]), "gzip")),
    Case("deflate", packed(deflated(FINE, 15), "deflate")),
    Case("deflate without a header", packed(deflated(FINE, -15), "deflate")),
    Case("identity", packed(FINE, "identity")),
    Case("a mark of bytes", reply(b"  " + FINE + b"\n")),
    Case("as large as allowed", reply(FINE + b" " * (ALLOWED - len(FINE)))),
    Case("a name twice, the last counts", reply(b'{"choices": [], ' + FINE[1:])),
    Case("NaN beside it", reply(b'{"x": NaN, "y": -Infinity, ' + FINE[1:])),
    Case("a long number beside it", reply(b'{"x": 1' + b"0" * 400 + b", " + FINE[1:])),
    Case("another status of success", reply(FINE, "201 Created")),
    Case("an old HTTP", raw(b"HTTP/0.9 200 OK\r\n\r\n", FINE)),
    Case("100 before it", raw(b"HTTP/1.1 100 Continue\r\n\r\n" * 20, OK + b"\r\n", FINE)),
]
REFUSED = [
    Case("endless", endless(OK + b"\r\n", MEBIBYTE), TOO_LARGE),
    Case("endless chunks", endless(CHUNKED, b"100000\r\n%b\r\n" % MEBIBYTE), TOO_LARGE),
    Case("endless spaces", endless(OK + b"\r\n", b" " * 2**20), TOO_LARGE),
    Case("a byte too many", reply(FINE + b" " * (ALLOWED + 1 - len(FINE))), TOO_LARGE),
    Case(
        "a length of a terabyte",
        endless(OK + b"Content-Length: 1%b\r\n\r\n" % (b"0" * 12), b"x" * 9999),
        TOO_LARGE,
    ),
    Case("an endless error", endless(b"HTTP/1.1 500 Oops\r\n\r\n", MEBIBYTE), TOO_LARGE),
    Case("endless after a redirect", endless(b"HTTP/1.1 302 Found\r\n\r\n", MEBIBYTE), TOO_LARGE),
    Case("a gzip bomb", packed(bomb(31, 300), "gzip"), TOO_LARGE),
    Case("a deflate bomb", packed(bomb(15, 300), "deflate"), TOO_LARGE),
    Case("a bomb without a header", packed(bomb(-15, 300), "deflate"), TOO_LARGE),
    Case("a bomb of many members", packed(gzip.compress(MEBIBYTE) * 50, "gzip"), TOO_LARGE),
    Case(
        "endless empty members",
        endless(OK + b"Content-Encoding: gzip\r\n\r\n", gzip.compress(b"") * 999),
        TOO_LARGE,
    ),
    Case(
        "a bomb as an error", reply(bomb(31, 300), "500 Oops", Content_Encoding="gzip"), TOO_LARGE
    ),
    Case("no gzip", packed(FINE, "gzip"), ("cannot be inflated",)),
    Case("gzip cut", packed(gzip.compress(FINE)[:-9], "gzip"), ("cannot be inflated", "cut")),
    Case(
        "gzip with a wrong sum", packed(gzip.compress(FINE)[:-8] + bytes(8), "gzip"), ("inflated",)
    ),
    Case("rubbish behind gzip", packed(gzip.compress(FINE) + b"x" * 50, "gzip"), ("inflated",)),
    Case("no deflate", packed(b"\xff\xfe" + FINE, "deflate"), ("cannot be inflated",)),
    Case("gzip in gzip", packed(gzip.compress(gzip.compress(FINE)), "gzip"), SHAPE),
    Case("brotli", packed(FINE, "br"), ("compressed by br", "gzip, deflate was asked")),
    Case("zstd", packed(FINE, "zstd"), ("compressed by zstd",)),
    Case("two encodings", packed(FINE, "gzip, gzip"), ("compressed by gzip, gzip",)),
    Case("an odd encoding", packed(FINE, "x" * 5000), ("compressed by xxx",)),
    Case("nothing", reply(b""), ("status 200: the reply is empty",)),
    Case(
        "no content", raw(b"HTTP/1.1 204 No Content\r\n\r\n"), ("status 204: the reply is empty",)
    ),
    Case(
        "another protocol",
        raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
        ("status 101", "check endpoint.url"),
    ),
    Case("not modified", raw(b"HTTP/1.1 304 Not Modified\r\n\r\n"), ("304", "check endpoint.url")),
    Case(
        "a redirect",
        reply(b"", "307 Moved", Location="http://evil/v1"),
        ("redirects to http://evil/v1",),
    ),
    Case(
        "a redirect with an escape",
        reply(b"", "302 Found", Location="/\x9b2J\x1b"),
        (r"redirects to /\udc9b2J\x1b",),
    ),
    Case(
        "a redirect of 7000 characters",
        reply(b"", "302 Found", Location="/" + "x" * 7000),
        ("xxx...",),
    ),
    Case("a page", reply(b"<html>\x1b[2J</html>"), (r"<html>\x1b[2J</html>", "Invalid JSON")),
    Case("null", reply(b"null"), SHAPE),
    Case("text", reply(b'"choices"'), SHAPE),
    Case("a list", reply(b"[]"), SHAPE),
    Case("an error in 200", reply(b'{"error": {"message": "busy"}}'), (*SHAPE, "busy")),
    Case("no UTF-8", reply(b'{"choices": [{"text": "\xff\xfe"}]}'), SHAPE),
    Case("UTF-16", reply(FINE.decode().encode("utf-16")), SHAPE),
    Case("nested", reply(b'{"choices": ' + b"[" * 40_000), ("recursion limit",)),
    Case("nested objects", reply(b'{"a":' * 15_000), ("recursion limit",)),
    Case(
        "nested in a field that nobody reads",
        reply(b'{"x": ' + b"[" * 9999 + b"]" * 9999 + b", " + FINE[1:]),
        ("recursion limit",),
    ),
    Case("cut", reply(FINE[:-2]), SHAPE),
    Case("two replies", reply(FINE + FINE), ("trailing characters",)),
    Case("comments", reply(b"// fine\n" + FINE), SHAPE),
    Case("backslashes", reply(b'{"x": "' + b"\\" * 90_000), SHAPE),
    Case("content that is a number", reply(b'{"choices": [{"message": {"content": 7}}]}'), SHAPE),
    Case("a choice that is text", reply(b'{"choices": ["fine"]}'), SHAPE),
    Case("a long status line", raw(b"HTTP/1.1 200 " + b"x" * 100_000), ("ClientResponseError",)),
    Case("a long header", raw(OK + b"X: " + b"x" * 100_000), ("ClientResponseError",)),
    Case("endless headers", endless(OK, b"X: y\r\n" * 1000), ("ClientResponseError",)),
    Case("a header without a name", raw(OK + b": y\r\n\r\n"), ("ClientResponseError",)),
    Case("a header with NUL", raw(OK + b"X: \0\r\n\r\n"), ("ClientResponseError",)),
    Case(
        "two lengths", raw(OK + b"Content-Length: 3\r\nContent-Length: 9\r\n\r\n"), ("ClientRes",)
    ),
    Case("a negative length", raw(OK + b"Content-Length: -1\r\n\r\n"), ("ClientResponseError",)),
    Case("a bad chunk", raw(CHUNKED, b"xyz\r\n"), ("Error",)),
    Case(
        "fewer bytes than told", raw(OK + b"Content-Length: 999\r\n\r\n", FINE), ("ClientPayload",)
    ),
    Case("no HTTP", raw(b"SSH-2.0-OpenSSH_9.6\r\n"), ("ClientResponseError",)),
    Case("a TLS alert", raw(b"\x15\x03\x01\x00\x02\x02\x46"), ("ClientResponseError",)),
    Case("nothing at all", raw(b""), ("ServerDisconnectedError",)),
    Case("status 999", reply(b"\x1b]0;x\x07", "999 Odd"), ("status 999", r"\x1b]0;x\x07")),
    Case(
        "an error that clears the screen",
        reply(b'{"error": "\x1b[2J\x07"}', "400 Bad"),
        (r"\x1b[2J\x07",),
    ),
    Case(
        "an error written backwards",
        reply("\u202eabc\u2066".encode(), "400 Bad"),
        (r"\u202eabc\u2066",),
    ),
    Case("an error of a megabyte", reply(b"e" * 90_000, "400 Bad"), ("eee...",)),
    Case(
        "an error with the key",
        reply(f"bad key {KEY} !".encode(), "401 No"),
        ("bad key *** !", "api_key_env"),
    ),
    Case("the key behind many characters", reply(b"k" * 290 + KEY.encode(), "400 Bad"), ("kkk",)),
    Case("lines", reply(b"a\r\n\tb\n\n", "400 Bad"), ("status 400: a b",)),
    Case("silence", silence, ("no answer within 0.5 s",)),
    Case("a drip", drip(OK + b"Content-Length: 99999\r\n\r\n", b" "), ("no answer within 0.5 s",)),
    Case("a drip of headers", drip(OK, b"X"), ("no answer within 0.5 s",)),
    Case(
        "a drip of 100s", drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), ("no answer within 0.5 s",)
    ),
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "ALLOWANCE_BYTES", ALLOWED)
    monkeypatch.setenv("TEST_API_KEY", KEY)


@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_odd_replies_are_read(case: Case) -> None:
    taken = check_answer(case, lambda: asked(case.given))
    assert taken["choices"][0]["message"]["content"] == "fine"


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_bad_replies_are_refused_in_one_short_message(case: Case) -> None:
    def ask() -> None:
        try:
            asked(case.given, api_key_env="TEST_API_KEY", timeout_seconds=0.5)
        except DistillationError as error:
            assert "SECRET" not in str(error) and len(str(error)) < 1500
            raise

    check_answer(case, ask)


AFTER = [
    *(Case(f"Retry-After: {text[:20]!r}", text) for text in ("", "0", "-5", "1.5", "soon", "²")),
    Case("years", "Fri, 31 Dec 99999 23:59:59 GMT"),
    Case("no day", "Fri, 99 Foo 2030 99:99:99 GMT"),
    Case("another time zone", "Fri, 31 Dec 1999 23:59:59 +99999999999999"),
    Case("long ago", "Fri, 01 Jan 0001 00:00:00 GMT"),
    Case("only commas", ",,,,"),
    Case("minutes that are no number", "Fri, 31 Dec 2030 1:2:3:4:5 GMT"),
]


@pytest.mark.parametrize("case", AFTER, ids=str)
def test_a_wait_that_is_no_time_is_none(case: Case) -> None:
    assert check_answer(case, lambda: transport._retry_after_seconds(case.given)) == 0


@pytest.mark.parametrize("text", ["1000000000", "9" * 400, "\u0669" * 9])
def test_a_wait_of_years_is_not_begun(text: str) -> None:
    assert transport._retry_after_seconds(text) > 10**8


KEYS = [
    Case("plain", KEY),
    Case("white space around it", f"  {KEY}\r\n"),
    Case("other letters", "schlüssel"),
    Case("a line break", f"{KEY}\n{KEY}", ("TEST_API_KEY", "line break")),
    Case("a header behind it", f"{KEY}\r\nX-Evil: 1", ("line break",)),
    Case("its scheme", f"Bearer {KEY}", ("holds a space",)),
    Case("a tab", f"{KEY}\tx", ("control character",)),
    Case("an escape", f"\x1b[200~{KEY}", ("control character",)),
    Case("a byte that is no UTF-8", f"{KEY}\udcff", ("control character",)),
    Case("nothing", "", ("is not set",)),
    Case("spaces", "   ", ("is not set",)),
]


@pytest.mark.parametrize("case", KEYS, ids=str)
def test_a_key_is_one_word(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_API_KEY", case.given)
    asking = lambda: asked(reply(FINE), api_key_env="TEST_API_KEY")  # noqa: E731
    check_answer(case, asking)
    if case.refusal:
        with pytest.raises(ValueError) as raised:
            asking()
        assert "SECRET" not in str(raised.value)


def test_a_key_in_the_clear_is_cautioned() -> None:
    def cautions(url: str, key: str = "TEST_API_KEY") -> list[str]:
        teacher = f"{{url: '{url}', model: m, api: openai, scores: false, api_key_env: {key}}}"
        overrides = ["storage.root=/tmp/x", f"teachers.third={{endpoint: {teacher}}}"]
        return key_cautions(load_config(QUICKSTART / "config.yaml", overrides))

    for url in ("http://gpu-7:8000/v1", "http://10.0.0.7/v1", "http://localhost.evil.org/v1"):
        (line,) = cautions(url)
        assert "teacher third sends its key over http://" in line and "https://" in line
    for url in ("https://api.example.org/v1", "http://localhost:1/v1", "http://127.9.9.9/v1"):
        assert cautions(url) == []
    assert cautions("http://[::1]:8000/v1") == [] and cautions("http://gpu-7/v1", "null") == []


def test_a_cookie_is_not_sent_back() -> None:
    async def ask(url: str) -> None:
        requester = Requester(endpoint(url.replace("127.0.0.1", "localhost")), at_once)
        try:
            for _ in range(2):
                await requester.ask("/chat/completions", TEXT_REPLY, {"a": 1})
        finally:
            await requester.close()

    with loopback(lambda path, body: Response(FINE, 200, {"Set-Cookie": "a=b"})) as server:
        asyncio.run(ask(server.url))
        heard = [headers for *_, headers in server.requests]
    assert len(heard) == 2 and not any("Cookie" in headers for headers in heard)


def test_the_bound_grows_with_what_is_asked() -> None:
    assert expected_bytes({}, 100) == 6400
    assert expected_bytes({"n": 3}, 100) == 3 * 6400
    assert expected_bytes({"logprobs": True, "top_logprobs": 5}, 100) == 100 * (64 + 6 * 256)
    assert expected_bytes({"prompt_logprobs": 20}, 1, 50) == 64 + 50 * (21 * 256 + 64)
    for odd in ("x", -1, None, [], {}, 1.5):
        assert expected_bytes({"n": odd, "logprobs": odd, "prompt_logprobs": odd}, 1, 1) > 0


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(("encoding", "window"), [("gzip", 31), ("deflate", 15), ("deflate", -15)])
def test_inflation_in_pieces_gives_the_whole(encoding: str, window: int, size: int) -> None:
    text = json.dumps(list(range(5000))).encode()
    content, inflater = deflated(text, window), Inflater(encoding, len(text))
    pieces = [content[i : i + size] for i in range(0, len(content), size)]
    assert b"".join(map(inflater.feed, pieces)) == text
    inflater.finish()
