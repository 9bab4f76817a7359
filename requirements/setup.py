"""Set-up, first half: find Python 3.11 and a C++ compiler, or say in one sentence what is missing.

Called by `make setup`; hands over to install.py under Python 3.11. This file alone runs under
whatever `python3` a machine has, so it keeps to Python 3.4. When nothing changed since the last
set-up it ends here, without starting another process.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, "polystill-setup.json")
INPUTS = (
    "pyproject.toml",
    "requirements/cpu.lock",
    "requirements/cuda.lock",
    "requirements/setup.py",
    "requirements/install.py",
)
COMPILERS = ("c++", "g++", "clang++")


def fail(sentence: str) -> None:
    """Ends set-up with one sentence on standard error and exit code 1."""
    sys.stderr.write("set-up: " + sentence + "\n")
    sys.exit(1)


def venv_python_version() -> str:
    """The version of the Python that .venv was made with, empty if it has none that runs."""
    if not os.path.exists(os.path.join(VENV, "bin", "python")):
        return ""
    try:
        with open(os.path.join(VENV, "pyvenv.cfg")) as config:
            settings = dict(line.split(" = ", 1) for line in config if " = " in line)
    except OSError:
        return ""
    return settings.get("version", "").strip()


def expected_stamp(device: str) -> dict:
    """What the stamp holds when .venv is up to date; device is `cpu` or `cuda`."""
    digest = hashlib.sha256()
    for name in INPUTS:
        with open(os.path.join(ROOT, *name.split("/")), "rb") as file:
            digest.update(hashlib.sha256(file.read()).digest())
    return {
        "device": device,
        "inputs": digest.hexdigest(),
        "python": venv_python_version(),
        "root": ROOT,
    }


def current_device(device: str) -> str:
    """The device that .venv is complete and up to date for, else an empty string.

    Without a device asked for, the one that was installed stands.
    """
    try:
        with open(STAMP) as file:
            stamp = json.load(file)
    except (OSError, ValueError):
        return ""
    installed = str(stamp.get("device", "")) if isinstance(stamp, dict) else ""
    if device not in ("", installed) or stamp != expected_stamp(installed):
        return ""
    return installed


def find_python(asked: str) -> str:
    """The first of the asked-for, `python3.11` and `python3` that is Python 3.11."""
    found = []
    for name in [asked] if asked else ["python3.11", "python3"]:
        path = shutil.which(name)
        if path is None:
            continue
        probe = "import sys; print('%d.%d' % sys.version_info[:2])"
        process = subprocess.Popen(
            [path, "-c", probe], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        version = process.communicate()[0].decode("ascii", "replace").strip()
        if process.returncode == 0 and version == "3.11":
            return path
        if process.returncode == 0:
            found.append("{0} is {1}".format(name, version))
    fail(
        "Python 3.11 is needed ({0}); install it, or name it: "
        "`make setup PYTHON=/path/to/python3.11`.".format(
            ", ".join(found) or "no {0} found".format(asked or "python3.11")
        )
    )
    return ""


def require_compiler() -> None:
    """Ends set-up if no C++ compiler is on PATH; DeepSpeed's ops are compiled with it."""
    asked = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ([asked] if asked else COMPILERS)):
        fail(
            "a C++ compiler is needed to build DeepSpeed's ops ({0} not found); "
            "install g++ (Debian, Ubuntu: `apt-get install g++`) or clang.".format(
                asked or ", ".join(COMPILERS)
            )
        )


def main() -> None:
    """Checks what the machine must have, then installs; at once done if nothing changed."""
    parser = argparse.ArgumentParser(description="Sets up .venv, or writes the locks anew.")
    parser.add_argument("--device", choices=["", "cpu", "cuda"], default="", help="default: detect")
    parser.add_argument("--python", default="", help="the Python 3.11 to use")
    parser.add_argument("--lock", action="store_true", help="resolve both locks anew, then stop")
    arguments = parser.parse_args()
    device = "" if arguments.lock else current_device(arguments.device)
    if device:
        print("set-up: .venv is up to date ({0})".format(device))
        return
    python = find_python(arguments.python)
    require_compiler()
    command = [python, os.path.join(ROOT, "requirements", "install.py")]
    command += ["--lock"] if arguments.lock else ["--device", arguments.device]
    sys.stdout.flush()
    os.execv(python, command)


if __name__ == "__main__":
    main()
