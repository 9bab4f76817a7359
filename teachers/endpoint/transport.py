"""Requests over HTTP that survive rate limits, restarts and dropped connections.

Whatever a server says is bounded, and enters a message as short text that can be printed. The key
comes from the environment of the process that sends the requests. It stands in one header
and in no message: errors of libraries are not passed on, since some hold the request with its
headers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import aiohttp
from pydantic import TypeAdapter, ValidationError

from pipeline.config.teachers import EndpointConfig
from pipeline.credentials import without_passwords
from pipeline.errors import ConfigError, TeacherError
from pipeline.messages import foreign
from teachers.endpoint.reading import ACCEPTED, ALLOWANCE_BYTES, read_content
from teachers.protocol import EngineDiedError, ItemRefusedError

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
SHOWN_CHARACTERS, BEGINNING_BYTES = 300, 8192
"""Characters of a reply that a message shows, and bytes that are looked at for them."""
RETRIED_STATUSES = frozenset({408, 409, 425, 429})
"""Statuses beside 5xx that another try may not meet again; other 4xx would come again."""
SERVER_GONE_STATUSES = frozenset({408, 425, 429, 502, 503, 504})
"""Statuses that are no fault of the request: if every try meets one, the server is gone."""
NEEDS_ANOTHER_CONFIG = {
    401: "the key is missing or not accepted: see endpoint.api_key_env",
    402: "the account has no credit left: add credit and run it again; what is finished is kept",
    403: "the key does not allow this: see endpoint.api_key_env",
    404: "there is no such path or model: check endpoint.url, endpoint.model and endpoint.api",
    405: "there is no such path: check endpoint.url and endpoint.api",
}

NOT_FOUND = 404
FORBIDDEN = 403
"""Status of a key that is not allowed. After the server has answered a request with this key, it is
the status by which some APIs refuse a single prompt.
"""

LONE_SURROGATE = re.compile(
    rb"(?<!\\)((?:\\\\)*)(?:\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
"""Half of a character in JSON, which servers write when they cut an answer inside of it; group 1
holds escaped backslashes before it."""

HttpReply = TypeVar("HttpReply")


class NotThereError(ConfigError):
    """The server has no such path, model, batch or file."""


class _TryFailed(Exception):
    """One try of a request failed.

    Attributes:
        error: error to raise if no further try is made.
        passes: another try may succeed.
        wait_seconds: time that the server asks to wait.
    """

    def __init__(
        self, error: TeacherError | ConfigError, passes: bool, wait_seconds: float = 0.0
    ) -> None:
        super().__init__()
        self.error, self.passes, self.wait_seconds = error, passes, wait_seconds


class Requester:
    """Connection to one API; all its requests run in the event loop that made it."""

    def __init__(
        self,
        endpoint: EndpointConfig,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """`sleep`: function that waits for a number of seconds between tries.

        Raises:
            ConfigError: the environment variable of the key is not set here.
        """
        self._endpoint, self._sleep = endpoint, sleep
        self._key = _secret_key(endpoint)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._session = aiohttp.ClientSession(
            # One more than there are slots, for requests that go ahead.
            connector=aiohttp.TCPConnector(limit=endpoint.max_concurrency + 1),
            timeout=aiohttp.ClientTimeout(total=endpoint.timeout_seconds),
            headers=headers | {"Accept-Encoding": ACCEPTED},
            auto_decompress=False,  # it inflates without a bound
            cookie_jar=aiohttp.DummyCookieJar(),  # a request is the same whatever came before it
        )
        self._slots = asyncio.Semaphore(endpoint.max_concurrency)
        self._has_answered = False
        self._tried_again: dict[int, str] = {}

    def state(self) -> str | None:
        """Number of requests that wait for their next try, and why one of them does."""
        if not self._tried_again:
            return None
        problem = next(reversed(self._tried_again.values()))
        return f"requests that wait for another try: {len(self._tried_again)}, one after {problem}"

    async def ask(
        self,
        path: str,
        kind: TypeAdapter[HttpReply],
        body: dict[str, Any] | None = None,
        max_retries: int | None = None,
        ahead: bool = False,
        expected_bytes: int = 0,
        check: Callable[[bytes, HttpReply], None] | None = None,
    ) -> HttpReply:
        """Sends a request until its reply is of the expected kind: POST with a body, else GET.

        Args:
            path: path below the endpoint's url, with its leading slash; or a complete URL.
            kind: expected kind of the reply.
            body: JSON content of the request.
            max_retries: tries after the first, in place of `endpoint.max_retries`.
            ahead: do not wait until fewer requests than `max_concurrency` are open.
            expected_bytes: size of the largest right reply, beside an allowance.
            check: function that raises a `TeacherError` for a reply of the right kind that is wrong
                all the same; it is given the content as it came, and the reply.

        Raises:
            NotThereError: the server has no such path.
            ConfigError: the server never accepts such requests, because of key, credit, path or
                model.
            ItemRefusedError: the server does not accept this request, or replies to it in another
                shape.
            TeacherError: every try failed.
            EngineDiedError: the server is gone, or too busy in every try.
        """
        method = "GET" if body is None else "POST"
        read = _reader_of(kind, check)
        reply = await self._tried(
            method, path, read, lambda: {"json": body}, max_retries, ahead, expected_bytes
        )
        # A server may list its models for everybody; only an answer shows that the key is accepted.
        self._has_answered |= body is not None
        return reply

    async def upload(self, path: str, kind: TypeAdapter[HttpReply], content: bytes) -> HttpReply:
        """Sends a file of requests for a batch; see `ask`."""

        def form() -> dict[str, Any]:
            fields = aiohttp.FormData({"purpose": "batch"})
            fields.add_field("file", content, filename="requests.jsonl")
            return {"data": fields}

        return await self._tried("POST", path, _reader_of(kind), form)

    async def download(self, path: str, expected_bytes: int) -> bytes:
        """Content of a file of the server; see `ask`."""
        return await self._tried(
            "GET", path, lambda content: content, dict, expected_bytes=expected_bytes
        )

    async def _tried(
        self,
        method: str,
        path: str,
        read: Callable[[bytes], HttpReply],
        options: Callable[[], dict[str, Any]],
        max_retries: int | None = None,
        ahead: bool = False,
        expected_bytes: int = 0,
    ) -> HttpReply:
        """Sends a request until `read` accepts its reply; `options` makes its content anew."""
        url = path if "://" in path else self._endpoint.url + path
        limit = self._endpoint.max_retries if max_retries is None else max_retries
        slot = contextlib.nullcontext() if ahead else self._slots
        async with slot:  # also while it waits, so that a busy server is asked less
            for number in range(limit + 1):
                try:
                    status, content = await self._once(method, url, options(), expected_bytes)
                    return self._read(f"{method} {url}", status, content, read)
                except _TryFailed as failed:
                    failure = failed
                if not failure.passes:
                    raise failure.error
                if failure.wait_seconds > self._endpoint.timeout_seconds:
                    longest = f"{self._endpoint.timeout_seconds:g} s (endpoint.timeout_seconds)"
                    raise type(failure.error)(
                        f"{failure.error}; the server asks to wait {failure.wait_seconds:.0f} s, "
                        f"longer than {longest}"
                    )
                if number < limit:
                    seconds = _wait(number, failure.wait_seconds)
                    self._tried_again[id(failure)] = str(failure.error)
                    try:
                        await self._sleep(seconds)
                    finally:
                        del self._tried_again[id(failure)]
        count = limit + 1
        tries = f"{count} {'try' if count == 1 else 'tries'} (endpoint.max_retries: {limit})"
        raise type(failure.error)(f"{failure.error}; given up after {tries}")

    async def close(self) -> None:
        """Closes the connections."""
        await self._session.close()

    async def _once(
        self, method: str, url: str, options: dict[str, Any], expected_bytes: int
    ) -> tuple[int, bytes]:
        """Status 2xx and content of a response."""
        target = f"{method} {url}"
        try:
            request = self._session.request(method, url, allow_redirects=False, **options)
            async with request as response:
                status, headers = response.status, response.headers
                content = await read_content(response, ALLOWANCE_BYTES + expected_bytes)
        except TimeoutError:
            seconds = self._endpoint.timeout_seconds
            problem = f"{target}: no answer within {seconds:g} s (endpoint.timeout_seconds)"
            raise _TryFailed(EngineDiedError(problem), True) from None
        except TeacherError as error:
            kind, passes = type(error), not isinstance(error, ItemRefusedError)
            raise _TryFailed(kind(f"{target}: {error}"), passes) from None
        except (aiohttp.ClientError, OSError) as error:
            problem = f"{target}: {type(error).__name__}: {self.shown(str(error))}"
            raise _TryFailed(EngineDiedError(problem), True) from None
        if not 200 <= status < 300:
            shown = self._answered(target, status, content)
            wait_seconds = _retry_after_seconds(headers.get("Retry-After", ""))
            raise self._refusal(status, shown, wait_seconds, headers.get("Location", ""))
        return status, content

    def _read(
        self, target: str, status: int, content: bytes, read: Callable[[bytes], HttpReply]
    ) -> HttpReply:
        try:
            return read(content)
        except ValidationError as error:
            raise self._other_shape(target, status, content, error) from None

    def _other_shape(
        self, target: str, status: int, content: bytes, error: ValidationError
    ) -> _TryFailed:
        """A reply of another shape. One that holds choices is complete and paid, and would come
        again; anything else may be the word of a proxy, or the error of a server that is busy.
        """
        if not content:
            problem = f"{target}: status {status}: the reply is empty"
            return _TryFailed(TeacherError(problem), True)
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = self.shown(".".join(map(str, first["loc"])), 100) or "the reply"
        problem = (
            f"{self._answered(target, status, content)}: the reply is not as expected, at {place}: "
            f"{first['msg']}"
        )
        if first["type"] != "json_invalid" and b'"choices"' in content and len(first["loc"]) > 1:
            return _TryFailed(ItemRefusedError(problem), False)
        return _TryFailed(TeacherError(problem), True)

    def _refusal(self, status: int, shown: str, wait_seconds: float, location: str) -> _TryFailed:
        refuses_this_prompt = status == FORBIDDEN and self._has_answered
        if status in NEEDS_ANOTHER_CONFIG and not refuses_this_prompt:
            kind = NotThereError if status == NOT_FOUND else ConfigError
            return _TryFailed(kind(f"{shown}; {NEEDS_ANOTHER_CONFIG[status]}"), False)
        if status < 400:
            advice = "the server does not answer as the API does: check endpoint.url"
            if location and status >= 300:
                place = self.shown(location)
                advice = f"the server redirects to {place}: set endpoint.url to the final address"
            return _TryFailed(ConfigError(f"{shown}; {advice}"), False)
        if status in SERVER_GONE_STATUSES:
            return _TryFailed(EngineDiedError(shown), True, wait_seconds)
        if status in RETRIED_STATUSES or status >= 500:
            return _TryFailed(TeacherError(shown), True, wait_seconds)
        return _TryFailed(ItemRefusedError(shown), False)

    def _answered(self, target: str, status: int, content: bytes) -> str:
        beginning = content[:BEGINNING_BYTES].decode(errors="replace")
        return f"{target}: status {status}: {self.shown(beginning)}"

    def shown(self, value: Any, width: int = SHOWN_CHARACTERS) -> str:
        """Words of the server for a message: short, printable, and without the key, which a server
        may repeat.
        """
        text = (value if isinstance(value, str) else repr(value))[:BEGINNING_BYTES]
        text = without_passwords(text.replace(self._key, "***") if self._key else text)
        return foreign(text, width)


def whole_characters(content: bytes) -> bytes:
    """JSON in which the replacement character stands for every half of a character."""
    return LONE_SURROGATE.sub(rb"\1\\ufffd", content)


def _reader_of(
    kind: TypeAdapter[HttpReply], check: Callable[[bytes, HttpReply], None] | None = None
) -> Callable[[bytes], HttpReply]:
    def read(content: bytes) -> HttpReply:
        reply = kind.validate_json(whole_characters(content))
        if check is not None:
            check(content, reply)
        return reply

    return read


def _secret_key(endpoint: EndpointConfig) -> str | None:
    if endpoint.api_key_env is None:
        return None
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"the environment variable {endpoint.api_key_env}, which must hold the key of "
            f"{endpoint.url}, is not set on the node that sends the requests: export it before Ray "
            "is started, on every node (without --address: before `polystill run`)"
        )
    if not key.isprintable() or " " in key:
        raise ConfigError(
            f"the environment variable {endpoint.api_key_env}, which must hold the key of "
            f"{endpoint.url}, holds a space, a line break or a control character: export the key "
            "alone"
        )
    return key


def _wait(number: int, asked_seconds: float) -> float:
    """Seconds to wait before the next try: exponential with jitter, so that clients that failed
    together do not come back together.
    """
    longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**number)
    return max(asked_seconds, random.uniform(0.5, 1.0) * longest)


def _retry_after_seconds(retry_after: str) -> float:
    """Seconds in a `Retry-After` header, which holds a number or a date; 0 for anything else."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError, IndexError, TypeError):  # of the library, for odd dates
        return 0.0
