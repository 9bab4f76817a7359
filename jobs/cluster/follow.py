"""Follows one Ray job: its log, line by line as it comes, its end, and a message if it failed."""

import asyncio
import math
import re
import time
from collections.abc import Callable

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

from jobs.cluster.submit import job_logs
from pipeline.errors import ClusterError

# Errors of Ray's client if a connection drops or the server cannot answer now.
DROPPED = (RuntimeError, OSError, aiohttp.ClientError)
LONGEST_PAUSE_SECONDS = 30.0
OUT_OF_REACH_SECONDS = 10.0
"""Time without an answer of the job server after which its follower says so."""
SILENCE_SECONDS = 25.0
"""Longest silence of a stage before its follower says that it still runs."""
OUT_OF_MEMORY = re.compile(r"OutOfMemory|based on the killing policy|running low on memory")
MEMORY_ADVICE = (
    "Ray ended processes of the job because the node ran out of memory: free some, or give the "
    "stage a larger node"
)
WRONG_PYTHON = re.compile(
    r"\bpython: (command )?not found|No module named '?(ray|yaml|pydantic|pyarrow)"
)
PYTHON_ADVICE = (
    "Jobs run the `python` that the node's Ray finds first: put polystill's .venv/bin at the start "
    "of PATH there, then start Ray again"
)
COMMAND_ERROR = "polystill: "
LONGEST_REASON = 60  # lines; the vocabularies of a few teachers fit, a traceback does not
# Ray's own two lines at the top of every job's log.
PREAMBLE = re.compile(r"Running entrypoint for job |.*Runtime env is setting up\.$")
# Ray's news of nodes and workers; when a node dies, pages of its log follow, indented.
RAYLET = re.compile(r"(\x1b\[\d+m)?\(raylet[^)]*\)")


class OwnLines:
    """Tells a job's own lines from those that Ray's processes put into its log."""

    def __init__(self) -> None:
        self._within_rays = False

    def __call__(self, line: str) -> bool:
        """Whether the next line of the log is the job's own."""
        goes_on = self._within_rays and (not line.strip() or line[:1].isspace())
        self._within_rays = goes_on or bool(RAYLET.match(line))
        return not self._within_rays and not PREAMBLE.match(line)


