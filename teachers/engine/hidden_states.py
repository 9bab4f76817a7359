"""Hidden states on their way from the engine's process: files in a folder of this process.

The engine names a request's file in its output and holds a lock on `<file>.lock` until the file is
complete. Each file is read once, only the rows that are needed, and then removed.

Legend: P positions, L layers, H hidden size.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors import SafetensorError, safe_open

from pipeline.errors import TeacherError

PREFIX = "polystill-states-"
NAME = re.compile(rf"{PREFIX}(\d{{1,7}})-[a-z0-9_]{{8}}", re.ASCII)
"""Name of an engine's folder: the process, and what `mkdtemp` adds."""


class HiddenStatesFolder:
    """Folder of one engine. Its creation removes the folders that killed processes left behind."""

    def __init__(self) -> None:
        for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            if _is_abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
        self._path = tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-")

    def engine_arguments(self, layers: tuple[int, ...], *, on_cpu: bool) -> dict[str, Any]:
        """Engine arguments that make vLLM capture hidden states and write them to this folder.

        Args:
            layers: layers to capture, in ascending order.
            on_cpu: the engine runs on a CPU, which needs a connector of our own.
        """
        connector: dict[str, Any] = {"kv_connector": "ExampleHiddenStatesConnector"}
        if on_cpu:
            connector = {
                "kv_connector": "CpuHiddenStatesConnector",
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
        """Removes the folder with the files that are left in it."""
        shutil.rmtree(self._path, ignore_errors=True)


def _is_abandoned(path: Path) -> bool:
    """Whether a folder was made by a process of this user that has ended."""
    found = NAME.fullmatch(path.name)
    if found is None or path.is_symlink() or not path.is_dir():
        return False
    return path.stat().st_uid == os.getuid() and not psutil.pid_exists(int(found[1]))


def take_hidden_states(path: str, first: int, last: int) -> np.ndarray:
    """Reads the hidden states of a request as float32[last - first, L, H], and removes their file.

    Waits until the file is complete.

    Args:
        path: file that the engine named.
        first: first token index to read.
        last: token index after the last one to read.

    Raises:
        TeacherError: the engine has not written the file, or the file has too few rows.
    """
    try:
        with open(f"{path}.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)
        with safe_open(path, framework="pt") as file:
            hidden_states = file.get_slice("hidden_states")[first:last].float().numpy()
    except (OSError, SafetensorError) as error:
        raise TeacherError(
            f"cannot read the hidden states that the engine should have written to {path}: {error}"
        ) from error
    finally:
        for name in (path, f"{path}.lock"):
            Path(name).unlink(missing_ok=True)
    if len(hidden_states) != last - first:
        raise TeacherError(
            f"the engine wrote hidden states of {first + len(hidden_states)} tokens to {path}, and "
            f"{last} are needed"
        )
    return hidden_states
