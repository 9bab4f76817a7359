"""Set-up, second half: fills .venv from the lock and builds DeepSpeed's CPU ops; Python 3.11 only.

Started by setup.py. The stamp that lets the next set-up end at once is removed first and written
last, so an interrupted set-up goes on where it stopped. A file lock keeps two set-ups in one folder
apart; the children inherit it, so that one whose parent was killed is waited for as well.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setup import ROOT, STAMP, VENV, current_device, expected_stamp, fail, venv_python_version

ROOT_PATH, VENV_PATH, STAMP_PATH = Path(ROOT), Path(VENV), Path(STAMP)
REQUIREMENTS = ROOT_PATH / "requirements"
PYTHON = VENV_PATH / "bin" / "python"
UV = VENV_PATH / "bin" / "uv"
EXTENSIONS = VENV_PATH / "torch_extensions"
# What DeepSpeed loads on CPU: its shared-memory collectives always, FusedAdam for DeepSpeed's
# own Adam and AdamW. CPUAdamBuilder (offloaded optimizer states) is compiled when first used.
CPU_OPS = ("ShareMemCommBuilder", "FusedAdamBuilder")
# pip's settings by their uv names; pip separates lists by white space, uv find-links by commas.
PIP_TO_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "no-index": "UV_NO_INDEX",
    "cert": "SSL_CERT_FILE",
    "default-timeout": "UV_HTTP_TIMEOUT",
    "timeout": "UV_HTTP_TIMEOUT",
}


def say(text: str) -> None:
    """One line of progress."""
    print(f"set-up: {text}", flush=True)


@contextmanager
def exclusive() -> Iterator[int]:
    """Holds the set-up lock of this folder; yields its descriptor for children to inherit."""
    with open(ROOT_PATH / ".setup.lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is running in this folder; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def run(command: list[str], env: dict[str, str], lock: int, what: str) -> None:
    """Runs one step; its own output says why it failed, ours which step it was."""
    status = subprocess.run(command, env=env, cwd=REQUIREMENTS, pass_fds=(lock,)).returncode
    if status != 0:
        fail(f"{what} failed with exit code {status}; its message is above.")


def base_env() -> dict[str, str]:
    """The environment of every step: .venv active, byte code written even if a shell forbids it."""
    unwanted = ("PYTHONDONTWRITEBYTECODE", "PYTHONHOME", "PYTHONPATH")
    env = {key: value for key, value in os.environ.items() if key not in unwanted}
    return env | {
        "PATH": f"{VENV_PATH / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "VIRTUAL_ENV": VENV,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }


def uv_env(env: dict[str, str]) -> dict[str, str]:
    """Adds pip's settings for uv, which reads none: environment over `install` over `global`.

    Settings under uv's own names win. Like pip, uv then takes a pinned version from any index.
    """
    command = [str(PYTHON), "-m", "pip", "config", "list"]
    listed = subprocess.run(command, env=env, capture_output=True, text=True).stdout
    pairs = re.findall(r"^(global|install|:env:)\.([\w-]+)='(.*)'$", listed, flags=re.MULTILINE)
    rank = {"global": 0, "install": 1, ":env:": 2}
    settings = {key: value for _, key, value in sorted(pairs, key=lambda pair: rank[pair[0]])}
    added = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    for key, name in PIP_TO_UV.items():
        if key in settings:
            # `pip config list` prints a value over several lines with an escaped line break.
            words = settings[key].replace("\\n", " ").split()
            added[name] = ("," if key == "find-links" else " ").join(words)
    return added | env


def make_venv(env: dict[str, str], lock: int) -> None:
    """Makes .venv with the pinned uv in it, keeping one that is whole."""
    locked = (REQUIREMENTS / "cpu.lock").read_text() if (REQUIREMENTS / "cpu.lock").exists() else ""
    pin = next(iter(re.findall(r"^uv==\S+", locked, flags=re.MULTILINE)), "uv")
    here = VENV_PATH / "polystill-root"
    moved = not here.exists() or here.read_text() != ROOT
    if moved or venv_python_version() != sys.version.split()[0]:
        say(f"making .venv with Python {sys.version.split()[0]}")
        command = [sys.executable, "-m", "venv", "--clear", VENV]
        run(command, env, lock, "making .venv (is Python's venv module installed?)")
        here.write_text(ROOT)
    command = [str(PYTHON), "-m", "pip", "install", "-qq", pin]
    run(command, env, lock, f"installing {pin}")


def torch_source(lock_name: str, env: dict[str, str]) -> list[str]:
    """uv's option for PyTorch's own CPU index, where no configured source has the CPU build."""
    if lock_name != "cpu":
        return []
    pin = re.findall(r"^torch==\S+", (REQUIREMENTS / "cpu.in").read_text(), flags=re.MULTILINE)[0]
    command = [str(UV), "pip", "compile", "--quiet", "--no-deps", "--python-version", "3.11", "-"]
    found = subprocess.run(command, env=env, input=pin, text=True, capture_output=True)
    return [] if found.returncode == 0 else ["--torch-backend", "cpu"]


def detect_device() -> str:
    """`cuda` if the driver answers, else `cpu`."""
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return "cpu"
    return "cpu" if subprocess.run([nvidia_smi, "-L"], capture_output=True).returncode else "cuda"


def build_cpu_ops(env: dict[str, str], lock: int) -> None:
    """Compiles DeepSpeed's CPU ops into .venv/torch_extensions, all at once.

    A compile that was killed leaves a lock file on which the next would wait for ever; no other
    build can be running here, so it goes. Another torch or DeepSpeed makes all of them anew.
    """
    pins = re.findall(r"^(?:torch|deepspeed)==\S+", (REQUIREMENTS / "cpu.lock").read_text(), re.M)
    made_for = EXTENSIONS / "made_for.txt"
    if not made_for.exists() or made_for.read_text() != "\n".join(pins):
        shutil.rmtree(EXTENSIONS, ignore_errors=True)
        EXTENSIONS.mkdir()
        made_for.write_text("\n".join(pins))
    for stale in EXTENSIONS.glob("*/lock"):
        stale.unlink()
    say(f"compiling DeepSpeed's CPU ops ({', '.join(CPU_OPS)}); one to two minutes on two cores")
    env = env | {"TORCH_EXTENSIONS_DIR": str(EXTENSIONS), "DS_ACCELERATOR": "cpu"}
    logs, builds = [], []
    for name in CPU_OPS:
        logs.append(EXTENSIONS / f"{name}.log")
        code = f"from deepspeed.ops.op_builder.cpu import {name}; {name}().load(verbose=False)"
        with open(logs[-1], "wb") as log:
            command = [str(PYTHON), "-c", code]
            builds.append(
                subprocess.Popen(command, env=env, stdout=log, stderr=log, pass_fds=(lock,))
            )
    statuses = [build.wait() for build in builds]
    for log_path, status in zip(logs, statuses, strict=True):
        if status != 0:
            sys.stderr.write(
                "\n".join(log_path.read_text(errors="replace").splitlines()[-20:]) + "\n"
            )
            fail(f"compiling {log_path.stem} failed; the last lines of {log_path} are above.")


def install(device: str, lock: int) -> None:
    """Brings .venv to the lock's state and writes the stamp."""
    start = time.monotonic()
    STAMP_PATH.unlink(missing_ok=True)
    env = base_env()
    make_venv(env, lock)
    env = uv_env(env)
    say(f"installing requirements/{device}.lock (several GB)")
    # Byte code made once here saves seconds at the start of every process where none is written.
    sync = [str(UV), "pip", "sync", "--quiet", "--compile-bytecode", f"{device}.lock"]
    run(sync + torch_source(device, env), env, lock, f"installing requirements/{device}.lock")
    project = ["--no-deps", "--no-build-isolation", "--editable", ROOT]
    run([str(UV), "pip", "install", "--quiet", *project], env, lock, "installing polystill itself")
    if device == "cpu":
        build_cpu_ops(env, lock)
    else:
        say("nothing to compile: DeepSpeed builds the CUDA ops that a config asks for on first use")
    half_written = STAMP_PATH.with_suffix(".new")
    half_written.write_text(json.dumps(expected_stamp(device), indent=2))
    half_written.replace(STAMP_PATH)
    say(f"done in {time.monotonic() - start:.0f} s ({device})")


