"""Connection to a cluster's job server: address, token, one clear error for each way to fail."""

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from pipeline.credentials import shown_url, without_passwords
from pipeline.errors import ClusterError
from pipeline.messages import short

CONNECT_SECONDS, ANSWER_SECONDS = 5, 60
ANSWER_BYTES, TOKEN_BYTES = 2**16, 2**13
# Ray prefers these variables to an address that its caller passes.
ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
# These loggers report every upload and every closed connection.
CHATTY_LOGGERS = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
)
HOW_TO_AUTHENTICATE = (
    "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token or RAY_AUTH_TOKEN_PATH to "
    "a file that holds the token"
)


class _Client(JobSubmissionClient):
    """Ray's client with a time limit for every request; Ray's own sets none."""

    def _do_request(self, *args: Any, **kwargs: Any) -> requests.Response:
        return super()._do_request(*args, timeout=(CONNECT_SECONDS, ANSWER_SECONDS), **kwargs)


def connect(address: str) -> JobSubmissionClient:
    """Opens a client for a job server, with the token that the environment names.

    `address` takes precedence over RAY_ADDRESS and RAY_API_SERVER_ADDRESS, which Ray's own client
    would prefer.

    Args:
        address: URL of the job server.

    Raises:
        ClusterError: the address is no URL, no job server answers there (this is known within 10
            seconds), or the token is missing or wrong.
    """
    shown = shown_url(address)
    if not _is_url_of_a_server(address):
        raise ClusterError(
            f"the address {short(shown)!r} is not the URL of a job server, such as "
            "http://head-node:8265"
        )
    address = address.rstrip("/")
    headers = _authorization()
    try:
        status, text = _first_answer(f"{address}/api/version", headers)
    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
        raise ClusterError(
            f"no Ray job server can be reached at {shown} ({type(error).__name__}): check that "
            "the cluster is up, that this is the port of its dashboard (8265 by default), and any "
            "tunnel or proxy in between"
        ) from error
    # A proxy refuses with the same codes, but its answer does not mention tokens.
    about_token = "authentication token" in text
    if about_token and status == requests.codes.unauthorized:
        raise ClusterError(
            f"the cluster at {shown} asks for a token and none was sent: {HOW_TO_AUTHENTICATE}"
        )
    if about_token and status == requests.codes.forbidden:
        raise ClusterError(
            f"the cluster at {shown} does not accept this token: {HOW_TO_AUTHENTICATE}"
        )
    if status != requests.codes.ok or "ray_version" not in text:
        raise ClusterError(
            f"{shown} answers with HTTP {status}, but not as a Ray job server does: "
            f"{text[:200]!r}; if a proxy answers, add the host to NO_PROXY"
        )
    for name in CHATTY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    with _without_address_variables(), cluster_errors(f"cannot connect to {shown}"):
        return _Client(address, headers=headers)


def _is_url_of_a_server(address: str) -> bool:
    """Whether an address names a server and, if at all, a proxy's path to it."""
    try:
        parts = urlsplit(address if address.isprintable() else "")
        host, _ = parts.hostname, parts.port  # the port's number is checked where it is read
    except ValueError:
        return False
    is_server = parts.scheme in ("http", "https") and host and " " not in host
    return bool(is_server) and not parts.query and not parts.fragment


def _first_answer(url: str, headers: dict[str, str]) -> tuple[int, str]:
    """Status and beginning of an answer; what answers there may be anything, also endless."""
    deadline, pieces = time.monotonic() + CONNECT_SECONDS, [b""]
    with requests.get(
        url, headers=headers, timeout=CONNECT_SECONDS, stream=True, allow_redirects=False
    ) as answer:
        while sum(map(len, pieces)) < ANSWER_BYTES and time.monotonic() < deadline:
            pieces.append(answer.raw.read1(ANSWER_BYTES, decode_content=True))
            if not pieces[-1]:
                break
    return answer.status_code, b"".join(pieces)[:ANSWER_BYTES].decode(errors="replace")


def _authorization() -> dict[str, str]:
    """HTTP header with the environment's token.

    Ray's own lookup is not used, since it keeps the first token for the whole process.

    Raises:
        ClusterError: there is no token, or it cannot be one; the message does not repeat it.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return {}
    token, source = os.environ.get("RAY_AUTH_TOKEN", "").strip(), "RAY_AUTH_TOKEN"
    if not token:
        path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
        token, source = _token_of(path), str(path)
    if not re.fullmatch(r"[!-~]{1,4096}", token):
        raise ClusterError(
            f"{source} holds no token: a token is one word of ASCII characters; "
            f"{HOW_TO_AUTHENTICATE}"
        )
    return {"Authorization": f"Bearer {token}"}


def _token_of(path: Path) -> str:
    """Content of a file with a token."""
    if not path.is_file():
        raise ClusterError(
            f"RAY_AUTH_MODE is token, but there is no token ({path} is missing): "
            f"{HOW_TO_AUTHENTICATE}"
        )
    try:
        with path.open("rb") as file:
            return file.read(TOKEN_BYTES).decode(errors="replace").strip()
    except OSError as error:
        raise ClusterError(f"the token cannot be read: {error}; {HOW_TO_AUTHENTICATE}") from error


@contextmanager
def _without_address_variables() -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


@contextmanager
def cluster_errors(failure: str) -> Iterator[None]:
    """Turns every error of Ray's client into a ClusterError that begins with `failure`."""
    try:
        yield
    except AuthenticationError as error:
        raise ClusterError(
            f"{failure}: the cluster refused the token; {HOW_TO_AUTHENTICATE}"
        ) from error
    except (RuntimeError, OSError) as error:  # requests' errors are OSErrors
        raise ClusterError(f"{failure}: {without_passwords(str(error))}") from error


def job_server_address_inside_job() -> str:
    """Finds the URL of the job server from inside a Ray job.

    A job's RAY_ADDRESS is the address of the cluster's control store, which knows the job server.
    The token is in the environment that the job inherits from its node.

    Raises:
        ClusterError: this process is no Ray job, or the cluster cannot be reached.
    """
    if not os.environ.get("RAY_ADDRESS"):
        raise ClusterError(
            "RAY_ADDRESS is not set, so this process does not run inside a Ray job: give --address"
        )
    with cluster_errors("the job server of this job's cluster cannot be reached"):
        return JobSubmissionClient().get_address()
