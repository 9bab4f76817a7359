"""Other projects' formats: what is written reads back, and the bytes are those of the documents."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jobs.caches.actions import export, import_distillkit, verify
from jobs.caches.run_caches import open_caches
from pipeline import storage
from pipeline.cache.reader import open_cache
from pipeline.cache.shard import read_shard
from pipeline.cache_care.distillkit import (
    DISTILLKIT_SCHEMA,
    ForeignSequence,
    imported_row,
    pack_bits,
    read_distillkit,
    unpack_bits,
)
from pipeline.config.scoring import TopK
from pipeline.errors import CacheError, ConfigError
from tests.support.fabricated import FabricatedRun, FakePools, make_sequence

RULE = TopK(type="top_k", max_entries=8)


@pytest.fixture
def run(tmp_path: Path, pools: FakePools) -> FabricatedRun:
    made = FabricatedRun(tmp_path / "root")
    made.prepare()
    made.write_answers(0, 4)
    made.score()
    return made


def rows_of(run: FabricatedRun, teacher: str) -> dict:
    opened = open_caches(run.config)
    reader = open_cache(opened.layouts[teacher])
    return {entry.sequence_id: reader.row(entry.sequence_id) for entry in opened.entries}


@given(
    values=st.lists(st.lists(st.integers(0, 2**17 - 1), min_size=3, max_size=3), min_size=1),
    num_bits=st.sampled_from([17, 18, 24]),
)
def test_packed_bits_read_back(values: list[list[int]], num_bits: int) -> None:
    packed = pack_bits(np.array(values), num_bits)
    assert packed.shape == (len(values), -(-3 * num_bits // 8))
    np.testing.assert_array_equal(unpack_bits(packed, num_bits, 3), values)


def test_bits_stand_most_significant_first() -> None:
    # 5 and 3 in three bits each, then two bits of padding: 101 011 00
    assert pack_bits(np.array([[5, 3]]), 3).tolist() == [[0b10101100]]


def test_a_distillkit_export_has_the_documented_columns_and_numbers(
    run: FabricatedRun, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    said = export(open_caches(run.config), "words", "distillkit", str(folder))
    assert said == f"8 of 8 sequences written to {folder}"
    table = pq.read_table(folder / "data_0.parquet")
    assert table.schema.equals(DISTILLKIT_SCHEMA)
    config = yaml.safe_load((folder / "compression_config.yaml").read_text())
    assert config["exact_k"] == config["k"] <= 16 and config["d"] == 64
    sequence, stored = make_sequence("arithmetic", 0), rows_of(run, "words")
    row = stored[sequence.sequence_id]
    (found,) = [r for r in table.to_pylist() if r["input_ids"] == sequence.input_ids.tolist()]
    # Row r is over token r + 1: the prompt's three rows say nothing, row 3 is position 0.
    logprobs = np.array(found["compressed_logprobs"], np.uint8).view("<f2")
    assert logprobs.shape == (len(sequence.input_ids) - 1, config["k"])
    assert np.isneginf(logprobs[:3]).all()
    count = int(row.num_entries[0])
    np.testing.assert_array_equal(logprobs[3, :count], row.logprobs[:count])
    assert np.isneginf(logprobs[3, count:]).all()
    bits = "".join(f"{byte:08b}" for byte in found["bytepacked_indices"][3])
    first, second = int(bits[:6], 2), int(bits[6:12], 2)  # 64 ids take 6 bits
    assert [first, second] == row.token_ids[:2].tolist()


def test_the_manifest_tells_imported_rows_from_an_engines(
    run: FabricatedRun, tmp_path: Path
) -> None:
    folder = str(tmp_path / "out")
    export(open_caches(run.config), "words", "distillkit", folder)
    cache = open_caches(run.config).layouts["words"]
    Path(cache.shard(next(iter(run.shards("words"))))).unlink()
    import_distillkit(open_caches(run.config), "words", folder)
    engines = storage.read_json(cache.manifest)["provenance"]["engines"]
    assert {"engine": "import", "imported_from": folder} in engines and len(engines) == 2
    assert verify(open_caches(run.config), "words")["words"].problems == []
    run.write_answers(20, 22)
    run.score()
    assert len(storage.read_json(cache.manifest)["provenance"]["engines"]) == 2


def test_an_export_imported_again_gives_the_same_rows(run: FabricatedRun, tmp_path: Path) -> None:
    folder = str(tmp_path / "out")
    before = rows_of(run, "words")
    export(open_caches(run.config), "words", "distillkit", folder)
    cache = open_caches(run.config).layouts["words"]
    for name in run.shards("words"):
        Path(cache.shard(name)).unlink()
    assert "8 of 8 sequences imported" in import_distillkit(
        open_caches(run.config), "words", folder
    )
    kept = 0
    for identifier, row in rows_of(run, "words").items():
        old = before[identifier]
        for name in ("num_entries", "token_ids", "logprobs", "tail_mass"):
            np.testing.assert_array_equal(getattr(row, name), getattr(old, name), err_msg=name)
        # What the format has no place for: gold outside the entries is then the most it can be.
        equal = row.gold_logprobs == old.gold_logprobs
        assert (equal | (row.gold_logprobs > old.gold_logprobs)).all()
        kept += int(equal.sum())
    assert kept > 20
    assert [read_shard(cache.shard(name)) for name in run.shards("words")]
    with pytest.raises(CacheError, match="none of the 8 sequences"):
        import_distillkit(open_caches(run.config), "words", folder)


def write_foreign(folder: Path, config: dict, rows: list[dict]) -> str:
    folder.mkdir()
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    pq.write_table(pa.Table.from_pylist(rows, schema=DISTILLKIT_SCHEMA), folder / "data_0.parquet")
    return str(folder)


BUDGET = {
    "d": 64,
    "k": 4,
    "exact_k": 1,
    "exact_dtype": "bfloat16",
    "polynomial_terms": [0, 1, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
}


def test_the_documented_polynomial_is_read(tmp_path: Path) -> None:
    # -1.5 as bfloat16 is 0xbfc0; the others are -2 - 0.5 t - 0.25 sqrt(t) at t = 0, 1, 2.
    values = [0xC0, 0xBF, *np.array([-2, -0.5, -0.25], "<f4").tobytes()]
    packed = pack_bits(np.array([[7, 63, 0, 9]]), 6)[0].tolist()
    row = {"input_ids": [3, 7], "compressed_logprobs": [values], "bytepacked_indices": [packed]}
    (found,) = read_distillkit(write_foreign(tmp_path / "f", BUDGET, [row]))
    assert found.token_ids.tolist() == [[7, 63, 0, 9]]
    expected = [[-1.5, -2.0, -2.75, -3.0 - 0.25 * np.sqrt(2)]]
    np.testing.assert_allclose(found.logprobs, expected, rtol=1e-6)


def test_delta_encoding_is_summed(tmp_path: Path) -> None:
    config = BUDGET | {
        "k": 3,
        "exact_k": 3,
        "exact_dtype": "float32",
        "polynomial_terms": None,
        "delta_encoding": True,
    }
    values = list(np.array([-0.5, -1.0, -0.25], "<f4").tobytes())
    packed = pack_bits(np.array([[1, 2, 3]]), 6)[0].tolist()
    row = {"input_ids": [3, 7], "compressed_logprobs": [values], "bytepacked_indices": [packed]}
    (found,) = read_distillkit(write_foreign(tmp_path / "f", config, [row]))
    assert found.logprobs.tolist() == [[-0.5, -1.5, -1.75]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual_bins": [{"element_bits": 8}]}, "quantised residuals cannot be read"),
        ({"exact_k": 4, "exact_dtype": "float32", "polynomial_terms": None}, "row 0 does not fit"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    row = {"input_ids": [3, 7], "compressed_logprobs": [[0] * 14], "bytepacked_indices": [[0] * 3]}
    folder = write_foreign(tmp_path / "f", BUDGET | change, [row])
    with pytest.raises(CacheError, match=message):
        list(read_distillkit(folder))


def test_a_folder_without_its_settings_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"has no compression_config\.yaml"):
        list(read_distillkit(str(tmp_path)))


def test_gold_outside_the_entries_is_the_most_that_it_can_be() -> None:
    sequence = make_sequence("words", 0)
    rows = len(sequence.input_ids) - 1
    row = imported_row(sequence, two_entries(rows, sequence.gold_ids), RULE, "t")
    # two entries of 0.4: 0.2 is left, less than the last entry
    np.testing.assert_allclose(np.exp(row.gold_logprobs.astype(float)), 0.2, rtol=1e-3)
    np.testing.assert_allclose(row.tail_mass.astype(float), 0.2, rtol=1e-2)


def two_entries(rows: int, gold: np.ndarray) -> ForeignSequence:
    outside = np.setdiff1d(np.arange(64), gold)[:2]
    return ForeignSequence(
        np.zeros(rows + 1, np.int64),
        np.tile(outside, (rows, 1)),
        np.full((rows, 2), np.log(0.4), np.float32),
    )


def test_a_long_table_has_one_row_per_entry(run: FabricatedRun, tmp_path: Path) -> None:
    export(open_caches(run.config), "words", "parquet-long", str(tmp_path / "out"))
    frame = pd.read_parquet(tmp_path / "out")
    for identifier, row in rows_of(run, "words").items():
        mine = frame[frame.sequence_id == identifier]
        assert mine.groupby("position").size().tolist() == row.num_entries.tolist()
        np.testing.assert_array_equal(mine.token_id, row.token_ids)
        np.testing.assert_array_equal(mine.logprob, row.logprobs.astype(np.float32))
        first = mine[mine["rank"] == 0]
        np.testing.assert_array_equal(first.gold_logprob, row.gold_logprobs.astype(np.float32))
        assert first.token_index.tolist() == list(range(4, 4 + row.num_positions))


DRAWS = "{type: head_and_sampled, head_mass: 0.5, max_head_entries: 4, num_draws: 6}"


@pytest.fixture
def drawn(tmp_path: Path, pools: FakePools) -> FabricatedRun:
    made = FabricatedRun(tmp_path / "root", overrides=[f"scoring.selection={DRAWS}"])
    made.prepare()
    made.write_answers(0, 4)
    made.score()
    return made


def test_a_long_table_of_draws_has_counts_where_it_has_no_log_probabilities(
    drawn: FabricatedRun, tmp_path: Path
) -> None:
    export(open_caches(drawn.config), "words", "parquet-long", str(tmp_path / "out"))
    frame = pd.read_parquet(tmp_path / "out")
    assert (frame.logprob.isna() != frame["count"].isna()).all()
    per_position = frame.groupby(["sequence_id", "position"])
    assert set(per_position["count"].sum()) <= {0, 6}
    # What head, draws and tail stand for is everything, to the rounding of float16.
    whole = per_position.probability.sum() + per_position.tail_mass.first()
    np.testing.assert_allclose(whole[per_position["count"].sum() > 0], 1, atol=1e-6)
    for identifier, row in rows_of(drawn, "words").items():
        mine = frame[frame.sequence_id == identifier]
        np.testing.assert_array_equal(mine.token_id, row.token_ids)
        np.testing.assert_array_equal(mine["count"].dropna(), row.counts)
        np.testing.assert_array_equal(mine.logprob.dropna(), row.logprobs.astype(np.float32))
        head = mine[mine["count"].isna()]
        np.testing.assert_allclose(head.probability, np.exp(head.logprob), rtol=1e-6)


def test_draws_are_refused_before_anything_is_written(drawn: FabricatedRun, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"holds draws.*export it as parquet-long"):
        export(open_caches(drawn.config), "words", "distillkit", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_not_written_into(
    run: FabricatedRun, tmp_path: Path
) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(CacheError, match="is not empty"):
        export(open_caches(run.config), "words", "parquet-long", str(tmp_path))
    with pytest.raises(ConfigError, match="did you mean 'words'"):
        export(open_caches(run.config), "word", "parquet-long", str(tmp_path / "new"))
