"""Folders of packages in which a user keeps more than our packages, or links to elsewhere."""

import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package, unzip_package

from jobs.cluster.stage_jobs import PACKAGES_ROOT
from jobs.cluster.upload import DATA_FILES, MAX_BYTES, PACKAGES, build_upload
from tests.support.hostile import Case, check_answer

pytestmark = pytest.mark.timeout(30)
OURS = {
    *(f"{name}/__init__.py" for name in PACKAGES),
    "jobs/stages/__init__.py",
    "jobs/stages/train.py",
    "pipeline/report/__init__.py",
    "pipeline/report/page.html.j2",
    "pipeline/synthesis/__init__.py",
    "pipeline/synthesis/templates/judge.txt",
}
Arrangement = Callable[[Path], object]


def packages(root: Path) -> Path:
    """Makes small packages of ours below `root`."""
    for name in OURS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"# {name}\n")
    return root


def file(name: str, content: str | bytes = "SECRET") -> Arrangement:
    """Puts a file, and the folders above it, among the packages."""

    def arrange(root: Path) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return arrange


def link(name: str, target: str) -> Arrangement:
    """Puts a link in a file's or a folder's place; `{}` in the target is a folder outside."""

    def arrange(root: Path) -> None:
        outside = root.parent / "outside"
        (outside / "inner").mkdir(parents=True)
        (outside / "__init__.py").write_text("SECRET")
        (outside / "secret.txt").write_text("SECRET")
        path = root / name
        if path.is_dir():
            path.rename(outside / "moved")
        else:
            path.unlink(missing_ok=True)
        path.symlink_to(target.format(outside))

    return arrange


def unnamed_bytes(root: Path) -> None:
    (Path(os.fsdecode(os.fsencode(root / "jobs") + b"/\xff\xfe.py"))).write_text("SECRET")


