"""The floors of the house: imports go one way, and heavy libraries stay in their rooms."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "teachers", "students", "jobs")
MAY_USE = {
    "pipeline": {"pipeline"},
    "teachers": {"pipeline", "teachers"},
    "students": {"pipeline", "students"},
    "jobs": set(PACKAGES),
}
HEAVY = {
    # vLLM itself loads the connector, in the engine's process
    "vllm": {
        "teachers/vllm_teacher.py",
        "teachers/vllm_options.py",
        "teachers/state_connector.py",
    },
    "deepspeed": {"students/*"},
    "torch": {"students/*", "jobs/configs/*"},
    "ray": {
        "teachers/pool.py",
        "teachers/actor.py",
        "students/launch.py",
        "students/progress.py",
        "jobs/*",
    },
    "transformers": {"teachers/*", "students/*", "jobs/*", "jobs/configs/*"},
}
MODULES = [
    path.relative_to(ROOT)
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
]


def imported(path: Path) -> set[str]:
    """Top-level names imported anywhere in a module, inside functions too; type-checking blocks
    count.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module).split(".")[0])
    return names


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_go_one_way(module: Path) -> None:
    ours = imported(ROOT / module) & set(PACKAGES)
    assert ours <= MAY_USE[module.parts[0]]


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_heavy_libraries_stay_in_their_rooms(module: Path) -> None:
    for library in imported(ROOT / module) & HEAVY.keys():
        assert any(module.match(pattern) for pattern in HEAVY[library]), (
            f"{module} imports {library}"
        )


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_no_module_is_longer_than_400_lines(module: Path) -> None:
    assert len((ROOT / module).read_text().splitlines()) <= 400


def test_pipeline_imports_fast_and_light() -> None:
    names = [
        f"pipeline.{path.stem}"
        for path in (ROOT / "pipeline").glob("*.py")
        if path.stem != "__init__"
    ]
    program = (
        "import sys, time, pyarrow.parquet, pydantic; started = time.process_time()\n"
        f"import {', '.join(names)}\n"
        f"loaded = {sorted(HEAVY)!r} and [name for name in {sorted(HEAVY)!r} if name in "
        "sys.modules]\n"
        "print(time.process_time() - started, *loaded)"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert output[1:] == []
    assert float(output[0]) < 2.0
