"""The numbers of a training while it runs: written by rank 0, read back by the driver for its log.

<training folder>/metrics.jsonl   one line per logged step: {"step": n, "train/loss": …, …}
<training folder>/tensorboard/    the same as TensorBoard events
"""

from __future__ import annotations

import json
import logging
import threading
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

    def __init__(self, path: str, step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        storage.write_bytes(path, text.encode())
        file = Path(path)
        self._stream = file.open("a")
        self._events = SummaryWriter(str(file.with_name("tensorboard")), purge_step=step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one line, which is in the file when this returns."""
        self._stream.write(json.dumps({"step": step, **values}) + "\n")
        self._stream.flush()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        self._stream.close()
        self._events.close()


class FollowedMetrics:
    """Logs, while entered, about `LINES_PER_TRAINING` of the lines that rank 0 writes."""

    def __init__(self, spec: TrainingSpec) -> None:
        self._spec = spec
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow-metrics", daemon=True)

    def __enter__(self) -> FollowedMetrics:
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
            seen, lines = len(lines), read_metrics(self._spec.metrics_path)
            # a restarted worker drops the lines after its checkpoint, and writes them again
            for values in lines[min(seen, len(lines)) :]:
                line = pace.line(values)
                if line:
                    logger.info("%s %s", self._spec.student, line)


class Pace:
    """Chooses the lines that a person reads: evenly over the steps, the first and the last."""

    def __init__(self, steps: int) -> None:
        self._steps, self._last, self._holdout = steps, 0, {}

    def line(self, values: dict[str, float]) -> str | None:
        """The progress line for these metrics, or None to log nothing; a hold-out loss waits for
        the next line.
        """
        step = int(values["step"])
        if step < self._last:  # after a restart
            self._last = 0
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
