"""Caches of hidden states: what they hold, what is captured when, and the commands that look after
them; with teachers that need no engine.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jobs.caches.actions import collect_garbage, status, verify
from jobs.caches.regenerate import RegenerationRequest as Request
from jobs.caches.regenerate import regenerate_inside_job
from jobs.caches.run_caches import open_caches
from pipeline import storage
from pipeline.cache.generations import named_generations
from pipeline.cache.kinds import hidden_states_of
from pipeline.cache.projection import HiddenStatesRule, projection_matrix, to_bfloat16
from pipeline.cache.reader import open_cache, open_hidden_states
from pipeline.cache.shard import (
    open_shard,
    read_hidden_states,
    read_shard,
    read_shard_entry,
    write_shard,
)
from pipeline.cache_care.verify import row_problems
from pipeline.errors import CacheError, ConfigError, CorruptShardError, TrainingError
from pipeline.records import HiddenStates
from pipeline.run.training_spec import training_specs
from pipeline.sequences import read_dataset
from students.data.batches import BatchSource, Share
from tests.support.fabricated import HIDDEN, VOCABULARY, FabricatedRun, FakePools, make_sequence
from tests.support.logs import logged

LOSS = "{type: hidden_state, weight: 1.0, teacher: words, layers: {4: 2, 1: 1}, measure: mse, "
LOSSES = [f"training.losses=[{{type: forward_kl, weight: 1.0}}, {LOSS} projection: learned}}]"]
NAME = hidden_states_of("words")


@pytest.fixture
def run(tmp_path: Path, pools: FakePools) -> FabricatedRun:
    made = FabricatedRun(tmp_path, overrides=[*LOSSES])
    made.prepare()
    made.write_answers(0, 4)
    made.score()
    return made


def make_row(identifier: str, positions: int, layers: int = 2, width: int = 5) -> HiddenStates:
    values = np.random.default_rng(positions).normal(size=(positions, layers, width))
    return HiddenStates(identifier, to_bfloat16(values.astype(np.float32)))


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), layers=st.integers(1, 3))
def test_rows_round_trip(
    lengths: list[int], layers: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [make_row(f"s{i}", n, layers) for i, n in enumerate(lengths)]
    path = str(tmp_path_factory.mktemp("cache") / "shard.parquet")
    entry = write_shard(path, rows, "f")
    assert entry == read_shard_entry(path, Path(path).stat().st_size)
    assert entry.positions == tuple(lengths)
    for written, read in zip(rows, read_hidden_states(path), strict=True):
        assert read.sequence_id == written.sequence_id
        np.testing.assert_array_equal(read.states, written.states)
    with pytest.raises(CorruptShardError, match="its columns are"):
        read_shard(path)


def test_a_shard_explains_itself(tmp_path: Path) -> None:
    row = make_row("s", 3)
    path = tmp_path / "shard.parquet"
    write_shard(str(path), [row], "f")
    table = pq.read_table(path)
    metadata = {key.decode(): text.decode() for key, text in table.schema.metadata.items()}
    dtype = json.loads(metadata["polystill.dtypes"])["states"]
    shape = json.loads(metadata["polystill.shape"])
    cell = np.frombuffer(table["states"][0].as_py(), dtype).reshape(-1, *shape)
    values = (cell.astype("<u4") << 16).view("<f4")
    np.testing.assert_array_equal(values, row.values)
    assert "index i_j - 1" in metadata["polystill.alignment"]


@pytest.mark.parametrize("offset", [60, -200])
def test_a_changed_byte_is_found(offset: int, tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    write_shard(str(path), [make_row(f"s{i}", 20) for i in range(3)], "f")
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(CorruptShardError):
        read_hidden_states(str(path))


def test_rows_that_are_not_finite_or_of_several_shapes_are_never_written(tmp_path: Path) -> None:
    path = tmp_path / "shard.parquet"
    broken = replace(make_row("s", 2), states=make_row("s", 2).states.copy())
    broken.states[1, 0, 3] = 0x7F80  # infinity
    for rows, message in (
        ([broken], "not finite"),
        ([make_row("a", 2), make_row("b", 2, width=6)], "several shapes"),
    ):
        with pytest.raises(CacheError, match=message):
            write_shard(str(path), rows, "f")
    assert not path.exists()


@given(arrays.arrays(np.float32, 20, elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_bfloat16_is_the_nearest_one(values: np.ndarray) -> None:
    import torch

    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(to_bfloat16(values), expected)


def test_projected_states_keep_their_geometry() -> None:
    """Squared lengths are unbiased, and 512 of 4096 dimensions keep distances within a few
    times sqrt(2 / 512) = 6 %.
    """
    rule = HiddenStatesRule((1,), 512, seed=4)
    states = np.random.default_rng(0).normal(size=(12, 1, 4096)).astype(np.float32)
    kept = rule.row("s", states).values[:, 0]
    pairs = np.triu_indices(12, 1)
    before = np.linalg.norm(states[pairs[0], 0] - states[pairs[1], 0], axis=-1)
    after = np.linalg.norm(kept[pairs[0]] - kept[pairs[1]], axis=-1)
    assert np.abs(after / before - 1).max() < 0.2
    assert abs((after**2 / before**2).mean() - 1) < 0.05
    matrix = projection_matrix(4096, 512, 4)
    assert np.unique(np.abs(matrix)).tolist() == [np.float32(1) / np.sqrt(np.float32(512))]
    assert not np.array_equal(matrix, projection_matrix(4096, 512, 5))
    word = int(np.random.PCG64(4).random_raw())
    signs = [1 if word >> i & 1 else -1 for i in range(64)]
    np.testing.assert_array_equal(np.sign(matrix[0, :64]), signs)


def test_a_row_holds_the_states_before_its_tokens(run: FabricatedRun) -> None:
    """States of the fake teacher begin with their layer and their token's index."""
    reader = open_hidden_states(open_caches(run.config).layouts[NAME])
    sequence = make_sequence("words", 2)
    row = reader.row(sequence.sequence_id)
    assert row is not None and row.states.shape == (sequence.num_positions, 2, HIDDEN)
    np.testing.assert_array_equal(row.values[:, :, 0], np.tile([1, 4], (row.num_positions, 1)))
    for layer in (0, 1):
        np.testing.assert_array_equal(row.values[:, layer, 1], sequence.position_indices - 1)


