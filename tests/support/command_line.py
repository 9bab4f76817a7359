"""The command line as a user meets it: a process of its own, its exit code and its output."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples/quickstart"
POLYSTILL = (sys.executable, "-m", "jobs")
# Variables that point at a cluster; a command must not inherit the head of another test.
CLUSTER_VARIABLES = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without the cluster variables, and with the given changes."""
    kept = {name: value for name, value in os.environ.items() if name not in CLUSTER_VARIABLES}
    return kept | dict(changes)


def token_environment(token: str) -> dict[str, str]:
    """Variables that a user sets to reach a cluster with a token."""
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def polystill(
    *arguments: str | Path, seconds: float = 120, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end; `env` is added to the environment."""
    return subprocess.run(
        [*POLYSTILL, *map(str, arguments)],
        cwd=ROOT,
        env=environment(env or {}),
        capture_output=True,
        text=True,
        timeout=seconds,
    )


@dataclass(frozen=True)
class RunningCommand:
    """A command that still runs, and the files that take its output."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path

    def wait_until(self, what: str, condition: Callable[[], bool], seconds: float) -> None:
        """Waits for a condition, which must come true before the deadline and the command's end."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = self.process.poll()
            assert ended is None, f"ended with {ended} before {what}:\n{self.printed()}"
            assert time.monotonic() < deadline, f"no sign of {what}:\n{self.printed()}"
            time.sleep(0.01)

    def family(self) -> list[psutil.Process]:
        """All processes below the command: the head, its daemons, jobs, actors and workers."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def printed(self) -> str:
        """Output of both streams so far, for messages."""
        return self.stdout.read_text() + self.stderr.read_text()


def hear_interrupts() -> None:
    """Makes this process hear interrupts, which a shell lets its background processes ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_polystill(
    folder: Path,
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    within: Sequence[str] = (),
) -> RunningCommand:
    """Starts one command whose output goes to files in `folder`; `env` is added, and `within` are
    words before the command, such as `ip netns exec NAME`.

    It hears Ctrl-C as in a terminal, also where a shell runs the tests in the background.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stdout, stderr = folder / "stdout", folder / "stderr"
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(
            [*within, *POLYSTILL, *map(str, arguments)],
            cwd=ROOT,
            env=environment(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            preexec_fn=hear_interrupts,
        )
    return RunningCommand(process, stdout, stderr)


def local_head_folder(family: list[psutil.Process]) -> Path:
    """The private folder of the head below a command, from its guardian's command line."""
    for process in family:
        words = process.cmdline()
        if len(words) > 3 and words[2].endswith("head_guardian.py"):
            return Path(words[3])
    raise AssertionError(f"no head among {[process.name() for process in family]}")


def processes_of_head(folder: Path) -> list[str]:
    """Processes on this machine that name a head's folder or work in it."""
    found = []
    for process in psutil.process_iter():
        try:
            traces = [process.cwd(), *process.cmdline()]
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if any(str(folder) in trace for trace in traces):
            found.append(f"{process.pid} {' '.join(traces)[:200]}")
    return found


def file_times(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time in ns of every file below a folder, by relative path."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
