"""Other things than ours where checkpoints, locks and scratch folders are removed or written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.cluster.run_lock import alone
from pipeline.layout import Layout
from pipeline.synthesis.answered_shards import AnsweredShard, forget_errors
from students.checkpoints.checkpoint import _prune
from students.checkpoints.removal import make_room
from students.checkpoints.resume import complete_checkpoints
from students.export.folder import refuse_links
from students.launching.build_locks import remove_stale_build_locks
from students.launching.notices import remove_scratch
from teachers.engine import hidden_states
from teachers.engine.hidden_states import HiddenStatesFolder
from teachers.tasks.judge import forget_ungraded
from tests.support.hostile import Case, check_answer

pytestmark = pytest.mark.timeout(30)

Given = Callable[[Path], object]


def checkpoint(folder: Path, step: int, complete: bool = True) -> Path:
    path = folder / "checkpoints" / f"step-{step:08d}"
    (path / "zero").mkdir(parents=True)
    names = ["zero/state.pt", "rng-0.pt", "state.json", *(["COMPLETE"] if complete else [])]
    for name in names:
        (path / name).write_text("{}")
    return path


def named(name: str) -> Given:
    return lambda folder: checkpoint(folder, 1).rename(folder / "checkpoints" / name)


def below(name: str, content: str = "mine") -> Given:
    def given(folder: Path) -> None:
        path = folder / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    return given


def linked_checkpoint(folder: Path) -> None:
    path = checkpoint(folder, 1)
    shutil.move(path, folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")


def link_in_a_checkpoint(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere/data").write_text("mine")
    (checkpoint(folder, 1) / "data").symlink_to(folder / "elsewhere")


def linked_state(folder: Path) -> None:
    """The state lies on another disk, behind a link that has the state's name."""
    path = checkpoint(folder, 1)
    shutil.move(path / "zero", folder / "elsewhere")
    (path / "zero").symlink_to(folder / "elsewhere")


PRUNED = [
    Case("a copy under another name", (named("step-00000001.bak"), ["step-00000001.bak/COMPLETE"])),
    Case(
        "a copy by a file manager", (named("step-00000001 (copy)"), ["step-00000001 (copy)/zero"])
    ),
    Case("a name of one digit", (named("step-1"), ["step-1/COMPLETE"])),
    Case("a step in words", (named("step-one"), ["step-one/state.json"])),
    Case("Arabic digits", (named("step-0000000\u0661"), ["step-0000000\u0661/COMPLETE"])),
    Case("a file with the name of a checkpoint", (below("step-00000001"), ["step-00000001"])),
    Case("a linked checkpoint", (linked_checkpoint, ["../elsewhere/COMPLETE"])),
    Case("a link in a checkpoint", (link_in_a_checkpoint, ["../elsewhere/data"])),
    Case("a linked state", (linked_state, ["../elsewhere/state.pt"])),
    Case("notes beside the state", (below("step-00000001/notes.md"), ["step-00000001/notes.md"])),
    Case("an export into it", (below("step-00000001/hf/x.bin"), ["step-00000001/hf/x.bin"])),
    Case("notes beside the checkpoints", (below("notes.md"), ["notes.md"])),
]


@pytest.mark.parametrize("case", PRUNED, ids=str)
def test_pruning_leaves_what_no_training_wrote(case: Case, tmp_path: Path) -> None:
    given, kept = case.given
    given(tmp_path)
    for step in (2, 3, 5):
        checkpoint(tmp_path, step)
    unfinished = checkpoint(tmp_path, 4, complete=False)
    check_answer(case, lambda: _prune(str(tmp_path), 1))
    folder = tmp_path / "checkpoints"
    assert all((folder / path).exists() for path in kept)
    assert not any((folder / f"step-0000000{step}").exists() for step in (2, 3))
    assert not unfinished.exists() and complete_checkpoints(str(tmp_path))[-1].name[-1] == "5"


def test_a_checkpoint_is_not_written_through_a_link(tmp_path: Path) -> None:
    linked_checkpoint(tmp_path)
    path = tmp_path / "checkpoints/step-00000001"
    check_answer(Case("link", None, ("is a link", "remove the link")), lambda: make_room(path))
    assert (tmp_path / "elsewhere/COMPLETE").exists()


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_a_text(path: Path) -> None:
    (path.parent / "victim.txt").write_text("precious")
    path.symlink_to("victim.txt")


def hard_link_to_a_text(path: Path) -> None:
    (path.parent / "victim.txt").write_text("precious")
    os.link(path.parent / "victim.txt", path)


LOCKS = [
    Case("none yet", lambda path: None),
    Case("an earlier holder", lambda path: path.write_text("process 12 on node-3\n")),
    Case("an earlier holder on an odd host", lambda path: path.write_text("process 1 on \x1b[2J")),
    Case("empty", lambda path: path.write_text("")),
    Case("zeros after a loss of power", lambda path: path.write_bytes(bytes(20))),
    Case("a link to a text", link_to_a_text, ("is a link", "move it away")),
    Case("a link to nowhere", lambda path: path.symlink_to("new.txt"), ("is a link",)),
    Case("a link to itself", lambda path: path.symlink_to(path.name), ("is a link",)),
    Case("another name of a text", hard_link_to_a_text, ("another content",)),
    Case("somebody's notes", lambda path: path.write_text("precious"), ("another content",)),
    Case("a lock of npm", lambda path: path.write_text("{}"), ("another content",)),
    Case("more behind a holder", lambda path: path.write_text("process 1 on a\nx"), ("content",)),
    Case("bytes", lambda path: path.write_bytes(b"\xff\xfe"), ("another content",)),
    Case("a folder", lambda path: path.mkdir(), ("cannot write",)),
    Case("a named pipe", fifo, ("no regular file",)),
    Case("a link to a device", lambda path: path.symlink_to("/dev/null"), ("is a link",)),
]