def two_big_files(root: Path) -> None:
    for name in ("one", "two"):
        with (root / f"teachers/{name}.py").open("wb") as big:
            big.truncate(MAX_BYTES // 2)


def huge_file(root: Path) -> None:
    with (root / "students/weights.py").open("wb") as big:
        big.truncate(2**40)  # sparse


LEFT_OUT = [
    Case("a config in a folder of its own", file("jobs/configs/mine.yaml")),
    Case("a config beside the modules", file("jobs/mine.yaml")),
    Case("a text in a package", file("jobs/notes.txt")),
    Case("a text beside the templates' folder", file("pipeline/synthesis/notes.txt")),
    Case("a text below the templates", file("pipeline/synthesis/templates/old/mine.txt")),
    Case("a template of another page", file("jobs/page.html.j2")),
    Case("a yaml among the templates", file("pipeline/synthesis/templates/keys.yaml")),
    Case("a token", file("jobs/auth_token")),
    Case("an env file", file("pipeline/.env")),
    Case("a hidden module", file("jobs/.secret.py")),
    Case("a hidden template", file("pipeline/synthesis/templates/.draft.txt")),
    Case("an editor's lock link", link("jobs/.#train.py", "me@host.123")),
    Case("an editor's backup", file("jobs/stages/train.py~")),
    Case("a merge's leftover", file("jobs/stages/train.py.orig")),
    Case("compiled modules", file("jobs/__pycache__/x.cpython-311.pyc")),
    Case("a module among compiled ones", file("jobs/__pycache__/x.py")),
    Case("a built extension", file("students/fast.so")),
    Case("a notebook", file("students/look.ipynb")),
    Case("weights", file("students/model.safetensors")),
    Case("prompts", file("pipeline/prompts.jsonl")),
    Case("a repository inside", file("jobs/.git/hooks/hook.py")),
    Case("a virtual environment inside", file("jobs/.venv/lib/x.py")),
    Case("modules in a folder that is no package", file("jobs/configs/keys.py")),
    Case("a package in a folder that is no package", file("jobs/old/copy/__init__.py")),
    Case("a script that no import can name", file("jobs/make-it.py")),
    Case("a name with a line break", file("jobs/a\nb.py")),
    Case("a name that begins with a hyphen", file("jobs/-rf.py")),
    Case("a name that is no text", unnamed_bytes),
    Case("a folder like the tests", file("tests/test_a.py")),
    Case("a package of somebody else", file("other/__init__.py")),
    Case("an empty folder", lambda root: (root / "jobs/empty").mkdir()),
    Case("a link to a folder that is no package", link("jobs/output", "{}/inner")),
    Case("a link to the whole disk", link("jobs/disk", "/")),
    Case("a link to a file that is no module", link("jobs/passwords", "/etc/passwd")),
    Case("a link to a text", link("jobs/notes.txt", "{}/secret.txt")),
    Case("a pipe that is no module", lambda root: os.mkfifo(root / "jobs/pipe")),
]
TAKEN = [
    Case("a module more", file("jobs/more.py", "")),
    Case("a module named in another script", file("jobs/prüfung.py", "")),
    Case("a package more", file("teachers/mine/__init__.py", "")),
    Case("a template more", file("pipeline/synthesis/templates/mine.txt", "")),
    Case("an empty module", file("jobs/stages/empty.py", "")),
    Case("a module that is no UTF-8", file("jobs/latin.py", b"# \xe9\n")),
]
REFUSED = [
    Case("a module that is a link", link("jobs/stages/train.py", "{}/secret.txt"), ("a link to",)),
    Case("a link to a password file", link("jobs/x.py", "/etc/passwd"), ("link to /etc/passwd",)),
    Case("a link without a target", link("jobs/x.py", "{}/none"), ("x.py is a link to",)),
    Case("a link to itself", link("jobs/x.py", "x.py"), ("x.py is a link to x.py",)),
    Case("a link to an endless device", link("jobs/x.py", "/dev/zero"), ("link to /dev/zero",)),
    Case("a template that is a link", link(
        "pipeline/synthesis/templates/judge.txt", "{}/secret.txt"
    ), ("judge.txt is a link to",)),
    Case("a linked folder of templates", link(
        "pipeline/synthesis/templates", "{}"
    ), ("templates is a link to",)),
    Case("a package that is a link", link("jobs/stages", "{}"), ("stages is a link to",)),
    Case("a whole package that is a link", link("jobs", "{}"), ("jobs is a link to",)),
    Case("a link to a package outside", link("jobs/more", "{}"), ("more is a link to",)),
    Case("a package inside itself", link("jobs/Again", "."), ("Again is a link to",)),
    Case("a folder named like a module", lambda root: (root / "jobs/x.py").mkdir(), ("no file",)),
    Case("a pipe named like a module", lambda root: os.mkfifo(root / "jobs/x.py"), ("no file",)),
    Case("a file of a terabyte", huge_file, ("16 MiB", "students/weights.py", "outside")),
    Case("many bytes in several files", two_big_files, ("16 MiB", "teachers/one.py")),
    Case("no package", lambda root: (root / "jobs/__init__.py").unlink(), ("no package jobs",)),
]  # fmt: skip


def uploaded(case: Case, folder: Path) -> set[str] | None:
    """Files of the upload of a case by their relative names; None if the upload is refused."""
    root = packages(folder / "root")
    case.given(root)
    upload = check_answer(case, lambda: build_upload(root, "a: 1\n", folder / "upload"))
    if upload is None:
        return None
    found = {str(path.relative_to(upload)) for path in upload.rglob("*") if path.is_file()}
    for name in found - {"config.yaml"}:
        assert not (upload / name).is_symlink()
        assert (upload / name).read_bytes() == (root / name).read_bytes()
    return found


@pytest.mark.parametrize("case", LEFT_OUT, ids=str)
def test_what_is_none_of_our_packages_stays_here(case: Case, tmp_path: Path) -> None:
    assert uploaded(case, tmp_path) == OURS | {"config.yaml"}


@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_a_module_or_template_more_travels(case: Case, tmp_path: Path) -> None:
    found = uploaded(case, tmp_path)
    assert found is not None and len(found - OURS - {"config.yaml"}) == 1


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_an_upload_takes_nothing_from_outside(case: Case, tmp_path: Path) -> None:
    assert uploaded(case, tmp_path) is None


def test_our_own_upload_is_what_an_installation_has(tmp_path: Path) -> None:
    upload = build_upload(PACKAGES_ROOT, "a: 1\n", tmp_path / "upload")
    found = {str(path.relative_to(upload)) for path in upload.rglob("*") if path.is_file()}
    modules = {f"{name}/**/*.py" for name in PACKAGES}
    ours = {path for pattern in {*modules, *DATA_FILES} for path in PACKAGES_ROOT.glob(pattern)}
    assert found == {"config.yaml", *(str(path.relative_to(PACKAGES_ROOT)) for path in ours)}


def test_data_files_are_those_of_the_installation() -> None:
    settings = tomllib.loads((PACKAGES_ROOT / "pyproject.toml").read_text())
    listed = settings["tool"]["setuptools"]["package-data"]
    assert sorted(DATA_FILES) == sorted(
        f"{package}/{pattern}" for package, patterns in listed.items() for pattern in patterns
    )


def test_only_their_owner_reads_configs_here_and_where_ray_unpacks_them(tmp_path: Path) -> None:
    upload = build_upload(packages(tmp_path / "root"), "key: x\n", tmp_path / "upload")
    create_package(str(upload), tmp_path / "package.zip", include_gitignore=True)
    unpacked = tmp_path / "unpacked"
    unpack = {"remove_top_level_directory": False, "unlink_zip": False}
    unzip_package(str(tmp_path / "package.zip"), str(unpacked), **unpack)
    assert (unpacked / "jobs/stages/train.py").is_file()
    for folder in (upload, unpacked):
        assert (folder / "config.yaml").stat().st_mode & 0o777 == 0o600
