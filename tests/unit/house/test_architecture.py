"""The architecture: imports go one way and in no circle, heavy libraries stay in their folders,
and every folder's map names its modules.
"""

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
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
        "teachers/engine/vllm_teacher.py",
        "teachers/engine/running_engine.py",
        "teachers/engine/row_capture.py",
        "teachers/engine/options.py",
        "teachers/engine/state_connector.py",
    },
    "deepspeed": {"students/"},
    "torch": {"students/"},
    "ray": {
        "teachers/pool/pool.py",
        "teachers/pool/actor.py",
        "students/launching/",
        "jobs/",
    },
    "transformers": {"teachers/", "students/", "jobs/"},
}
MODULES = [
    path.relative_to(ROOT)
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
]


FOLDERS = sorted({module.parent for module in MODULES})
ALLOWED_PREFIXES = {"deepspeed"}  # the dependency's name, not a concept of ours
CEILING, MEDIAN, MOST_MODULES = 400, 150, 15


FRAGMENTS = re.compile(
    r"(What|Of|Who|Those|Whatever|Whose|Which|How|Where|When|As|By|To|In|On|For|From|With)\b"
)


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
        assert module.as_posix().startswith(tuple(HEAVY[library])), f"{module} imports {library}"


def imported_modules(module: Path) -> set[Path]:
    """Our modules that a module imports, type-only imports included."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [str(node.module)]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {Path(name.replace(".", "/")).with_suffix(".py") for name in names}
    return found & set(MODULES)


def circles(edges: dict[Path, set[Path]]) -> list[Path]:
    """The nodes that lie on a circle or lead into one: what is left once leaves are taken off."""
    left = {node: targets - {node} for node, targets in edges.items()}
    while leaves := {node for node, targets in left.items() if not targets & left.keys()}:
        left = {node: targets for node, targets in left.items() if node not in leaves}
    return sorted(left)


def test_circles_are_found() -> None:
    a, b, c = Path("a"), Path("b"), Path("c")
    assert circles({a: {b}, b: {a}, c: set()}) == [a, b]
    assert circles({a: {b, c}, b: {c}, c: set()}) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles({module: imported_modules(module) for module in MODULES}) == []


def test_no_folders_import_each_other_in_a_circle() -> None:
    edges: dict[Path, set[Path]] = {folder: set() for folder in FOLDERS}
    for module in MODULES:
        edges[module.parent] |= {target.parent for target in imported_modules(module)}
    assert circles(edges) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_the_map_of_a_folder_names_what_lies_in_it(folder: Path) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    named = re.findall(r"^(\S+) {2,}\S", str(docstring), re.MULTILINE)
    there = [
        f"{path.name}/" if path.is_dir() else path.name.removesuffix(".py")
        for path in (ROOT / folder).iterdir()
        if path.name not in ("__init__.py", "__pycache__")
    ]
    assert sorted(named) == sorted(there)


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_folder_holds_few_modules_and_no_prefix_stands_for_another_folder(folder: Path) -> None:
    names = [module.stem for module in MODULES if module.parent == folder]
    names.remove("__init__")
    assert len(names) <= MOST_MODULES
    prefixes = [name.partition("_")[0] for name in names if "_" in name]
    shared = {prefix for prefix in prefixes if prefixes.count(prefix) > 1}
    assert shared <= ALLOWED_PREFIXES


def test_modules_are_short() -> None:
    lengths = {module: len((ROOT / module).read_text().splitlines()) for module in MODULES}
    assert {module: length for module, length in lengths.items() if length > CEILING} == {}
    assert statistics.median(lengths.values()) <= MEDIAN


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_docstrings_have_a_subject(module: Path) -> None:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
    nodes = [n for n in ast.walk(ast.parse((ROOT / module).read_text())) if isinstance(n, kinds)]
    docstrings = [text for node in nodes if (text := ast.get_docstring(node))]
    assert [text for text in docstrings if FRAGMENTS.match(text)] == []


def test_pipeline_imports_fast_and_light() -> None:
    names = [
        ".".join(module.with_suffix("").parts)
        for module in MODULES
        if module.parts[0] == "pipeline" and module.stem != "__init__"
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
