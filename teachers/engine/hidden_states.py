"""Hidden states on their way from the engine's process: files in a folder of this process.

The engine names a request's file in its output and holds a lock on `<file>.lock` until the file is
whole. Each is read once, the rows that are wanted alone, and removed.

Legend: P positions, L layers, H hidden size.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors import SafetensorError, safe_open

from pipeline.errors import TeacherError

PREFIX = "polystill-states-"


class StateFolder:
    """The folder of one engine; also removes those that killed processes have left behind."""

    def __init__(self) -> None:
        for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            if not psutil.pid_exists(int(path.name.split("-")[2])):
                shutil.rmtree(path, ignore_errors=True)
        self._path = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-")

    def engine_arguments(self, layers: tuple[int, ...], *, on_cpu: bool) -> dict[str, Any]:
        """What makes vLLM capture the states of `layers` and write them here."""
        connector: dict[str, Any] = {"kv_connector": "ExampleHiddenStatesConnector"}
        if on_cpu:
            connector = {
                "kv_connector": "CpuStateConnector",
                "kv_connector_module_path": "teachers.engine.state_connector",
            }
        return {
            "speculative_config": {
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {
                    "hf_config": {"eagle_aux_hidden_state_layer_ids": list(layers)}
                },
            },
            "kv_transfer_config": {
                **connector,
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {"shared_storage_path": self._path},
            },
        }

    def remove(self) -> None:
        """Removes the folder and what is left in it."""
        shutil.rmtree(self._path, ignore_errors=True)


def take_states(path: str, first: int, last: int) -> np.ndarray:
    """float32[last - first, L, H]: the states at token indices `first` to `last - 1`.

    Waits until the file is whole, and removes it.

    Raises:
        TeacherError: the engine has not written it, or not so many rows.
    """
    try:
        with open(f"{path}.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
        with safe_open(path, framework="pt") as file:
            states = file.get_slice("hidden_states")[first:last].float().numpy()
    except (OSError, SafetensorError) as error:
        raise TeacherError(f"the engine has written no hidden states to {path}: {error}") from error
    finally:
        for each in (path, f"{path}.lock"):
            Path(each).unlink(missing_ok=True)
    if len(states) != last - first:
        raise TeacherError(f"{path} ends at token {first + len(states)}, {last} are needed")
    return states