class LogLines:
    """Puts the pieces of a log together to lines.

    The log may be sent again from its start; everything that was seen before is then skipped.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self.written_at = time.monotonic()
        self._seen = 0  # characters
        self._position = 0
        self._unfinished = ""

    def rewind(self) -> None:
        """Declares that the next piece is the start of the log."""
        self._position = 0

    def write(self, line: str) -> None:
        """Writes one line."""
        self.written_at = time.monotonic()
        self._write(line)

    def feed(self, piece: str) -> None:
        """Takes the next piece, of any length, and writes the lines that it completes."""
        new = piece[max(0, self._seen - self._position) :]
        self._position += len(piece)
        self._seen = max(self._seen, self._position)
        *lines, self._unfinished = (self._unfinished + new).split("\n")
        for line in lines:
            self.write(line)

    def close(self) -> None:
        """Writes the last line, if the job did not end it with a newline."""
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
    silence_seconds: float = math.inf,
) -> JobStatus:
    """Writes a job's log as it comes and returns how the job ended.

    Must not be called from a running event loop.

    Args:
        client: client of the job server.
        submission_id: id of the job.
        write: function that takes one line without its newline.
        poll_seconds: time between two requests for the job's status.
        patience_seconds: time for which the job server may be out of reach.
        silence_seconds: time without a line after which one says that the job still runs.

    Raises:
        ClusterError: the job is unknown, or the server stayed out of reach. The job itself
            continues.
    """
    lines = LogLines(write)
    return asyncio.run(
        _follow(client, submission_id, lines, poll_seconds, patience_seconds, silence_seconds)
    )


async def _follow(
    client: JobSubmissionClient,
    submission_id: str,
    lines: LogLines,
    poll_seconds: float,
    patience_seconds: float,
    silence_seconds: float,
) -> JobStatus:
    begun = last_answer = time.monotonic()
    is_known = is_lost = False
    stream = asyncio.create_task(_stream(client, submission_id, lines, poll_seconds))
    while True:
        try:
            status = await asyncio.to_thread(client.get_job_status, submission_id)
        except AuthenticationError as error:
            raise ClusterError(f"the cluster no longer accepts the token: {error}") from error
        except DROPPED as error:
            if "does not exist" in str(error):
                raise ClusterError(_forgotten(submission_id, is_known)) from error
            if not is_lost and time.monotonic() - last_answer >= OUT_OF_REACH_SECONDS:
                is_lost = True
                lines.write(
                    f"no answer from the job server for {time.monotonic() - last_answer:.0f} s "
                    f"({type(error).__name__}); the job may go on, and is followed again if an "
                    f"answer comes within {patience_seconds:.0f} s"
                )
            if time.monotonic() - last_answer > patience_seconds:
                raise ClusterError(
                    f"the job server has not answered for {patience_seconds:.0f} seconds "
                    f"({error}); the job {submission_id} may still run: run the same command again "
                    "to attach to it"
                ) from error
            # The stream may be silent without being closed, for the same reason: open another.
            stream.cancel()
            stream = asyncio.create_task(_stream(client, submission_id, lines, poll_seconds))
        else:
            last_answer = time.monotonic()
            if is_lost:
                lines.write("the job server answers again")
            is_known, is_lost = True, False
            if status.is_terminal():
                break
            if last_answer - lines.written_at >= silence_seconds:
                lines.write(_still(status, last_answer - begun))
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


def _still(status: JobStatus, seconds: float) -> str:
    if status == JobStatus.PENDING:
        return (
            f"not started after {seconds:.0f} s: the cluster has no room for the job's process "
            "(cluster.job_resources), or prepares its environment"
        )
    return f"still running after {seconds:.0f} s"


def _forgotten(submission_id: str, is_known: bool) -> str:
    """Message about a job that the cluster does not know, or knows no longer."""
    if is_known:
        return (
            f"the cluster knows no job {submission_id} any more: its head was restarted; run the "
            "same command again, which does only what is missing"
        )
    return (
        f"the cluster knows no job {submission_id}: list the jobs with `polystill status`; if the "
        "head was restarted since, run the command of the job again"
    )


async def _stream(
    client: JobSubmissionClient, submission_id: str, lines: LogLines, pause_seconds: float
) -> None:
    """Reads the log as a stream, which is opened again whenever it ends, until cancelled."""
    pause = pause_seconds
    while True:
        opened = time.monotonic()
        lines.rewind()
        try:
            async for piece in client.tail_job_logs(submission_id):
                lines.feed(piece)
        except DROPPED:
            pass  # the stream is opened again below; the job's status tells whether it still runs
        # Each opening sends the log from its start, so a stream that keeps breaking is opened less
        # and less often.
        lasted = time.monotonic() - opened > 60
        pause = pause_seconds if lasted else min(2 * pause, LONGEST_PAUSE_SECONDS)
        await asyncio.sleep(pause)


def failure_message(
    client: JobSubmissionClient, submission_id: str, show_all: str, lines: int = 15
) -> str:
    """Describes how a job ended, with the reason if the log has one, else with its last lines.

    Args:
        client: client of the job server.
        submission_id: id of the job.
        show_all: command that shows the whole log.
        lines: number of last lines.

    Raises:
        ClusterError: the job is unknown or the job server cannot be reached.
    """
    try:
        info = client.get_job_info(submission_id)
    except DROPPED as error:
        raise ClusterError(f"the job {submission_id} cannot be looked up: {error}") from error
    try:
        log = [line for line in job_logs(client, submission_id).splitlines() if line.strip()]
    except ClusterError as error:
        log = [str(error)]
    printed = list(filter(OwnLines(), log))
    # A message of the command line is the whole reason; of a traceback the last lines are shown.
    starts = [i for i, line in enumerate(printed) if line.startswith(COMMAND_ERROR)]
    if starts:
        shown = _ends(printed[starts[-1] :], LONGEST_REASON)
    else:
        shown = (printed or (info.message or "Ray gives no reason").splitlines())[-lines:]
    all_lines = [*log, *(info.message or "").splitlines()]
    causes = {MEMORY_ADVICE: OUT_OF_MEMORY, PYTHON_ADVICE: WRONG_PYTHON}
    remedies = [remedy for remedy, words in causes.items() if any(map(words.search, all_lines))]
    code = "" if info.driver_exit_code is None else f" with exit code {info.driver_exit_code}"
    return "\n".join(
        [
            f"the job {submission_id} ended as {info.status}{code}; its last lines:",
            *(f"  {line}" for line in shown),
            *remedies,
            f"the whole log: {show_all}",
        ]
    )


def _ends(lines: list[str], most: int) -> list[str]:
    """The lines, or their beginning and end if there are more than `most`."""
    if len(lines) <= most:
        return lines
    half = most // 2
    return [*lines[:half], f"… {len(lines) - 2 * half} lines …", *lines[-half:]]
