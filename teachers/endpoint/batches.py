"""Requests that wait in batches of a provider (OpenAI's batch API), found again by their records.

    <folder>/<id of the batch>.json     keys of its requests

The record is written as soon as the provider has named the batch. A later start asks the provider
for these batches and sends only what none of them holds. A batch that the provider has begun and
nobody has recorded is known by its metadata.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline import storage
from pipeline.config.teachers import EndpointConfig
from pipeline.errors import ConfigError, DistillationError, TeacherError
from pipeline.fingerprint import digest_ids, digest_json
from pipeline.messages import foreign
from teachers.endpoint.replies import BATCH, BATCHES, FILE, LINE, Batch, Line, LineReply
from teachers.endpoint.transport import RETRIED_STATUSES, NotThereError, Requester, whole_characters
from teachers.protocol import ItemRefusedError

GATHERING_SECONDS, POLL_SECONDS = 2.0, 30.0
MAX_REQUESTS, MAX_BYTES = 50_000, 100_000_000
"""Size of a batch; OpenAI takes 50,000 requests and 200 MB."""
LINE_BYTES = 4096
"""Bytes of a line of a batch's output beside the answer."""
MOST_FAILED_LOOKS = 60
"""Looks at a batch, each with its own tries, that may fail in a row: half an hour and more."""
MOST_LOOKS = 20
"""Looks for the files of a batch that has ended without naming them."""
WINDOW = "24h"
MARK = "polystill"
"""Key of a batch's metadata; its value is the digest of the keys of its requests."""
ENDED = frozenset({"completed", "expired", "cancelled"})

HttpReply = TypeVar("HttpReply")


@dataclass(frozen=True)
class _Waiting:
    """A request that waits for a batch: its line in the batch's file."""

    key: str
    url: str
    line: bytes


