"""The cache: round trips, atomic shards, corruption found, index and manifest rebuilt."""

import errno
import itertools
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import storage
from pipeline.cache.index import load_index, read_index
from pipeline.cache.manifest import is_published, publish
from pipeline.cache.reader import CacheReader, open_cache
from pipeline.cache.selection import select as select
from pipeline.cache.shard import ShardEntry, read_shard, read_shard_entry, write_shard
from pipeline.config.scoring import TopP
from pipeline.errors import CacheError, CorruptShardError, StorageError
from pipeline.fingerprint import digest_ids
from pipeline.layout import CacheLayout
from pipeline.records import SparseLogprobs


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
    assert entry == read_shard_entry(path, os.path.getsize(path))
    assert entry.num_positions == sum(lengths)


def test_identical_arrays_give_identical_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(str(tmp_path / name), [make_row("s", 20, 1)], "f")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_flipped_byte_is_found_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    rows = [make_row(f"s{i}", 50, i) for i in range(4)]
    entry = write_shard(str(path), rows, "f")
    whole, found = path.read_bytes(), 0
    offsets = range(4, len(whole), 61)
    for offset in offsets:
        path.write_bytes(whole[:offset] + bytes([whole[offset] ^ 0x10]) + whole[offset + 1 :])
        try:
            for written, read in zip(rows, read_shard(str(path)), strict=True):
                assert_same(written, read)
            assert read_shard_entry(str(path), len(whole)) == entry
        except (CacheError, StorageError):
            found += 1
    assert found > 0.5 * len(offsets)


def test_a_truncated_shard_is_found(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    write_shard(str(path), [make_row("s", 50, 1)], "f")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        CorruptShardError,
        match=r"shard\.parquet is corrupt.*no complete Parquet.*polystill cache regenerate",
    ):
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


def test_a_masked_gold_token_is_counted_and_left_out_of_the_mean(tmp_path: Path) -> None:
    cache = CacheLayout(str(tmp_path / "teacher-abc"), 1)
    row = make_row("a", 10, 1)
    gold = row.gold_logprobs.copy()
    gold[3] = np.finfo(np.float16).min
    write_shard(cache.shard(digest_ids(["a"])), [replace(row, gold_logprobs=gold)], "f")
    totals = publish(cache, {}, {}).totals
    assert totals.num_masked_gold == 1
    rest = np.delete(row.gold_logprobs, 3).astype(np.float64)
    assert totals.gold_logprob == pytest.approx(rest.mean())


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
    assert manifest.totals.num_sequences == 3
    assert storage.read_json(cache.manifest) == manifest.model_dump()
    reader = open_cache(cache)
    assert_same(reader.row("c"), make_row("c", 10, ord("c")))
    assert reader.row("unknown") is None


def write_group(cache: CacheLayout, group: list[str]) -> ShardEntry:
    """A shard of rows that depend on their sequence alone, 10 positions and more."""
    rows = [make_row(i, 10 + ord(i) % 7, ord(i)) for i in group]
    return write_shard(cache.shard(digest_ids(group)), rows, "f")


@pytest.mark.parametrize(
    "groups", [[["a", "b"], ["a"]], [["a", "b", "c"], ["b", "d"], ["a", "c"]], [["c"], ["c", "a"]]]
)
def test_a_sequence_in_several_shards_counts_once(groups: list[list[str]], tmp_path: Path) -> None:
    cache, apart = (CacheLayout(str(tmp_path / name), 1) for name in ("teacher-a", "teacher-b"))
    for group in groups:
        write_group(cache, group)
    everyone = sorted({identifier for group in groups for identifier in group})
    for identifier in everyone:
        write_group(apart, [identifier])
    totals, expected = (publish(each, {}, {}).totals for each in (cache, apart))
    assert totals.num_sequences == expected.num_sequences
    assert totals.num_positions == expected.num_positions
    assert totals.num_shards == len(groups)
    assert totals.kept_mass is not None and 0 < totals.kept_mass <= 1
    reader = open_cache(cache)
    for identifier in everyone:
        row = make_row(identifier, 10 + ord(identifier) % 7, ord(identifier))
        assert_same(reader.row(identifier), row)


def test_a_reader_keeps_shards_up_to_a_number_of_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CacheLayout(str(tmp_path / "teacher-abc"), 1)
    for identifier in "ahov":
        write_group(cache, [identifier])
    publish(cache, {}, {})
    decoded: list[list[SparseLogprobs]] = []

    def read(path: str) -> list[SparseLogprobs]:
        decoded.append(read_shard(path))
        return decoded[-1]

    def readings(most: int, asked: str) -> int:
        monkeypatch.setattr("pipeline.cache.reader.DECODED_BYTES_KEPT", most)
        decoded.clear()
        reader = CacheReader(cache, read)
        for identifier in asked:
            row = reader.row(identifier)
            assert row is not None and row.sequence_id == identifier
        return len(decoded)

    assert readings(0, "aahhaa") == 3, "the last one used stays"
    readings(0, "ahov")
    sizes = [sum(v.nbytes for v in vars(r).values() if hasattr(v, "nbytes")) for (r,) in decoded]
    assert readings(sum(sizes), "ahovahov") == 4
    assert readings(sum(sizes) - 1, "ahovaho") == 4 + 3, "each time the oldest goes"
    assert readings(sum(sizes) - 1, "ahovvo") == 4


