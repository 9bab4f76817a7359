"""Requests over HTTP that outlast what passes: limits of rate, restarts, dropped connections.

The key comes from the environment of the process that asks, stands in one header, and in no
message: libraries' errors are not passed on, for some hold the request with its headers.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import aiohttp
from pydantic import TypeAdapter, ValidationError

from pipeline.config.teachers import EndpointConfig
from pipeline.errors import ConfigError, TeacherError
from teachers.protocol import EngineDiedError

logger = logging.getLogger(__name__)

FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 60.0
SHOWN_CHARACTERS = 300
PASSING = frozenset({408, 409, 425, 429})
"""Beside 5xx, what may go otherwise next time; other 4xx come again."""
AWAY = frozenset({408, 425, 429, 502, 503, 504})
"""Say nothing against the request: who does not get beyond them has lost the server."""
NEEDS_ANOTHER_CONFIG = {
    401: "the key is missing or not accepted: see endpoint.api_key_env",
    402: "the account has no credit left: what is finished is kept, so run it again with some",
    403: "the key does not allow this: see endpoint.api_key_env",
    404: "there is no such path or model: check endpoint.url, endpoint.model and endpoint.api",
    405: "there is no such path: check endpoint.url and endpoint.api",
}

FORBIDDEN = 403
"""Of a key at first; from a server that has answered it, some APIs' word for one prompt that is not
to their taste.
"""

Reply = TypeVar("Reply")


class _TryFailed(Exception):
    """One try gave nothing.

    Attributes:
        error: of the kind to raise when no further try is made.
        passes: another try may succeed.
        wait_seconds: what the server asks to wait.
    """

    def __init__(
        self, error: TeacherError | ConfigError, passes: bool, wait_seconds: float = 0.0
    ) -> None:
        super().__init__()
        self.error, self.passes, self.wait_seconds = error, passes, wait_seconds


class Requester:
    """A connection to one API; all its requests run in the event loop that made it."""

    def __init__(
        self,
        endpoint: EndpointConfig,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """`sleep`: waits so many seconds between tries.

        Raises:
            ConfigError: the key's variable is not set here.
        """
        self._endpoint, self._sleep = endpoint, sleep
        self._key = _key(endpoint)
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=endpoint.max_concurrency),
            timeout=aiohttp.ClientTimeout(total=endpoint.timeout_seconds),
            headers=headers,
        )
        self._slots = asyncio.Semaphore(endpoint.max_concurrency)
        self._has_answered = False

    async def ask(
        self, path: str, kind: TypeAdapter[Reply], body: dict[str, Any] | None = None
    ) -> Reply:
        """Posts a body, or gets without one, until the reply is of the kind wanted.

        Args:
            path: behind the endpoint's url, beginning with a slash; or a whole URL.

        Raises:
            ConfigError: the server will never accept such requests: key, credit, path or model.
            TeacherError: it does not accept this one, or fails at it each time.
            EngineDiedError: it is gone, or too busy for all tries.
        """
        url = path if "://" in path else self._endpoint.url + path
        async with self._slots:  # also while it waits, so that a busy server is asked less
            for number in range(self._endpoint.max_retries + 1):
                try:
                    return await self._once(url, kind, body)
                except _TryFailed as failed:
                    failure = failed
                if not failure.passes:
                    raise failure.error
                if failure.wait_seconds > self._endpoint.timeout_seconds:
                    asked = f"asks to wait {failure.wait_seconds:.0f} s"
                    raise type(failure.error)(
                        f"{failure.error}; it {asked}, longer than endpoint.timeout_seconds"
                    )
                if number < self._endpoint.max_retries:
                    seconds = _wait(number, failure.wait_seconds)
                    logger.info("%s; again in %.1f s", failure.error, seconds)
                    await self._sleep(seconds)
        tries = f"{self._endpoint.max_retries + 1} tries (endpoint.max_retries)"
        raise type(failure.error)(f"{failure.error}; given up after {tries}")

    async def close(self) -> None:
        """Drops the connections."""
        await self._session.close()

    async def _once(self, url: str, kind: TypeAdapter[Reply], body: dict[str, Any] | None) -> Reply:
        method = "GET" if body is None else "POST"
        asked = f"{method} {url}"
        try:
            request = self._session.request(method, url, json=body, allow_redirects=False)
            async with request as response:
                status, content = response.status, await response.read()
                asks_to_wait = response.headers.get("Retry-After", "")
        except TimeoutError:
            seconds = self._endpoint.timeout_seconds
            problem = f"{asked}: no answer within {seconds:g} s (endpoint.timeout_seconds)"
            raise _TryFailed(EngineDiedError(problem), True) from None
        except (aiohttp.ClientError, OSError) as error:
            problem = self._clean(f"{asked}: {type(error).__name__}: {error}")
            raise _TryFailed(EngineDiedError(problem), True) from None
        if status != 200:
            shown = self._shown(asked, status, content)
            raise self._refusal(status, shown, _seconds(asks_to_wait))
        try:
            reply = kind.validate_json(content)
        except ValidationError as error:
            shown = self._shown(asked, status, content)
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"])) or "the reply"
            problem = f"{shown}: not the reply expected, at {place}: {first['msg']}"
            raise _TryFailed(TeacherError(problem), True) from None
        # Who lists its models may do so for everybody; only an answer shows that the key will do.
        self._has_answered |= body is not None
        return reply

    def _refusal(self, status: int, shown: str, wait_seconds: float) -> _TryFailed:
        of_this_request = status == FORBIDDEN and self._has_answered
        if status in NEEDS_ANOTHER_CONFIG and not of_this_request:
            return _TryFailed(ConfigError(f"{shown} -- {NEEDS_ANOTHER_CONFIG[status]}"), False)
        if status < 400:
            final = "name the final address in endpoint.url"
            return _TryFailed(ConfigError(f"{shown} -- {final}"), False)
        if status in AWAY:
            return _TryFailed(EngineDiedError(shown), True, wait_seconds)
        return _TryFailed(TeacherError(shown), status in PASSING or status >= 500, wait_seconds)

    def _shown(self, asked: str, status: int, content: bytes) -> str:
        text = _shortened(self._clean(content.decode(errors="replace")))
        return f"{asked}: status {status}: {text}"

    def _clean(self, text: str) -> str:
        """Without the key, which a server may repeat."""
        return text.replace(self._key, "***") if self._key else text


def _key(endpoint: EndpointConfig) -> str | None:
    if endpoint.api_key_env is None:
        return None
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            f"the environment variable {endpoint.api_key_env}, which holds the key of "
            f"{endpoint.url}, is not set where it is asked: export it before Ray is started, on "
            "every node (without --address: before `polystill run`)"
        )
    return key


def _wait(number: int, asked_seconds: float) -> float:
    """Exponential with jitter, so that clients that failed together do not come back together."""
    longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2**number)
    return max(asked_seconds, random.uniform(0.5, 1.0) * longest)


def _seconds(retry_after: str) -> float:
    """Of a `Retry-After` header: a number of seconds or a date; 0 of anything else."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return 0.0


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