def test_both_caches_are_filled_in_one_pass(run: FabricatedRun, pools: FakePools) -> None:
    assert set(open_caches(run.config).layouts) == {"words", "arithmetic", NAME}
    assert len(pools.scored) == 16, "8 sequences, 2 teachers"
    assert sorted(pools.asked) == [(True, False)] * 8 + [(True, True)] * 8


def test_only_the_cache_that_lacks_something_is_filled(
    run: FabricatedRun, pools: FakePools
) -> None:
    caches = open_caches(run.config).layouts
    for name, asked in ((NAME, (False, True)), ("words", (True, False))):
        (kept, *lost) = storage.list_files(caches[name].shards_folder, ".parquet")
        for info in lost:
            storage.remove(caches[name].shard(info.base_name.removesuffix(".parquet")))
        pools.asked.clear()
        pools.scored.clear()
        run.score()
        assert pools.asked == [asked] * 4
        assert {teacher for teacher, _ in pools.scored} == {"words"}
        found = storage.list_files(caches[name].shards_folder, ".parquet")
        assert kept.mtime_ns in [info.mtime_ns for info in found] and len(found) == 2
    pools.asked.clear()
    run.score()
    assert pools.asked == []


def test_a_loss_that_comes_later_leaves_distributions_as_they_are(
    tmp_path: Path, pools: FakePools
) -> None:
    before = FabricatedRun(tmp_path)
    before.prepare()
    before.write_answers(0, 3)
    before.score()
    shards = before.shards("words")
    later = replace(before, overrides=[*LOSSES])
    pools.asked.clear()
    later.score()
    assert pools.asked == [(False, True)] * 6
    assert before.shards("words") == shards
    assert "words+features" in status(open_caches(later.config))
    assert NAME not in open_caches(before.config).layouts


