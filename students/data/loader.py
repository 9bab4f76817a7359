"""Loader processes, which make the batches of the coming steps beside the training's own process.

    trainer ──share, as a pickle──> loader process 0: steps 0, 2, 4, …   (standard input)
            <──packed batches────── loader process 1: steps 1, 3, 5, …   (standard output)

A process makes its next step while the trainer computes, and waits until the trainer takes it. A
step is the same whichever process makes it. The processes end with the trainer, however the trainer
ends: their standard input is then at its end, and a thread of each process waits for that. Each
process is started afresh, since a fork would inherit locks of the threads of gloo, CUDA and Ray,
and imports no torch.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import traceback
from typing import Any

from pipeline.errors import DistillationError
from students.data.batches import BatchSource, Share, StepBatch
from students.data.packing import PackedBatch

PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "import students.data.loader as loader; loader.serve()"
)


class Loader:
    """The batches of steps, one after another."""

    def __init__(self, share: Share, steps: range, num_processes: int) -> None:
        """Starts the processes; with `num_processes` 0 this process makes every batch when it is
        received.
        """
        self._steps = iter(steps)
        self._source = BatchSource(share) if num_processes == 0 else None
        self._processes = [
            LoaderProcess(share, steps[place::num_processes]) for place in range(num_processes)
        ]
        self._turn = 0

    @property
    def pids(self) -> list[int]:
        """Ids of the loader processes."""
        return [process.pid for process in self._processes]

    def receive(self) -> StepBatch[PackedBatch]:
        """The batch of the next step.

        Raises:
            DistillationError: a process met an error for the user, which passes as it is.
            RuntimeError: a process died, or met any other error.
        """
        step = next(self._steps)
        if self._source is not None:
            return self._source.step(step)
        batch = self._processes[self._turn].receive()
        assert batch.step == step
        self._turn = (self._turn + 1) % len(self._processes)
        return batch

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.close()


class LoaderProcess:
    """A process that makes the batches of some steps, in order."""

    def __init__(self, share: Share, steps: range) -> None:
        paths = [path or os.getcwd() for path in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(paths)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout
        pickle.dump((share, steps), self._input)
        self._input.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    def receive(self) -> StepBatch[PackedBatch]:
        """The batch of its next step; raises as `Loader.receive`."""
        try:
            received = pickle.load(self._output)
        except (EOFError, pickle.UnpicklingError) as error:
            raise RuntimeError(
                f"loader process {self.pid} ended with code {self._process.wait()}: if it was "
                "killed for memory, lower training.loader_processes or give the workers more memory"
            ) from error
        if isinstance(received, Exception):
            raise received
        return received

    def close(self) -> None:
        """Kills the process, which has nothing to lose."""
        self._process.kill()
        self._process.wait()
        self._input.close()
        self._output.close()


def serve() -> None:
    """Makes and sends batches: the program of a loader process."""
    share, steps = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_the_trainer, daemon=True).start()
    batches = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # printed text goes to the log and not among the batches
    try:
        source = BatchSource(share)
        for step in steps:
            _send(batches, source.step(step))
    except BrokenPipeError:
        os._exit(0)  # nobody reads any more
    except DistillationError as error:
        _send(batches, error)
    except Exception:  # any other error belongs into the trainer's log
        _send(batches, RuntimeError(f"in a loader process:\n{traceback.format_exc()}"))


def _send(batches: Any, message: StepBatch[PackedBatch] | Exception) -> None:
    pickle.dump(message, batches, protocol=5)
    batches.flush()


def _end_with_the_trainer() -> None:
    sys.stdin.buffer.read()
    os._exit(0)
