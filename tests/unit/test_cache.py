"""The cache: round trips, atomic shards, corruption found, index and manifest rebuilt."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.cache import describe_shard, read_shard, write_shard
from pipeline.cache_index import CacheReader, load_index, publish
from pipeline.config_targets import TopP
from pipeline.errors import CacheError, StorageError
from pipeline.fingerprint import digest_ids
from pipeline.layout import CacheLayout
from pipeline.records import SparseLogprobs
from pipeline.selection import select as select


def make_row(
    identifier: str, positions: int, seed: int, vocabulary: int = 150_000
) -> SparseLogprobs:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (positions, 40))
    logs = -np.sort(-(logits - np.log(np.exp(logits).sum(1, keepdims=True)) - 0.05), axis=1)
    ids = np.stack([rng.choice(vocabulary, 40, replace=False) for _ in range(positions)])
    rule = TopP(type="top_p", mass=0.95, max_entries=32)
    return select(
        identifier, ids, logs.astype(np.float32), logs[:, 3].astype(np.float32), rule, teacher="t"
    )


def assert_same(a: SparseLogprobs, b: SparseLogprobs) -> None:
    assert (a.sequence_id, a.renormalised) == (b.sequence_id, b.renormalised)
    for name in vars(a).keys() - {"sequence_id", "renormalised"}:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype, name


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    vocabulary=st.sampled_from([64, 70_000, 2**24]),
)
def test_rows_round_trip(
    lengths: list[int], vocabulary: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [make_row(f"s{i}", n, i, max(vocabulary, 64)) for i, n in enumerate(lengths)]
    path = str(tmp_path_factory.mktemp("cache") / "shard.parquet")
    entry = write_shard(path, rows, "f")
    for written, read in zip(rows, read_shard(path), strict=True):
        assert_same(written, read)
    assert entry == describe_shard(path, os.path.getsize(path))
    assert entry.num_positions == sum(lengths)


def test_identical_arrays_give_identical_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(str(tmp_path / name), [make_row("s", 20, 1)], "f")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_flipped_byte_is_found_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    rows = [make_row(f"s{i}", 50, i) for i in range(4)]
    write_shard(str(path), rows, "f")
    whole, found = path.read_bytes(), 0
    offsets = range(4, len(whole), 61)
    for offset in offsets:
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x10]) + whole[offset + 1 :])
        try:
            for written, read in zip(rows, read_shard(str(path)), strict=True):
                assert_same(written, read)
        except (CacheError, StorageError):
            found += 1
    assert found > 0.5 * len(offsets)


def test_a_truncated_shard_is_found(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    write_shard(str(path), [make_row("s", 50, 1)], "f")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(StorageError, match="not a complete Parquet file"):
        read_shard(str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": np.array([-2.0, -1.0], np.float16)}, "descending"),
        ({"logprobs": np.array([0.0, 0.0], np.float16)}, "mass"),
        ({"tail_mass": np.array([np.nan], np.float16)}, "finite"),
        ({"token_ids": np.array([1], np.uint32)}, "entries counted"),
        ({"gold_logprobs": np.zeros(2, np.float16)}, "different lengths"),
    ],
)
def test_a_row_that_breaks_an_invariant_is_never_written(
    change: dict, message: str, tmp_path: Path
) -> None:
    fine = {
        "sequence_id": "s",
        "num_entries": np.array([2], np.uint8),
        "token_ids": np.array([5, 6], np.uint32),
        "logprobs": np.array([-1.0, -2.0], np.float16),
        "counts": np.zeros(0, np.uint8),
        "gold_logprobs": np.array([-1.0], np.float16),
        "tail_mass": np.array([0.5], np.float16),
        "entropies": np.array([1.0], np.float16),
    }
    path = tmp_path / "shard.parquet"
    with pytest.raises(CacheError, match=message):
        write_shard(str(path), [SparseLogprobs(**fine | change)], "f")
    assert not path.exists()


def test_a_full_disk_leaves_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"the disk is full.*run the same command again"):
        storage.write_bytes(str(tmp_path / "file"), b"x")
    assert list(tmp_path.iterdir()) == []


def test_the_index_is_rebuilt_from_shards(tmp_path: Path) -> None:
    cache = CacheLayout(str(tmp_path / "teacher-abc"), 1)
    for group in (["a", "b"], ["c"]):
        write_shard(cache.shard(digest_ids(group)), [make_row(i, 10, ord(i)) for i in group], "f")
    manifest = publish(cache, {"model": "m"}, {})
    written = load_index(cache)
    os.unlink(cache.index)
    assert load_index(cache) == written
    assert manifest["totals"]["num_sequences"] == 3
    reader = CacheReader(cache)
    assert_same(reader.row("c"), make_row("c", 10, ord("c")))
    assert reader.row("unknown") is None


def test_a_sequence_in_two_shards_is_one_row(tmp_path: Path) -> None:
    cache = CacheLayout(str(tmp_path / "teacher-abc"), 1)
    for group in (["a", "b"], ["a"]):
        write_shard(cache.shard(digest_ids(group)), [make_row(i, 10, ord(i)) for i in group], "f")
    assert publish(cache, {}, {})["totals"]["num_sequences"] == 2


def test_a_deleted_shard_is_missing_whatever_the_index_says(tmp_path: Path) -> None:
    cache = CacheLayout(str(tmp_path / "teacher-abc"), 1)
    write_shard(cache.shard(digest_ids(["a"])), [make_row("a", 10, 1)], "f")
    publish(cache, {}, {})
    os.unlink(cache.shard(digest_ids(["a"])))
    assert "a" not in CacheReader(cache)
