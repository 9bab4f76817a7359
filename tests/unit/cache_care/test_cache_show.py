"""What people read: status and the token table; and that messages name what does not exist."""

import re
from pathlib import Path

import numpy as np
import pytest

from jobs.caches.actions import show, status
from jobs.caches.run_caches import open_caches
from pipeline import storage
from pipeline.cache.reader import open_cache
from pipeline.cache_care.show import find_sequence
from pipeline.errors import ConfigError
from pipeline.messages import table
from tests.support.fabricated import FabricatedRun, FakePools


@pytest.fixture
def run(tmp_path: Path, pools: FakePools) -> FabricatedRun:
    made = FabricatedRun(tmp_path)
    made.prepare()
    made.write_answers(0, 4)
    made.score()
    return made


def line_of(text: str, start: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if re.match(rf"{start}\s+{start}-", line)]
    return line.split()


def test_status_counts_what_is_there_and_what_is_not(run: FabricatedRun) -> None:
    run.write_answers(4, 6)
    cache = open_caches(run.config).layouts["words"]
    refused = run.entries()[-1].sequence_id
    path = storage.join(cache.quarantine, f"{refused}.json")
    storage.write_json(path, {"sequence_id": refused, "error": "too odd"})
    told = status(open_caches(run.config))
    positions = sum(entry.num_positions for entry in run.entries()[:8])
    size = sum(p.stat().st_size for p in Path(cache.shards_folder).iterdir())
    _, folder, *figures = line_of(told, "words")
    assert folder == f"{cache.name}/g1"
    assert figures[:4] == ["2", "3", "1", str(positions)] and figures[4] == f"{size:,}"
    assert line_of(told, "arithmetic")[3:5] == ["4", "0"]
    assert f"words: quarantined {refused}: too odd" in told
    assert "words: generation 1 current (used by this run), named by run quickstart" in told
    assert 0.99 < float(figures[-1]) < 1


def test_status_shows_the_rest_beside_a_truncated_shard(run: FabricatedRun) -> None:
    cache = open_caches(run.config).layouts["words"]
    bad = Path(cache.shard(next(iter(run.shards("words")))))
    bad.write_bytes(bad.read_bytes()[:-10])
    told = status(open_caches(run.config))
    assert line_of(told, "words")[2:4] == ["1", "4"]
    assert f"words: the cache shard {bad} is corrupt" in told
    assert line_of(told, "arithmetic")[2:4] == ["2", "0"]


def test_status_of_a_changed_config_shows_old_beside_new(run: FabricatedRun) -> None:
    old = open_caches(run.config).layouts["words"].name
    run.overrides = ["teachers.words.vllm.dtype=bfloat16", "scoring.selection.max_entries=12"]
    told = status(open_caches(run.config))
    assert line_of(told, "words")[2:4] == ["0", "8"]
    assert re.search(rf"words: stale {old} \([\d,]+ bytes, named by run quickstart\)", told)
    assert "    vllm.dtype: 'float32' -> 'bfloat16'" in told
    assert "    selection.max_entries: 16 -> 12" in told
    assert "the config or a model has changed" in told


def test_a_sequence_is_shown_token_by_token(run: FabricatedRun) -> None:
    entry = run.entries()[0]
    told = show(open_caches(run.config), None, entry.sequence_id[:9])
    assert told.startswith(f"sequence {entry.sequence_id}, domain arithmetic, written by")
    lines = told.splitlines()[3:]
    assert len(lines) == 2 * entry.num_positions
    row = open_cache(open_caches(run.config).layouts["words"]).row(entry.sequence_id)
    for j, line in enumerate(lines[1::2]):
        found = re.match(r"\s+words\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)\s+'.*?' ([\d.]+)", line)
        start = int(row.num_entries[:j].sum())
        expected = [
            np.exp(float(row.gold_logprobs[j])),
            float(row.tail_mass[j]),
            float(row.entropies[j]),
            np.exp(float(row.logprobs[start])),
        ]
        np.testing.assert_allclose([float(text) for text in found.groups()], expected, atol=6e-4)
    only = show(open_caches(run.config), "words", entry.sequence_id)
    assert len(only.splitlines()) == 3 + entry.num_positions


def test_drawn_entries_are_shown_by_their_counts(tmp_path: Path, pools: FakePools) -> None:
    rule = "{type: head_and_sampled, head_mass: 0.1, max_head_entries: 1, num_draws: 3}"
    drawn = FabricatedRun(tmp_path, overrides=[f"scoring.selection={rule}"])
    drawn.prepare()
    drawn.write_answers(0, 1)
    drawn.score()
    lines = show(open_caches(drawn.config), "words", None).splitlines()[3:]
    for line in lines:
        assert len(re.findall(r"' \d\.\d{4}", line)) == 1  # the head
        assert sum(int(count) for count in re.findall(r"' drawn (\d)x", line)) == 3


def test_a_teacher_without_the_row_is_said(run: FabricatedRun) -> None:
    cache = open_caches(run.config).layouts["words"]
    for path in Path(cache.shards_folder).iterdir():
        path.unlink()
    told = show(open_caches(run.config), None, None)
    assert "words has no row for this sequence" in told and "arithmetic" in told


def test_sequences_are_found_by_how_they_begin() -> None:
    known = ["ab12", "ab34", "ab3", "cd"]
    assert find_sequence(known, "c") == "cd"
    assert find_sequence(known, "ab3") == "ab3"
    with pytest.raises(ConfigError, match=r"3 sequences .* begin with 'ab': ab12, ab34, ab3; give"):
        find_sequence(known, "ab")
    with pytest.raises(ConfigError, match="no sequence of this run has an id that begins with 'x'"):
        find_sequence(known, "x")


def test_columns_are_as_wide_as_their_cells() -> None:
    assert table(["a", "b"], [["long", "1"], ["x", "200"]]) == "a     b\nlong    1\nx     200"