def test_groups_that_training_would_refuse_are_refused_before_scoring(
    tmp_path: Path, pools: FakePools
) -> None:
    relation = "{type: relation, weight: 1.0, teacher: words, layers: {2: 1}, relation: distance"
    losses = f"training.losses=[{{type: forward_kl, weight: 1.0}}, {relation}, sequences: 4}}]"
    longest = max(e.num_tokens for e in prepared_run(tmp_path / "other").entries())
    run = prepared_run(tmp_path, losses, f"training.tokens_per_micro_batch={longest}")
    with pytest.raises(TrainingError, match="a relation loss keeps 4 sequences"):
        run.score()
    assert pools.scored == []


def prepared_run(root: Path, *overrides: str) -> FabricatedRun:
    made = FabricatedRun(root, overrides=list(overrides))
    made.prepare()
    made.write_answers(0, 4)
    return made


def test_interrupted_capture_goes_on(run: FabricatedRun, pools: FakePools) -> None:
    run.write_answers(4, 8)
    pools.fails = RuntimeError("killed")
    with pytest.raises(RuntimeError, match="killed"):
        run.score()
    pools.fails = None
    pools.scored.clear()
    run.score()
    assert len(pools.scored) == len(set(pools.scored)) < 16
    opened = open_caches(run.config)
    reader = open_hidden_states(opened.layouts[NAME])
    assert all(entry.sequence_id in reader for entry in opened.entries)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_hidden_states_alone_cover_no_sequence(per: str, tmp_path: Path, pools: FakePools) -> None:
    """No teacher has its distributions, so there is nothing to combine."""
    weights = f"{{type: gold_likelihood, temperature: 1.0, per: {per}}}"
    run = FabricatedRun(tmp_path, overrides=[*LOSSES, f"combine.weights={weights}"])
    prepared = run.prepare()
    refused, *others = (entry.sequence_id for entry in run.write_answers(0, 2))
    for cache in prepared.distribution_layouts().values():
        path = storage.join(cache.quarantine, f"{refused}.json")
        storage.write_json(path, {"sequence_id": refused, "error": "a poison"})
    dataset = run.score()
    assert refused in open_hidden_states(open_caches(run.config).layouts[NAME])
    assert [e.sequence_id for e in read_dataset(run.layout, dataset)] == others


