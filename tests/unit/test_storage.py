"""Storage: an object store is used like a folder, and what goes wrong is one message for a user."""

from pathlib import Path

import pytest
from pyarrow import fs

from pipeline import storage
from pipeline.errors import StorageError


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A root behind pyarrow's interface that is no local file system to us."""
    (tmp_path / "bucket/run").mkdir(parents=True)
    filesystem = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(
        storage, "_open", lambda uri: (filesystem, uri.removeprefix("s3://").rstrip("/"))
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
    with pytest.raises(StorageError, match=r"cannot reach nowhere://bucket/x.*Check its scheme"):
        storage.exists("nowhere://bucket/x")


def test_a_store_that_refuses_is_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def get_file_info(self, _: object) -> None:
            raise OSError("AWS Error ACCESS_DENIED")

    monkeypatch.setattr(storage, "_open", lambda uri: (Refusing(), uri))
    for ask in (storage.exists, storage.list_files, storage.list_folders, storage.file_states):
        with pytest.raises(StorageError, match=r"s3://bucket/: AWS Error ACCESS_DENIED"):
            ask(bucket)
