"""Folders for temporary files in which a local Ray head has to keep its own."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jobs.cluster.local_head import MAX_FOLDER_BYTES, RAY_FOLDER, private_folder
from tests.support.hostile import Case, check_answer
from tests.support.other_user import needs_root, open_to_nobody

pytestmark = pytest.mark.timeout(30)
NAME_BYTES = len("/ps-12345678")


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a path so short that a head's own folder fits below it."""
    folder = Path(tempfile.mkdtemp(prefix="h", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def of_mode(mode: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "t").mkdir()
        (folder / "t").chmod(mode)
        return folder / "t"

    return make


def named(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).mkdir()
        return folder / name

    return make


def of_length(size: int) -> Callable[[Path], Path]:
    """A folder in which the head's own has a path of so many bytes."""
    return lambda folder: named("x" * (size - NAME_BYTES - len(str(folder)) - 1))(folder)


def linked(folder: Path) -> Path:
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    return folder / "link"


def linked_to_all(folder: Path) -> Path:
    of_mode(0o777)(folder)
    (folder / "link").symlink_to("t")
    return folder / "link"


def a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file"


TAKEN = [
    Case("only its user's", of_mode(0o700)),
    Case("read by all", of_mode(0o755)),
    Case("a team's", of_mode(0o2775)),
    Case("of all, each for himself", of_mode(0o1777)),
    Case("of all in the usual other way", of_mode(0o3777)),
    Case("as long as sockets allow", of_length(MAX_FOLDER_BYTES)),
    Case("a link", linked),
    Case("a name with a space", named("a b")),
    Case("a name in another script", named("übung")),
    Case("a name with a percent sign", named("100%")),
]
REFUSED = [
    Case("of all, and each may rename all", of_mode(0o777), ("everybody may rename", "chmod +t")),
    Case("written by all, read by none", of_mode(0o733), ("drwx-wx-wx", "TMPDIR")),
    Case("a link to a folder of all", linked_to_all, ("everybody may rename",)),
    Case("one byte too long", of_length(MAX_FOLDER_BYTES + 1), ("too long for Ray's",)),
    Case("far too long", named("x" * 200), ("at most 36", "TMPDIR")),
    Case("long in bytes", named("ü" * 7), ("too long for Ray's",)),
    Case("none", lambda folder: folder / "none", ("no place for its files", "TMPDIR")),
    Case("a file", a_file, ("no place for its files", "TMPDIR")),
]


@pytest.mark.parametrize("case", TAKEN, ids=str)
def test_a_folder_is_made_that_only_its_user_enters(case: Case, short: Path) -> None:
    parent = case.given(short)
    folder = check_answer(case, lambda: private_folder(parent))
    assert folder.parent == parent.resolve()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in short.rglob("ps-*")] == [folder.name]


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_folder_that_does_not_fit_is_refused_and_left_empty(case: Case, short: Path) -> None:
    parent = case.given(short)
    check_answer(case, lambda: private_folder(parent))
    assert list(short.rglob("ps-*")) == []


@pytest.mark.parametrize("case", REFUSED[:5], ids=str)
def test_the_systems_folder_gives_way_to_tmp(
    case: Case, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(case.given(short)))
    folder = private_folder(None)
    try:
        assert folder.parent == Path("/tmp").resolve()
        assert list(short.rglob("ps-*")) == []
    finally:
        shutil.rmtree(folder)


@needs_root
def test_what_is_open_to_all_below_it_is_open_to_nobody(short: Path) -> None:
    short.chmod(0o755)
    folder = private_folder(short)
    (folder / RAY_FOLDER).chmod(0o777)
    (folder / RAY_FOLDER / "code.py").write_text("x = 1\n")
    os.chmod(folder / RAY_FOLDER / "code.py", 0o666)
    assert open_to_nobody([folder, *folder.rglob("*")]) == []
    folder.chmod(0o755)
    assert len(open_to_nobody([folder / RAY_FOLDER / "code.py"])) == 2