class Batches:
    """Batches of one endpoint, in the event loop that asks."""

    def __init__(
        self,
        endpoint: EndpointConfig,
        requester: Requester,
        folder: str,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """`folder`: folder of the records; `sleep`: function that waits for a number of seconds."""
        self._model, self._requester = endpoint.model, requester
        self._folder, self._sleep = folder, sleep
        self._replies: dict[str, asyncio.Future[LineReply]] = {}
        self._queue: list[_Waiting] = []
        self._recorded: dict[str, str] | None = None
        self._expected_bytes = 0
        self._ids: set[str] = set()
        self._states: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._sender: asyncio.Task[None] | None = None

    async def ask(
        self,
        path: str,
        kind: TypeAdapter[HttpReply],
        body: dict[str, Any],
        expected_bytes: int = 0,
    ) -> HttpReply:
        """Puts a request into a batch and waits for its reply.

        A request that was refused in a batch is asked at once the second time.

        Args:
            path: path below `/v1`, with its leading slash.
            kind: expected kind of the reply.
            body: JSON content of the request.
            expected_bytes: size of the largest right reply, beside an allowance.

        Raises:
            ConfigError: the provider takes no such batch.
            ItemRefusedError: the request was refused, or has a reply of another shape.
            TeacherError: the batch ended without this reply.
        """
        key = self._key(path, body)
        if key in self._replies and _is_refused(self._replies[key]):
            return await self._requester.ask(path, kind, body, expected_bytes=expected_bytes)
        self._expected_bytes = max(self._expected_bytes, expected_bytes + LINE_BYTES)
        if self._recorded is None:
            self._recorded = self._read_records()
        reply = self._replies[key] = asyncio.get_running_loop().create_future()
        line = {"custom_id": key, "method": "POST", "url": f"/v1{path}", "body": body}
        self._queue.append(_Waiting(key, line["url"], json.dumps(line).encode() + b"\n"))
        if self._sender is None:
            self._sender = self._start(self._gather())
        found = await reply
        status, content = found["status_code"], found["body"]
        if status != 200:
            words = self._requester.shown(content)
            problem = f"a request of a batch was refused: status {status}: {words}"
            raise TeacherError(problem) if _passes(status) else ItemRefusedError(problem)
        try:
            return kind.validate_python(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = self._requester.shown(".".join(map(str, first["loc"])), 100) or "the reply"
            raise ItemRefusedError(
                f"a reply of a batch is not as expected, at {place}: {first['msg']}"
            ) from None

    def state(self) -> str | None:
        """Batches that are not finished, and how far they are; None without any."""
        states = [f"batch {batch}: {state}" for batch, state in self._states.items()]
        return "; ".join(states) or None

    def close(self) -> None:
        """Stops waiting; the batches go on at the provider."""
        for task in self._tasks:
            task.cancel()

    def _key(self, path: str, body: dict[str, Any]) -> str:
        """Name of a request, the same after a restart; equal requests that wait are numbered."""
        digest = key = digest_json([path, body])
        number = 0
        while key in self._replies and not self._replies[key].done():
            number += 1
            key = f"{digest}-{number}"
        return key

    def _read_records(self) -> dict[str, str]:
        """Ids of the recorded batches, by the keys of their requests."""
        found: dict[str, str] = {}
        for info in storage.list_files(self._folder, ".json"):
            record = storage.read_json(storage.join(self._folder, info.base_name))
            found |= dict.fromkeys(record["keys"], record["batch"])
            self._ids.add(record["batch"])
        return found

    async def _record(self, batch: str, keys: Sequence[str]) -> None:
        """Notes which requests a batch holds."""
        self._ids.add(batch)
        others = {key: its for key, its in (self._recorded or {}).items() if its != batch}
        self._recorded = others | dict.fromkeys(keys, batch)
        path = storage.join(self._folder, f"{batch.replace('/', '_')}.json")
        await asyncio.to_thread(storage.write_json, path, {"batch": batch, "keys": list(keys)})

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        """Hands an error of ours to everybody who waits."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(list(self._replies), error)

    async def _gather(self) -> None:
        """Waits until no more requests arrive, then sends what no recorded batch holds."""
        count = 0
        while count < len(self._queue):
            count = len(self._queue)
            await self._sleep(GATHERING_SECONDS)
        queue, self._queue, self._sender = self._queue, [], None
        assert self._recorded is not None, "the records are read before a request waits"
        known: dict[str, list[_Waiting]] = {}
        new = []
        for waiting in queue:
            batch = self._recorded.get(waiting.key)
            (new if batch is None else known.setdefault(batch, [])).append(waiting)
        for batch, members in known.items():
            self._start(self._collect_again(batch, members))
        for members in _in_bounds(new):
            self._start(self._send(members))

    async def _collect_again(self, batch: str, members: Sequence[_Waiting]) -> None:
        """Waits for a recorded batch; what it has lost is sent anew."""
        try:
            lost = await self._collect(batch, [waiting.key for waiting in members])
        except NotThereError:
            lost = {waiting.key for waiting in members}
        except DistillationError as error:
            self._fail([waiting.key for waiting in members], error)
            return
        for again in _in_bounds([waiting for waiting in members if waiting.key in lost]):
            await self._send(again)

    async def _send(self, members: Sequence[_Waiting]) -> None:
        """Sends requests in batches until each has a reply, or a batch answers none of them."""
        while members:
            keys = [waiting.key for waiting in members]
            try:
                batch = await self._begin(members)
                await self._record(batch, keys)
                lost = await self._collect(batch, keys)
            except DistillationError as error:
                self._fail(keys, error)
                return
            if len(lost) == len(members):
                self._fail(
                    keys,
                    ConfigError(
                        f"batch {batch} of {self._model} ended without a reply to any of its "
                        f"{len(keys)} requests: run it again later, or set endpoint.batch: false"
                    ),
                )
                return
            members = [waiting for waiting in members if waiting.key in lost]

    async def _begin(self, members: Sequence[_Waiting]) -> str:
        """Id of a new batch, or of one that was begun and not recorded."""
        mark = digest_ids(sorted(waiting.key for waiting in members))
        for batch in await self._listed():
            marked = (batch.get("metadata") or {}).get(MARK) == mark
            if marked and batch["id"] not in self._ids and not _has_failed(batch):
                return batch["id"]
        content = b"".join(waiting.line for waiting in members)
        file = await self._requester.upload("/files", FILE, content)
        request = {"input_file_id": file["id"], "endpoint": members[0].url}
        request |= {"completion_window": WINDOW, "metadata": {MARK: mark}}
        try:
            begun = await self._requester.ask("/batches", BATCH, request, max_retries=0)
        except ItemRefusedError:
            raise
        except TeacherError:  # it may have begun all the same
            await self._sleep(POLL_SECONDS)
            for batch in await self._listed():
                if batch.get("input_file_id") == file["id"]:
                    return batch["id"]
            begun = await self._requester.ask("/batches", BATCH, request, max_retries=0)
        return begun["id"]

    async def _listed(self) -> list[Batch]:
        """The latest batches; none if the provider does not list them."""
        try:
            return (await self._requester.ask("/batches?limit=100", BATCHES))["data"]
        except (ConfigError, TeacherError):
            return []

    async def _look_at(self, batch: str) -> Batch:
        """State of a batch; a provider that fails for a while does not end the wait for hours."""
        for looks_left in reversed(range(MOST_FAILED_LOOKS)):
            try:
                return await self._requester.ask(f"/batches/{batch}", BATCH)
            except TeacherError as error:
                if isinstance(error, ItemRefusedError) or not looks_left:
                    raise
                self._states[batch] = f"the provider does not say: {error}"
            await self._sleep(POLL_SECONDS)
        raise AssertionError("the last look returns or raises")

    async def _collect(self, batch: str, keys: Sequence[str]) -> set[str]:
        """Waits for the end of a batch and hands out its replies; returns the keys without one.

        The record keeps only the requests that were answered, so that the others can be sent again.
        """
        found, looks = await self._look_at(batch), 0
        while found["status"] not in ENDED or (_lacks_files(found) and looks < MOST_LOOKS):
            looks += found["status"] in ENDED
            if _has_failed(found):
                await self._record(batch, [])
                raise ConfigError(
                    f"the provider failed batch {batch} of {self._model}: "
                    f"{self._requester.shown(found.get('errors'))}; "
                    "mend what it says, or set endpoint.batch: false, and run it again"
                )
            self._states[batch] = _progress(found, len(keys))
            await self._sleep(POLL_SECONDS)
            found = await self._look_at(batch)
        self._states.pop(batch, None)
        left, answered = set(keys), []
        most = self._expected_bytes * max(
            len(keys), [*(self._recorded or {}).values()].count(batch)
        )
        for file in filter(None, (found.get("output_file_id"), found.get("error_file_id"))):
            for line in _lines(await self._requester.download(f"/files/{file}/content", most)):
                key, reply = line["custom_id"], line.get("response") or _refusal(line)
                if reply is not None and reply["status_code"] == 200:
                    answered.append(key)
                if reply is not None and key in left:
                    left.remove(key)
                    if not self._replies[key].done():
                        self._replies[key].set_result(reply)
        await self._record(batch, answered)
        return left

    def _fail(self, keys: Sequence[str], error: BaseException) -> None:
        for key in keys:
            if not self._replies[key].done():
                self._replies[key].set_exception(error)


def _progress(batch: Batch, num_requests: int) -> str:
    counts = batch.get("request_counts") or {}
    done = counts.get("completed", 0) + counts.get("failed", 0)
    return (
        f"{foreign(batch['status'], 40)}, {done} of {counts.get('total') or num_requests} requests"
    )


def _lacks_files(batch: Batch) -> bool:
    """Whether a batch has answers and does not name the files that hold them yet."""
    counts = batch.get("request_counts") or {}
    done = counts.get("completed", 0) + counts.get("failed", 0)
    return done > 0 and not (batch.get("output_file_id") or batch.get("error_file_id"))


def _lines(content: bytes) -> Iterator[Line]:
    """Lines of a batch's output that can be read; the requests of the others have no reply."""
    for line in whole_characters(content).splitlines():
        with contextlib.suppress(ValidationError):
            yield LINE.validate_json(line)


def _has_failed(batch: Batch) -> bool:
    return batch["status"] == "failed"


def _passes(status: int) -> bool:
    """Whether another batch may not meet a status."""
    return status in RETRIED_STATUSES or status >= 500


def _is_refused(reply: asyncio.Future[LineReply]) -> bool:
    """Whether a request has a reply that would come again and is no answer."""
    has_one = reply.done() and not reply.cancelled() and reply.exception() is None
    status = reply.result()["status_code"] if has_one else 200
    return status != 200 and not _passes(status)


def _refusal(line: Line) -> LineReply | None:
    """Reply that the error of a line stands for; None if the batch ended before the request."""
    error = line.get("error")
    code = str(error.get("code", "")) if isinstance(error, dict) else str(error or "")
    if error is None or "expired" in code or "cancel" in code:
        return None
    return {"status_code": 400, "body": error}


def _in_bounds(waiting: Sequence[_Waiting]) -> list[list[_Waiting]]:
    """Requests in groups that fit into one batch; all requests of a group have one path."""
    groups: list[list[_Waiting]] = []
    size = 0
    for each in sorted(waiting, key=lambda each: each.url):
        size += len(each.line)
        last = groups[-1] if groups else []
        if last and last[0].url == each.url and len(last) < MAX_REQUESTS and size <= MAX_BYTES:
            last.append(each)
        else:
            groups.append([each])
            size = len(each.line)
    return groups