def test_states_too_wide_for_the_memory_of_a_loader_are_named(
    run: FabricatedRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spec, _ = training_specs(run.prepare(), run.score())
    share = Share(spec, VOCABULARY, rank=0, world_size=1)
    BatchSource(share)
    assert caplog.messages == []
    most = sum(entry.num_positions for entry in run.entries()) * 2 * HIDDEN * 2
    for kept, said in ((most, 0), (most - 1, 1)):
        monkeypatch.setattr("students.data.batches.DECODED_BYTES_KEPT", kept)
        BatchSource(share)
        assert len(caplog.messages) == said
    assert "hidden states of words take 48 bytes per position" in caplog.messages[0]


def test_layers_and_projection_name_the_folder(run: FabricatedRun) -> None:
    fewer = replace(run, overrides=[LOSSES[0].replace(", 1: 1", "")])
    projected = replace(run, overrides=[*LOSSES, "scoring.features.dimensions=4"])
    names = {open_caches(each.config).layouts[NAME].name for each in (run, fewer, projected)}
    assert len(names) == 3
    heavier = replace(run, overrides=[LOSSES[0].replace("mse", "cosine")])
    assert open_caches(heavier.config).layouts[NAME].name in names


def test_projected_states_are_stored_projected(tmp_path: Path, pools: FakePools) -> None:
    run = FabricatedRun(tmp_path, overrides=[*LOSSES, "scoring.features={dimensions: 4, seed: 9}"])
    run.prepare()
    run.write_answers(0, 2)
    run.score()
    reader = open_hidden_states(open_caches(run.config).layouts[NAME])
    whole = FabricatedRun(tmp_path, overrides=[*LOSSES])
    whole.score()
    plain = open_hidden_states(open_caches(whole.config).layouts[NAME])
    identifier = make_sequence("words", 1).sequence_id
    (row, before) = (each.row(identifier) for each in (reader, plain))
    assert row is not None and before is not None
    expected = to_bfloat16(before.values @ projection_matrix(HIDDEN, 4, 9))
    np.testing.assert_array_equal(row.states, expected)


def test_verify_looks_at_states(run: FabricatedRun) -> None:
    opened = open_caches(run.config)
    found = verify(opened, "words")
    assert list(found) == ["words", NAME]
    assert found[NAME].problems == [] and found[NAME].num_compared == 8
    cache = opened.layouts[NAME]
    digest = storage.list_files(cache.shards_folder, ".parquet")[0].base_name[:-8]
    rows = read_hidden_states(cache.shard(digest))
    shorter = [replace(rows[0], states=rows[0].states[1:]), *rows[1:]]
    write_shard(cache.shard(digest), shorter, opened.fingerprint(NAME))
    found = verify(opened, None)[NAME].problems
    assert "positions, its sequence has" in str(found[0])
    infinite = replace(rows[0], states=np.full_like(rows[0].states, 0x7F80))
    assert row_problems(infinite, 20, None) == ["a hidden state is not finite"]


def test_a_corrupt_shard_of_states_is_captured_again(run: FabricatedRun, pools: FakePools) -> None:
    cache = open_caches(run.config).layouts[NAME]
    path = Path(cache.shard(storage.list_files(cache.shards_folder, ".parquet")[0].base_name[:-8]))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    pools.asked.clear()
    with logged("jobs.caches") as said:
        regenerate_inside_job(run.config, Request())
    assert any("is corrupt and set aside" in line for line in said)
    assert pools.asked == [(False, True)] * 4
    assert path.read_bytes() == whole


def test_a_forced_regeneration_captures_both_again(run: FabricatedRun, pools: FakePools) -> None:
    pools.asked.clear()
    regenerate_inside_job(run.config, Request("words", {"domain": "words"}, True))
    assert pools.asked == [(True, True)] * 4
    for name in ("words", NAME):
        cache = replace(open_caches(run.config).layouts[name], generation=2)
        shards = storage.list_files(cache.shards_folder, ".parquet")
        held = [s for i in shards for s in open_shard(cache.shard(i.base_name[:-8])).identifiers]
        assert len(held) == len(set(held)) == 8


def test_what_no_run_names_is_garbage(run: FabricatedRun) -> None:
    assert collect_garbage(run.config, True, False).startswith("nothing to remove")
    folder = open_caches(run.config).layouts[NAME].name
    run.overrides.clear()
    run.prepare()
    storage.remove(run.layout.pins)
    run.score()
    assert f"{folder}/g1" in collect_garbage(run.config, True, False)


def test_a_training_names_the_states_that_it_uses(run: FabricatedRun) -> None:
    prepared = run.prepare()
    student, twin = training_specs(prepared, "d")
    assert NAME in student.identity()["caches"] and NAME not in twin.identity()["caches"]
    storage.write_json(student.summary_path, {"identity": student.identity()})
    names = named_generations(run.layout)[open_caches(run.config).layouts[NAME].name][1]
    assert names == ["run quickstart", "training student of run quickstart"]


def test_distributions_alone_are_shown_and_exported(run: FabricatedRun) -> None:
    opened = open_caches(run.config)
    assert opened.chosen("words") == ["words", NAME]
    assert opened.distributions(None) == ["arithmetic", "words"]
    assert opened.chosen(NAME) == [NAME]
    with pytest.raises(ConfigError, match="holds hidden states"):
        opened.distributions(NAME)
    with pytest.raises(ConfigError, match="there is no teacher 'word'"):
        opened.chosen("word")
    assert open_cache(opened.layouts["words"]).row("nobody") is None
