"""Hardware of an engine: device, memory in use, size of the weights."""

from __future__ import annotations

import functools
import json
import math
import os
import struct
from pathlib import Path
from types import ModuleType

import psutil
from huggingface_hub import snapshot_download


def cpu_name() -> str:
    """Name of the processor, as the kernel gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "cpu"


def host_memory_bytes() -> int:
    """Sum of the peak resident memory of this process's descendants; counts shared pages twice."""
    total_kib = 0
    for child in psutil.Process().children(recursive=True):
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process ended meanwhile
        total_kib += sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    return total_kib * 1024


def device_memory_bytes(nvml: ModuleType) -> int | None:
    """Device memory that this process's descendants hold; vLLM keeps all that it took at start.

    Args:
        nvml: the `pynvml` module.

    Returns:
        None if the driver names no process of ours, as in a container with its own process ids.
    """
    pids = {child.pid for child in psutil.Process().children(recursive=True)} | {os.getpid()}
    nvml.nvmlInit()
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        running = [
            p for handle in handles for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        ]
    finally:
        nvml.nvmlShutdown()
    return sum(p.usedGpuMemory or 0 for p in running if p.pid in pids) or None


@functools.cache
def weight_size(model: str, revision: str | None) -> tuple[int | None, int | None]:
    """Number of parameters and bytes in a model's safetensors files, packed weights as packed.

    Args:
        model: a local folder, or a hub id that is in the local cache.

    Returns:
        (None, None) if there are no such files, for instance in a remote folder.
    """
    folder = Path(model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
        except (OSError, ValueError):
            return None, None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        # Some repositories hold the same weights once more in their authors' own layout.
        names = [p.name for p in folder.glob("*.safetensors") if "consolidated" not in p.name]
    files = [folder / name for name in names]
    if not files or not all(path.is_file() for path in files):
        return None, None
    return sum(map(_num_parameters, files)), sum(path.stat().st_size for path in files)


def _num_parameters(path: Path) -> int:
    """Parameter count from a safetensors header: a little-endian length, then JSON."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return sum(math.prod(tensor["shape"]) for tensor in header.values())
