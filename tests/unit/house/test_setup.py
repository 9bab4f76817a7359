"""Set-up: one sentence where a machine lacks something, an end at once when nothing changed."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what set-up reads, in a folder of its own, with an empty folder for PATH."""
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT / "requirements", tree / "requirements", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tree)
    (tree / "bin").mkdir()
    return tree


def add_tool(tree: Path, name: str, script: str) -> None:
    """Puts a shell script on the PATH that set-up will see."""
    tool = tree / "bin" / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)


def setup(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs set-up with nothing on PATH but the tree's own tools."""
    command = [sys.executable, str(tree / "requirements" / "setup.py"), *arguments]
    return subprocess.run(
        command, env={"PATH": str(tree / "bin")}, capture_output=True, text=True, timeout=60
    )


def assert_one_sentence(result: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 1, and one line on standard error that holds the words."""
    assert result.returncode == 1, result
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert all(word in result.stderr for word in words), result.stderr


def write_stamp(tree: Path, device: str) -> Path:
    """A .venv that looks complete: made by the script's own functions, not by a copy of them."""
    venv = tree / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").touch()
    (venv / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.9\n")
    code = f"import json, setup; print(json.dumps(setup.expected_stamp({device!r})))"
    command = [sys.executable, "-c", code]
    stamp = subprocess.run(
        command, cwd=tree / "requirements", capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(stamp)["python"] == "3.11.9"
    (venv / "polystill-setup.json").write_text(stamp)
    return venv


def test_no_python(tree: Path) -> None:
    assert_one_sentence(setup(tree), "Python 3.11 is needed", "PYTHON=")


def test_wrong_python_is_named(tree: Path) -> None:
    add_tool(tree, "python3", "echo 3.9")
    assert_one_sentence(setup(tree), "Python 3.11 is needed", "python3 is 3.9")


def test_asked_python_is_not_replaced_by_another(tree: Path) -> None:
    add_tool(tree, "python3.11", "echo 3.11")
    add_tool(tree, "mine", "echo 3.12")
    assert_one_sentence(setup(tree, "--python", "mine"), "mine is 3.12")


def test_no_compiler(tree: Path) -> None:
    add_tool(tree, "python3.11", "echo 3.11")
    assert_one_sentence(setup(tree), "C++ compiler is needed", "g++")


def test_hands_over_to_python_3_11(tree: Path) -> None:
    add_tool(tree, "python3", "echo 3.9")
    add_tool(tree, "python3.11", 'test "$1" = -c && echo 3.11 || echo "$@"')
    add_tool(tree, "g++", "exit 0")
    result = setup(tree, "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("requirements/install.py --device cpu\n")


@pytest.mark.parametrize("asked", ["", "cpu"])
def test_unchanged_set_up_ends_at_once(tree: Path, asked: str) -> None:
    write_stamp(tree, "cpu")
    result = setup(tree, "--device", asked)
    assert (result.returncode, result.stdout) == (0, "set-up: .venv is up to date (cpu)\n")


@pytest.mark.parametrize(
    "changed", ["pyproject.toml", "requirements/cpu.lock", "requirements/install.py"]
)
def test_a_changed_input_sets_up_again(tree: Path, changed: str) -> None:
    write_stamp(tree, "cpu")
    with open(tree / changed, "a") as file:
        file.write("\n")
    assert_one_sentence(setup(tree), "Python 3.11 is needed")


def test_another_device_python_or_folder_sets_up_again(tree: Path) -> None:
    venv = write_stamp(tree, "cpu")
    assert_one_sentence(setup(tree, "--device", "cuda"), "Python 3.11 is needed")
    moved = tree.rename(tree.with_name("moved"))
    assert_one_sentence(setup(moved), "Python 3.11 is needed")
    tree = moved.rename(tree)
    (venv / "pyvenv.cfg").write_text("version = 3.11.10\n")
    assert_one_sentence(setup(tree), "Python 3.11 is needed")


def test_first_half_keeps_to_old_syntax() -> None:
    ast.parse((ROOT / "requirements" / "setup.py").read_text(), feature_version=(3, 4))


def test_interrupted_set_up_is_not_taken_for_complete(tree: Path) -> None:
    stamp = write_stamp(tree, "cpu") / "polystill-setup.json"
    stamp.write_text(stamp.read_text()[:20])
    assert_one_sentence(setup(tree), "Python 3.11 is needed")


def test_the_cuda_lock_holds_no_cpu_build() -> None:
    lock = (ROOT / "requirements" / "cuda.lock").read_text()
    assert "+cpu" not in lock
    assert "\nvllm==0.32." in lock


@pytest.mark.parametrize("name", ["cpu.lock", "cuda.lock"])
def test_locks_name_no_machine_and_no_host(name: str) -> None:
    lock = (ROOT / "requirements" / name).read_text()
    assert "://" not in lock
    assert "--find-links" not in lock
    assert lock.splitlines()[1].strip() == "#    make lock"