def write_locks(lock: int) -> None:
    """Resolves cpu.lock and cuda.lock from pyproject.toml and the .in files."""
    env = base_env()
    make_venv(env, lock)
    env = uv_env(env) | {"UV_CUSTOM_COMPILE_COMMAND": "make lock"}
    common = [
        *("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"),
        *("--no-emit-index-url", "--no-emit-find-links", "--upgrade", "--quiet", "--extra", "dev"),
    ]
    for name in ("cpu", "cuda"):
        say(f"resolving requirements/{name}.lock")
        sources = ["../pyproject.toml", "base.in", f"{name}.in"]
        options = ["--extra", name, *torch_source(name, env), "--output-file", f"{name}.lock"]
        if name == "cpu":
            options += ["--overrides", "overrides.txt"]
        command = [str(UV), "pip", "compile", *sources, *common, *options]
        run(command, env, lock, f"resolving requirements/{name}.lock")


def main() -> None:
    """Installs for one device, or writes the locks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="")
    parser.add_argument("--lock", action="store_true")
    arguments = parser.parse_args()
    with exclusive() as lock:
        if arguments.lock:
            write_locks(lock)
        elif device := current_device(arguments.device):
            say(f".venv is up to date ({device})")
        else:
            install(arguments.device or detect_device(), lock)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the next `make setup` goes on from here.")
