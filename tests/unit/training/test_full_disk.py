"""A disk that fills up while a student is written: one message, from whichever library."""

import gc
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import StorageError
from students.disk_space import full_disk_explained
from tests.support.disks import SmallDisk, small_disk


@pytest.fixture
def disk(tmp_path: Path):
    with small_disk(tmp_path / "disk", mebibytes=1) as disk:
        if not disk.mounted:
            pytest.skip("a disk that fills up is a tmpfs here: mounting one needs root")
        yield disk
        gc.collect()  # what failed to write still holds its files


WRITERS = {
    "a large tensor": lambda folder: torch.save(torch.zeros(2**20), folder / "a.pt"),
    "a small tensor": lambda folder: torch.save(torch.zeros(2), folder / "a.pt"),
    "weights": lambda folder: save_file({"a": torch.zeros(2**20)}, folder / "a.safetensors"),
    "text": lambda folder: (folder / "a.txt").write_text("a" * 2**20),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_gives_the_same_message(disk: SmallDisk, writer: str) -> None:
    disk.fill()
    with (
        pytest.raises(StorageError) as caught,
        full_disk_explained(str(disk.folder / "not yet" / "there")),
    ):
        WRITERS[writer](disk.folder)
    for part in (*disk.message_parts, str(disk.folder), "run the same command again"):
        assert part in str(caught.value)
    # As it leaves the worker.
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory"),
        RuntimeError("Connection closed by peer"),
        PermissionError(13, "Permission denied"),
        InterruptedError(),
    ],
    ids=str,
)
def test_other_errors_pass(disk: SmallDisk, error: Exception) -> None:
    disk.fill()
    with pytest.raises(type(error)) as passed, full_disk_explained(str(disk.folder)):
        raise error
    assert passed.value is error


def test_a_quota_is_named_if_the_disk_has_free_space(tmp_path: Path) -> None:
    words = "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
    with (
        pytest.raises(StorageError, match=r"unexpected pos.*quota"),
        full_disk_explained(str(tmp_path)),
    ):
        raise RuntimeError(words)
