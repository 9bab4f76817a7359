"""An S3 server on loopback behind a wire that breaks: retried, told, and never half an object."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pyarrow as pa
import pytest

from pipeline import filesystems, storage
from pipeline.errors import StorageError
from pipeline.run import shared_storage
from pipeline.run.shared_storage import check_marks, mark_of
from tests.support.command_line import ROOT
from tests.support.object_store import ObjectStore, object_store

pytestmark = pytest.mark.timeout(180)
MIB = 2**20
# Above 10 MB pyarrow uploads in parts.
SIZES = (MIB, 25 * MIB)
FOR_EVER = 10**6


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture
def no_second_try(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pyarrow's own tries alone take six seconds."""
    monkeypatch.setattr(filesystems, "PAUSES_SECONDS", ())


def test_a_node_that_reaches_the_store_sees_the_mark_of_its_root(store: ObjectStore) -> None:
    root = f"{store.root}/output"
    mark = mark_of(root)
    assert mark_of(root) == mark
    check_marks([mark], "10.77.0.11")
    storage.remove(mark.path)
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(StorageError, match=r"does not see s3://.*the same store and bucket"),
    ):
        patch.setattr(shared_storage, "WAIT_SECONDS", 0.0)
        check_marks([mark], "10.77.0.11")


def names(store: ObjectStore, folder: str) -> list[str]:
    return [info.base_name for info in storage.list_files(f"{store.root}/{folder}")]


@pytest.mark.parametrize("size", SIZES)
def test_a_dropped_connection_is_tried_again(store: ObjectStore, size: int) -> None:
    uri, data = f"{store.root}/dropped/{size}", os.urandom(size)
    store.wire.cut("upload", size // 4, times=2)
    storage.write_bytes(uri, data)
    assert store.wire.num_cuts == 2
    store.wire.cut("download", size // 4, times=2)
    assert storage.read_bytes(uri) == data
    assert store.wire.num_cuts == 2
    store.wire.cut("download", 50, times=2)
    assert str(size) in names(store, "dropped")
    assert store.wire.num_cuts == 2


@pytest.mark.parametrize("size", SIZES)
def test_what_cannot_be_sent_is_told_and_nothing_is_seen(
    store: ObjectStore, size: int, no_second_try: None
) -> None:
    uri = f"{store.root}/broken-{size}/x"
    store.wire.cut("upload", size // 4, times=FOR_EVER)
    with pytest.raises(StorageError, match=f"cannot write {uri}: .*NETWORK_CONNECTION"):
        storage.write_bytes(uri, os.urandom(size))
    store.wire.mend()
    assert names(store, f"broken-{size}") == [] and not storage.exists(uri)
    storage.write_bytes(uri, b"whole")
    assert storage.read_bytes(uri) == b"whole"


def test_an_overwrite_that_breaks_off_keeps_what_was_there(
    store: ObjectStore, no_second_try: None
) -> None:
    uri = f"{store.root}/kept/index"
    storage.write_bytes(uri, b"before")
    store.wire.cut("upload", MIB // 4, times=FOR_EVER)
    with pytest.raises(StorageError, match="cannot write"):
        storage.write_bytes(uri, os.urandom(MIB))
    store.wire.mend()
    assert storage.read_bytes(uri) == b"before"


def test_our_own_tries_outlast_those_of_pyarrow(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wire is mended only after pyarrow has given up."""
    monkeypatch.setattr(filesystems, "PAUSES_SECONDS", (0.0,))
    monkeypatch.setattr(time, "sleep", lambda seconds: store.wire.mend())
    uri, table = f"{store.root}/outlasted/table", pa.table({"x": list(range(100_000))})
    storage.write_table(uri, table)
    store.wire.cut("download", 10_000, times=FOR_EVER)
    assert storage.read_table(uri) == table
    assert store.wire.num_cuts > 2


@pytest.mark.parametrize("size", SIZES)
def test_a_killed_writer_leaves_nothing_to_be_seen(store: ObjectStore, size: int) -> None:
    """The wire stalls in the middle of the upload; then the writer is killed."""
    uri = f"{store.root}/killed-{size}/x"
    program = (
        f"from pipeline import storage; storage.write_bytes({uri!r}, bytes(range(256)) * "
        f"({size} // 256))"
    )
    store.wire.stall("upload", size // 4)
    writer = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    assert store.wire.stalled.wait(60)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    store.wire.mend()
    time.sleep(0.2)  # what had arrived is dealt with
    assert names(store, f"killed-{size}") == [] and not storage.exists(uri)