@pytest.mark.parametrize("case", LOCKS, ids=str)
def test_a_lock_overwrites_nothing_but_a_lock(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    case.given(path)
    entered = False

    def hold() -> None:
        nonlocal entered
        with alone(str(path), "run x"):
            entered = True

    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    check_answer(case, hold)
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert entered != bool(case.refusal)
    if case.refusal:
        assert after == before and not (tmp_path / "new.txt").exists()
    else:
        assert after == {"run.lock": f"process {os.getpid()} on {os.uname().nodename}\n".encode()}


STATES = [
    Case("a name without a process", "polystill-states-mine"),
    Case("a name with another end", "polystill-states-99999999999-abcdefgh"),
    Case("a process that lives", f"polystill-states-{os.getpid()}-abcdefgh"),
    Case("a longer name", "polystill-states-999999-abcdefgh.bak"),
    Case("another letter case", "polystill-states-999999-ABCDEFGH"),
]


@pytest.mark.parametrize("case", STATES, ids=str)
def test_folders_of_states_that_are_not_abandoned_stay(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hidden_states.tempfile, "tempdir", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "polystill-states-999998-abcdefgh").symlink_to(tmp_path / "elsewhere")
    for name in (case.given, "polystill-states-999999-abcdefgh"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    check_answer(case, HiddenStatesFolder)
    assert (tmp_path / case.given / "x").exists() and (tmp_path / "elsewhere").exists()
    assert not (tmp_path / "polystill-states-999999-abcdefgh").exists()


def test_scratch_of_ray_train_goes_and_nothing_else(tmp_path: Path) -> None:
    scratch = tmp_path / "ray_train"
    for name in ("student-0123abcd", "student-01234567", "notices", "mine"):
        (scratch / name).mkdir(parents=True)
    (tmp_path / "elsewhere/x").mkdir(parents=True)
    (scratch / "student-abcdef01").symlink_to(tmp_path / "elsewhere")
    remove_scratch(str(tmp_path), "student")
    assert {path.name for path in scratch.iterdir()} == {"mine", "student-abcdef01"}
    assert (tmp_path / "elsewhere/x").exists()
    (scratch / "mine").rmdir()
    (scratch / "student-abcdef01").unlink()
    remove_scratch(str(tmp_path), "student")
    assert not scratch.exists()
    remove_scratch(str(tmp_path), "student")


def test_a_lock_of_a_build_is_an_empty_file(tmp_path: Path) -> None:
    for name in ("poetry", "torch", "linked"):
        (tmp_path / name).mkdir()
    (tmp_path / "poetry/lock").write_text("content")
    (tmp_path / "torch/lock").touch()
    (tmp_path / "empty").touch()
    (tmp_path / "linked/lock").symlink_to(tmp_path / "empty")
    assert remove_stale_build_locks(tmp_path) == [tmp_path / "torch/lock"]
    assert (tmp_path / "poetry/lock").exists() and (tmp_path / "empty").exists()
    assert (tmp_path / "linked/lock").is_symlink()


def test_an_export_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "README.md").symlink_to("/etc/hostname")
    case = Case("link", None, ("README.md is a link", "remove the link"))
    check_answer(case, lambda: refuse_links(tmp_path))


def test_retry_forgets_notes_of_ours_alone(tmp_path: Path) -> None:
    layout, digest = Layout(str(tmp_path), "run"), "a" * 32
    record = AnsweredShard("t", "words", {"p": "d"}, None, {}, {}, {}, {"p": "x"}, {})
    answered = json.dumps(record.as_json())
    for folder, kept in (("synthesis", answered), ("judgements", '{"a": null}')):
        for name in ("mine", digest):
            path = tmp_path / folder / digest / f"{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(kept)
    assert forget_errors(layout, digest) == 1 and forget_ungraded(layout, digest) == 1
    assert [p.name for p in (tmp_path / "synthesis" / digest).iterdir()] == ["mine.json"]
    assert (tmp_path / "judgements" / digest / "mine.json").read_text() == '{"a": null}'
    assert (tmp_path / "judgements" / digest / f"{digest}.json").read_text() == "{}\n"


def test_a_write_does_not_go_through_a_link_in_its_way(tmp_path: Path) -> None:
    """Even one that was put where the unfinished write will lie."""
    code = (
        "import os, uuid; from pipeline import storage\n"
        "known = uuid.UUID(int=0); uuid.uuid4 = lambda: known\n"
        "os.symlink('victim', '.x.json.00000000.tmp')\n"
        "try: storage.write_bytes(os.path.abspath('x.json'), b'{}')\n"
        "except storage.StorageError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot write" in done.stdout and not (tmp_path / "victim").exists()
