"""Access to file systems: which one holds a path, its errors in words for users, and other tries.

`pyarrow` itself retries a request to an object store for about six seconds. `retried` tries again
what fails for longer, after the pauses of `PAUSES_SECONDS`, and then reports the failure.
"""

from __future__ import annotations

import errno
import functools
import logging
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pyarrow import fs

from pipeline.credentials import shown_url, without_passwords
from pipeline.errors import StorageError, StoreUnreachableError
from pipeline.messages import shorter, shown, shown_path

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
PAUSES_SECONDS = (2.0, 8.0)
BUCKETS = ("s3", "gs")
"""Schemes of stores whose paths begin with a bucket."""
# Errors of an object store that no other try can change.
LASTING = re.compile(
    "ACCESS_DENIED|NO_SUCH_BUCKET|INVALID|SIGNATURE|VALIDATION|EXPIRED|PERMISSION_DENIED"
    "|UNAUTHENTICATED|NOT_FOUND"
)


def filesystem_of(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system that holds a path or URI, and the path in it.

    A process keeps one file system for each bucket, and with it the connections to the store.

    Raises:
        StorageError: no such store can be reached, or no file can have this name.
    """
    if "\0" in uri or not uri.isascii():
        _refuse_unencodable(uri)
    if "://" not in uri:
        return fs.LocalFileSystem(), uri
    parts = urlsplit(uri)
    try:
        if parts.scheme not in BUCKETS or parts.query or parts.fragment:
            return fs.FileSystem.from_uri(uri)
        bucket = parts.netloc.rpartition("@")[2]
        return _store_of(f"{parts.scheme}://{parts.netloc}"), bucket + unquote(parts.path)
    except (pa.ArrowInvalid, OSError) as error:
        raise StorageError(
            f"cannot reach {shown_path(shown_url(uri))}: {without_passwords(shorter(error))}; "
            "check its scheme (s3://, gs://), its bucket and the credentials of this machine"
        ) from error


@functools.lru_cache(maxsize=16)
def _store_of(bucket: str) -> fs.FileSystem:
    # Without this, pyarrow uploads even the smallest object in three requests.
    options = "?allow_delayed_open=true" if bucket.startswith("s3://") else ""
    return fs.FileSystem.from_uri(bucket + options)[0]


def _refuse_unencodable(uri: str) -> None:
    """Refuses a path that holds NUL, or half a character (bytes that are not UTF-8)."""
    try:
        uri.encode()
    except UnicodeEncodeError as error:
        raise StorageError(
            f"{shown(uri)} is not in UTF-8: rename the file, or correct the path"
        ) from error
    if "\0" in uri:
        raise StorageError(f"{shown(uri)} holds the character NUL, which no path has: correct it")


@contextmanager
def explained(action: str, uri: str) -> Iterator[None]:
    """Context in which every `OSError` becomes a `StorageError` with a message for users.

    Args:
        action: verb for the message, such as `write`.
        uri: path or URI that the action concerns.
    """
    shown = shown_path(shown_url(uri))
    try:
        yield
    except FileNotFoundError as error:
        raise StorageError(f"cannot {action} {shown}: it does not exist") from error
    except pa.ArrowInvalid as error:  # a path such as `name:rest`, which may be a URI
        raise StorageError(
            f"cannot {action} {shown}: {without_passwords(shorter(error))}"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(
                f"cannot {action} {shown}: the disk is full; everything finished so far is kept; "
                "free some space and run the same command again"
            ) from error
        is_object = "://" in uri and not uri.startswith("file://")
        may_pass = is_object and error.errno is None and not LASTING.search(str(error))
        kind = StoreUnreachableError if may_pass else StorageError
        raise kind(f"cannot {action} {shown}: {without_passwords(shorter(error))}") from error


def retried(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: calls a function again, after pauses, while an object store does not answer."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for pause in PAUSES_SECONDS:
            try:
                return function(*args, **kwargs)
            except StoreUnreachableError as error:
                logger.warning("%s; trying again in %g s", error, pause)
                time.sleep(pause)
        return function(*args, **kwargs)

    return call
