"""Follows one Ray job: its log line by line as it comes, its end, and a message if it failed."""

import asyncio
import re
import time
from collections.abc import Callable

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.cluster.submit import job_logs
from pipeline.errors import ClusterError

# What Ray's client raises when a connection drops or the server cannot answer now.
DROPPED = (RuntimeError, OSError, aiohttp.ClientError)
LONGEST_PAUSE_SECONDS = 30.0
OUT_OF_MEMORY = re.compile(r"OutOfMemory|based on the killing policy|running low on memory")
MEMORY_ADVICE = (
    "Ray ended processes of it because the node ran out of memory: free some, or give the stage a "
    "larger node."
)
WRONG_PYTHON = re.compile(
    r"\bpython: (command )?not found|No module named '?(ray|yaml|pydantic|pyarrow)"
)
PYTHON_ADVICE = (
    "Jobs run the `python` that the node's Ray finds first: put polystill's .venv/bin at the start "
    "of PATH there, then start Ray again."
)
COMMAND_ERROR = "polystill: "
LONGEST_REASON = 60  # lines; a few teachers' vocabularies fit, a worker's traceback does not
# Ray's own two lines at the top of every job's log.
PREAMBLE = re.compile(r"Running entrypoint for job |.*Runtime env is setting up\.$")


class LogLines:
    """Makes whole lines of a log's pieces; skips what was seen when the log is sent once more."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write = write
        self._seen = 0  # characters
        self._position = 0
        self._unfinished = ""

    def rewind(self) -> None:
        """Tells that the next piece is the start of the log."""
        self._position = 0

    def feed(self, piece: str) -> None:
        """Takes the next piece, of any length, and writes the lines that it completes."""
        new = piece[max(0, self._seen - self._position) :]
        self._position += len(piece)
        self._seen = max(self._seen, self._position)
        *lines, self._unfinished = (self._unfinished + new).split("\n")
        for line in lines:
            self.write(line)

    def close(self) -> None:
        """Writes a last line that the job did not end."""
        if self._unfinished:
            self.write(self._unfinished)
            self._unfinished = ""


def follow(
    client: JobSubmissionClient,
    submission_id: str,
    write: Callable[[str], object],
    *,
    poll_seconds: float = 1.0,
    patience_seconds: float = 300.0,
) -> JobStatus:
    """Writes a job's log as it comes and returns how the job ended.

    Must not be called from a running event loop.

    Args:
        write: takes one line without its newline, as `print` does.
        poll_seconds: time between two looks at the job's status.
        patience_seconds: how long the job server may be out of reach.

    Raises:
        ClusterError: the job is unknown, or the server stayed out of reach; the job itself goes on.
    """
    return asyncio.run(
        _follow(client, submission_id, LogLines(write), poll_seconds, patience_seconds)
    )


async def _follow(
    client: JobSubmissionClient,
    submission_id: str,
    lines: LogLines,
    poll_seconds: float,
    patience_seconds: float,
) -> JobStatus:
    last_answer = time.monotonic()
    stream = asyncio.create_task(_stream(client, submission_id, lines, poll_seconds))
    while True:
        try:
            status = await asyncio.to_thread(client.get_job_status, submission_id)
        except AuthenticationError as error:
            raise ClusterError(f"The cluster no longer accepts the token: {error}") from error
        except DROPPED as error:
            if "does not exist" in str(error):
                raise ClusterError(f"The cluster knows no job {submission_id}.") from error
            if time.monotonic() - last_answer > patience_seconds:
                raise ClusterError(
                    f"The job server has not answered for {patience_seconds:.0f} seconds "
                    f"({error}). The job {submission_id} may still run; the same command attaches "
                    "to it again."
                ) from error
            # What broke the request may have silenced the stream without closing it: open another.
            stream.cancel()
            stream = asyncio.create_task(_stream(client, submission_id, lines, poll_seconds))
        else:
            last_answer = time.monotonic()
            if status.is_terminal():
                break
        await asyncio.sleep(poll_seconds)
    # The stream lags seconds behind the status, so the end of the log is fetched instead.
    stream.cancel()
    try:
        log = await asyncio.to_thread(job_logs, client, submission_id)
    except ClusterError as error:
        lines.close()
        lines.write(f"[{error}]")
    else:
        lines.rewind()
        lines.feed(log)
        lines.close()
    return status


async def _stream(
    client: JobSubmissionClient, submission_id: str, lines: LogLines, pause_seconds: float
) -> None:
    """Reads the log's stream, and opens it again whenever it ends, until cancelled."""
    pause = pause_seconds
    while True:
        opened = time.monotonic()
        lines.rewind()
        try:
            async for piece in client.tail_job_logs(submission_id):
                lines.feed(piece)
        except DROPPED:
            pass  # opened again below; whether the job still runs is for the status to say
        # Each opening sends the log from its start, so a stream that keeps breaking is tried ever
        # more rarely.
        lasted = time.monotonic() - opened > 60
        pause = pause_seconds if lasted else min(2 * pause, LONGEST_PAUSE_SECONDS)
        await asyncio.sleep(pause)


def failure_message(
    client: JobSubmissionClient, submission_id: str, show_all: str, lines: int = 15
) -> str:
    """Says how a job ended: the reason that our command line gave, else the last `lines` of its
    log; and `show_all`, which shows all of it.

    Raises:
        ClusterError: the job is unknown or the job server cannot be reached.
    """
    try:
        info = client.get_job_info(submission_id)
    except DROPPED as error:
        raise ClusterError(f"The job {submission_id} cannot be looked up: {error}") from error
    try:
        log = [line for line in job_logs(client, submission_id).splitlines() if line.strip()]
    except ClusterError as error:
        log = [str(error)]
    printed = [line for line in log if not PREAMBLE.match(line)]
    # What the command line says last is the whole reason; a traceback needs what stands before it.
    starts = [i for i, line in enumerate(printed) if line.startswith(COMMAND_ERROR)]
    if starts:
        shown = _ends(printed[starts[-1] :], LONGEST_REASON)
    else:
        shown = (printed or (info.message or "Ray gives no reason.").splitlines())[-lines:]
    told = [*log, *(info.message or "").splitlines()]
    causes = {MEMORY_ADVICE: OUT_OF_MEMORY, PYTHON_ADVICE: WRONG_PYTHON}
    why = [advice for advice, words in causes.items() if any(map(words.search, told))]
    code = "" if info.driver_exit_code is None else f" with exit code {info.driver_exit_code}"
    return "\n".join(
        [
            f"The job {submission_id} ended as {info.status}{code}. Its last lines:",
            *(f"  {line}" for line in shown),
            *why,
            f"All of it: {show_all}",
        ]
    )


def _ends(lines: list[str], most: int) -> list[str]:
    """The lines; of more than `most` the first, which say what is wrong, and the last."""
    if len(lines) <= most:
        return lines
    half = most // 2
    return [*lines[:half], f"… {len(lines) - 2 * half} lines …", *lines[-half:]]