def test_a_shard_of_another_size_than_the_index_says_is_read_and_checked(tmp_path: Path) -> None:
    cache = CacheLayout(str(tmp_path / "teacher-abc"), 1)
    for group in (["a", "b"], ["c"]):
        write_group(cache, group)
    publish(cache, {}, {})
    path = Path(cache.shard(digest_ids(["c"])))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptShardError, match="no complete Parquet file") as caught:
        load_index(cache)
    assert caught.value.path == str(path)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_changed_shard_does_not_enter_the_index(tmp_path: Path) -> None:
    cache = CacheLayout(str(tmp_path / "teacher-abc"), 1)
    write_group(cache, ["a", "b"])
    path = Path(cache.shard(digest_ids(["a", "b"])))
    table = pq.read_table(path)
    cell = bytearray(table["logprobs"][0].as_py())
    cell[0] ^= 1
    changed = table.set_column(
        table.schema.get_field_index("logprobs"),
        "logprobs",
        [[bytes(cell), table["logprobs"][1].as_py()]],
    )
    pq.write_table(changed, path)
    with pytest.raises(CorruptShardError, match="checksum"):
        publish(cache, {}, {})
    assert not Path(cache.index).exists() and not Path(cache.manifest).exists()


@pytest.mark.parametrize("damage", ["empty", "garbage", "other columns"])
def test_an_index_that_cannot_be_used_is_made_again(damage: str, tmp_path: Path) -> None:
    cache = CacheLayout(str(tmp_path / "teacher-abc"), 1)
    write_group(cache, ["a", "b"])
    publish(cache, {}, {})
    written = load_index(cache)
    if damage == "other columns":
        pq.write_table(pq.read_table(cache.index).drop_columns("positions"), cache.index)
    else:
        Path(cache.index).write_bytes(b"" if damage == "empty" else b"PAR1 no index PAR1")
    assert not is_published(cache)
    assert load_index(cache) == written
    publish(cache, {}, {})
    assert is_published(cache)


def test_whoever_publishes_last_has_seen_every_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job writes a shard while this one writes its index, which is older then."""
    cache = CacheLayout(str(tmp_path / "teacher-abc"), 1)
    write_group(cache, ["a"])
    write_json, late = storage.write_json, iter([["b"], ["c"]])

    def write_and_be_overtaken(uri: str, value: object) -> None:
        write_json(uri, value)
        for group in itertools.islice(late, 1):
            write_group(cache, group)

    monkeypatch.setattr(storage, "write_json", write_and_be_overtaken)
    assert publish(cache, {}, {}).totals.num_sequences == 3
    assert is_published(cache)
    assert storage.read_json(cache.manifest)["totals"]["num_shards"] == 3


def test_a_manifest_that_another_job_writes_late_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs: while one is between its index and its manifest, the other writes a shard and
    publishes both.
    """
    cache = CacheLayout(str(tmp_path / "teacher-abc"), 1)
    write_group(cache, ["a"])
    write_json = storage.write_json

    def be_overtaken(uri: str, value: object) -> None:
        monkeypatch.setattr(storage, "write_json", write_json)
        write_group(cache, ["b"])
        publish(cache, {}, {})
        write_json(uri, value)

    monkeypatch.setattr(storage, "write_json", be_overtaken)
    assert publish(cache, {}, {}).totals.num_sequences == 2
    assert is_published(cache)
    assert storage.read_json(cache.manifest)["totals"]["num_shards"] == 2


def test_killed_between_index_and_manifest_a_cache_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = CacheLayout(str(tmp_path / "teacher-abc"), 1)
    write_group(cache, ["a"])
    publish(cache, {}, {})
    write_group(cache, ["b"])

    def be_killed(uri: str, value: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "write_json", be_killed)
        publish(cache, {}, {})
    assert [entry.digest for entry in load_index(cache)] == [e.digest for e in read_index(cache)]
    assert not is_published(cache)
    publish(cache, {}, {})
    assert is_published(cache)


def test_the_index_describes_what_the_job_itself_has_written(tmp_path: Path) -> None:
    """Another machine's last bits make another shard of one name, and often of the same size."""
    cache = CacheLayout(str(tmp_path / "teacher-abc"), 1)
    row = make_row("a", 10, 1)
    first = write_shard(cache.shard(digest_ids(["a"])), [row], "f")
    publish(cache, {}, {})
    for bits in range(1, 64):
        moved = replace(row, gold_logprobs=(row.gold_logprobs.view("u2") ^ bits).view("f2"))
        again = write_shard(cache.shard(first.digest), [moved], "f")
        if again.num_bytes == first.num_bytes:
            break
    assert again.num_bytes == first.num_bytes and again.checksum != first.checksum
    publish(cache, {}, {}, {first.digest})
    assert load_index(cache) == [again]


def test_a_deleted_shard_is_missing_whatever_the_index_says(tmp_path: Path) -> None:
    cache = CacheLayout(str(tmp_path / "teacher-abc"), 1)
    write_shard(cache.shard(digest_ids(["a"])), [make_row("a", 10, 1)], "f")
    publish(cache, {}, {})
    os.unlink(cache.shard(digest_ids(["a"])))
    assert "a" not in open_cache(cache)
