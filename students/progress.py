"""The numbers of a training while it runs: written by rank 0, read back by the driver for its log,
which also says what else happens to the training.

<training folder>/metrics.jsonl   one line per logged step: {"step": n, "train/loss": …, …}
<training folder>/tensorboard/    the same as TensorBoard events
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from pipeline import storage
from pipeline.run.training_spec import TrainingSpec

logger = logging.getLogger(__name__)

FOLLOW_SECONDS = 1.0
"""Pause between two looks at the metrics file."""
LINES_PER_TRAINING = 20
NAMES = {"train/loss": "loss", "holdout/loss": "hold-out loss"}
"""Names of the metrics in progress lines."""


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a training's metrics; an unfinished last line is left out."""
    text = Path(path).read_text() if Path(path).exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class MetricsLog:
    """The metrics of rank 0, as lines and beside them as events of TensorBoard; lines that an
    interrupted run wrote after `step` are dropped.
    """

    def __init__(self, path: str, step: int, check: Callable[[], None] = lambda: None) -> None:
        """Begins after a step.

        Args:
            check: called before each line; it raises where this process may write no longer.
        """
        check()
        self._check = check
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        storage.write_bytes(path, text.encode())
        file = Path(path)
        self._stream = file.open("a")
        self._events = SummaryWriter(str(file.with_name("tensorboard")), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line, which is in the file when this returns."""
        self._check()
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        self._stream.close()
        self._events.close()


class FollowedTraining:
    """Logs, while entered, about `LINES_PER_TRAINING` of the lines of metrics that rank 0 writes,
    and every notice.
    """

    def __init__(self, spec: TrainingSpec, notices: Callable[[float], list[str]]) -> None:
        """Begins when it is entered.

        Args:
            notices: gives the notices since its last call, at a time in seconds since 1970.
        """
        self._spec, self._notices = spec, notices
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow-training", daemon=True)

    def __enter__(self) -> FollowedTraining:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _follow(self) -> None:
        lines = read_metrics(self._spec.metrics_path)
        pace = Pace(self._spec.config.training.steps)
        finished = False
        while not finished:
            finished = self._stopped.wait(FOLLOW_SECONDS)
            seen, lines = lines, read_metrics(self._spec.metrics_path)
            for text in self._notices(time.time()):
                logger.info("%s %s", self._spec.student, text)
            for values in lines[_equal_lines(seen, lines) :]:
                line = pace.line(values)
                if line:
                    logger.info("%s %s", self._spec.student, line)


def _equal_lines(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> int:
    """Number of lines at the beginning that are still there; a restarted worker drops the lines
    after its checkpoint, and writes them again.
    """
    pairs = zip(before, now, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(before), len(now)))


class Pace:
    """Chooses the lines that a person reads: evenly over the steps, the first and the last."""

    def __init__(self, steps: int) -> None:
        self._steps, self._step, self._last, self._holdout = steps, 0, 0, {}

    def line(self, values: dict[str, float]) -> str | None:
        """The progress line for these metrics, or None to log nothing; a hold-out loss waits for
        the next line.
        """
        step = int(values["step"])
        if step <= self._step:  # a restart has taken the steps after its checkpoint anew
            self._last, self._holdout = 0, {}
        self._step = step
        self._holdout |= {name: values[name] for name in values.keys() & {"holdout/loss"}}
        if step not in (1, self._steps) and step - self._last < self._steps / LINES_PER_TRAINING:
            return None
        text = describe_metrics(values | self._holdout)
        self._last, self._holdout = step, {}
        return f"step {step}/{self._steps}: {text}"


def describe_metrics(values: dict[str, float]) -> str:
    """Losses in nats per position and the speed, as far as they are known."""
    parts = [f"{name} {values[key]:.4g}" for key, name in NAMES.items() if key in values]
    if "train/tokens_per_second" in values:
        parts.append(f"{values['train/tokens_per_second']:.0f} tokens/s")
    return ", ".join(parts)
