"""Second names, moves and removals of files: on a disk, and in an object store on loopback."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from pyarrow import fs

from pipeline import storage
from pipeline.errors import StorageError


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        filesystem = fs.S3FileSystem(
            endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True
        )
        filesystem.create_dir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["disk", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    return f"{request.getfixturevalue('bucket')}/{tmp_path.name}"


def test_files_get_second_names_move_and_go(root: str) -> None:
    storage.write_bytes(f"{root}/g1/a", b"1")
    storage.write_bytes(f"{root}/g1/b", b"22")
    for _ in range(2):
        storage.link_or_copy(f"{root}/g1/a", f"{root}/g2/a")
    storage.move(f"{root}/g1/b", f"{root}/g1.aside/b")
    found = {name: info.size for name, info in storage.files_below(root).items()}
    assert found == {"g1.aside/b": 2, "g1/a": 1, "g2/a": 1}
    for _ in range(2):
        storage.remove(f"{root}/g1/a")
        storage.remove_empty_folders(f"{root}/g1")
    storage.remove_empty_folders(f"{root}/g2")
    assert storage.list_folders(root) == ["g1.aside", "g2"]
    assert storage.read_bytes(f"{root}/g2/a") == b"1"


def test_what_is_not_there_cannot_be_moved_or_named(root: str) -> None:
    for action in (storage.link_or_copy, storage.move):
        with pytest.raises(StorageError):
            action(f"{root}/none", f"{root}/other")
    assert storage.files_below(root) == {}


def test_a_second_name_on_a_disk_takes_no_room(tmp_path: Path) -> None:
    storage.write_bytes(f"{tmp_path}/a", b"1")
    storage.link_or_copy(f"{tmp_path}/a", f"{tmp_path}/new/a")
    assert os.path.samefile(tmp_path / "a", tmp_path / "new/a")
    # Replacing one name leaves the other with its old content.
    storage.write_bytes(f"{tmp_path}/a", b"2")
    assert storage.read_bytes(f"{tmp_path}/new/a") == b"1"


@pytest.mark.parametrize("code", sorted(storage.NO_LINK))
def test_without_hard_links_a_second_name_is_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    storage.write_bytes(f"{tmp_path}/a", b"1")
    storage.link_or_copy(f"{tmp_path}/a", f"{tmp_path}/new/a")
    assert storage.read_bytes(f"{tmp_path}/new/a") == b"1"


def test_another_refusal_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(os, "link", refuse)
    storage.write_bytes(f"{tmp_path}/a", b"1")
    with pytest.raises(StorageError, match="read-only"):
        storage.link_or_copy(f"{tmp_path}/a", f"{tmp_path}/new/a")
