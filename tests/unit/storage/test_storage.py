"""Storage: an object store is used like a folder, and each failure is one message for users."""

import io
import os
from pathlib import Path

import pytest
from pyarrow import fs

from pipeline import filesystems, storage
from pipeline.errors import StorageError
from pipeline.synthesis.stored_file import StoredFile


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Storage root behind pyarrow's interface that this project does not treat as a local disk."""
    (tmp_path / "bucket/run").mkdir(parents=True)
    filesystem = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(
        storage, "filesystem_of", lambda uri: (filesystem, uri.removeprefix("s3://").rstrip("/"))
    )
    return "s3://bucket/"


def test_an_object_store_is_written_read_and_listed(bucket: str) -> None:
    run = storage.join(bucket, "run")
    assert run == "s3://bucket/run"
    storage.write_json(storage.join(run, "b.json"), {"x": 1})
    storage.write_bytes(storage.join(run, "a.json"), b"{}")
    storage.write_bytes(storage.join(run, ".c.json.tmp"), b"unfinished")
    assert storage.read_json(storage.join(run, "b.json")) == {"x": 1}
    assert [info.base_name for info in storage.list_files(run, ".json")] == ["a.json", "b.json"]
    assert storage.list_folders(bucket) == ["run"]
    assert storage.exists(run) and not storage.exists(storage.join(run, "d.json"))
    assert [size for _, size, _ in storage.file_states(storage.join(run, "a.json"))] == [2]
    assert storage.list_files(storage.join(bucket, "none")) == []


def test_an_unknown_scheme_is_named_with_what_to_check() -> None:
    with pytest.raises(StorageError, match=r"cannot reach nowhere://bucket/x.*check its scheme"):
        storage.exists("nowhere://bucket/x")


def test_a_store_that_refuses_is_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def get_file_info(self, _: object) -> None:
            raise OSError("AWS Error ACCESS_DENIED")

    monkeypatch.setattr(storage, "filesystem_of", lambda uri: (Refusing(), uri))
    for ask in (storage.exists, storage.list_files, storage.list_folders, storage.file_states):
        with pytest.raises(StorageError, match=r"s3://bucket/: AWS Error ACCESS_DENIED"):
            ask(bucket)


class Failing:
    """File system that fails a given number of times and remembers what was done to its streams."""

    def __init__(self, failures: int, message: str) -> None:
        self.failures, self.message = failures, message
        self.done: list[str] = []

    def _answer(self, name: str) -> None:
        self.done.append(name)
        if self.failures:
            self.failures -= 1
            raise OSError(self.message)

    def open_output_stream(self, path: str) -> "Failing":
        return self

    def write(self, data: bytes) -> None:
        self._answer("write")

    def close(self) -> None:
        self.done.append("close")

    def open_input_file(self, path: str) -> "Failing":
        self._answer("open")
        return self

    def read_at(self, num_bytes: int, start: int) -> bytes:
        self._answer(f"read {start}")
        return b"0123456789"[start : start + num_bytes]

    def size(self) -> int:
        return 10

    def get_file_info(self, path: str) -> fs.FileInfo:
        self._answer("look")
        return fs.FileInfo(path, fs.FileType.File)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


DROPPED = "AWS Error NETWORK_CONNECTION during PutObject operation"


def test_a_dropped_connection_is_tried_again_and_a_failed_write_is_never_completed(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Failing(2, DROPPED)
    monkeypatch.setattr(storage, "filesystem_of", lambda uri: (store, uri))
    storage.write_bytes("s3://bucket/x", b"x")
    assert store.done == ["write", "write", "write", "close"]
    assert pauses == list(filesystems.PAUSES_SECONDS)
    store.failures = 1
    assert storage.exists("s3://bucket/x")


def test_a_piece_of_a_file_is_asked_for_again(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Failing(1, DROPPED)
    monkeypatch.setattr(storage, "filesystem_of", lambda uri: (store, uri))
    file = StoredFile("s3://bucket/x")
    assert file.read(4) == b"0123"
    store.failures = 1
    assert file.read(4) == b"4567" and file.tell() == 8
    assert file.seek(-3, io.SEEK_END) == 7 and file.seek(1, io.SEEK_CUR) == 8
    assert file.read() == b"89" and file.read(1) == b""
    assert store.done[:5] == ["open", "open", "read 0", "read 4", "read 4"]


def test_tries_are_bounded_and_the_message_names_the_object(
    pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Failing(99, DROPPED)
    monkeypatch.setattr(storage, "filesystem_of", lambda uri: (store, uri))
    with pytest.raises(StorageError, match="cannot write s3://bucket/x: AWS Error NETWORK"):
        storage.write_bytes("s3://bucket/x", b"x")
    assert store.done == ["write"] * (1 + len(filesystems.PAUSES_SECONDS))


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://bucket/x", "AWS Error ACCESS_DENIED during HeadObject operation"),
        ("s3://bucket/x", "AWS Error NO_SUCH_BUCKET during PutObject operation"),
        ("/local/x", "whatever"),
    ],
)
def test_what_waiting_does_not_mend_is_told_at_once(
    uri: str, message: str, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Failing(1, message)
    monkeypatch.setattr(storage, "filesystem_of", lambda uri: (store, uri))
    with pytest.raises(StorageError, match=message):
        storage.exists(uri)
    assert pauses == [] and store.done == ["look"]


@pytest.mark.parametrize(("private", "mode"), [(True, 0o600), (False, 0o644)])
def test_private_files_are_read_by_their_user_alone(
    private: bool, mode: int, tmp_path: Path
) -> None:
    before = os.umask(0o022)
    try:
        storage.write_bytes(str(tmp_path / "new/file"), b"1", private=private)
        (tmp_path / "new/file").chmod(0o666)
        storage.write_bytes(str(tmp_path / "new/file"), b"2", private=private)
    finally:
        os.umask(before)
    assert (tmp_path / "new/file").read_bytes() == b"2"
    assert (tmp_path / "new/file").stat().st_mode & 0o777 == mode
