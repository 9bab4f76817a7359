"""The cache commands on a real cluster: what is corrupt, changed or false is found and mended."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from jobs.cluster.local_head import LocalHead
from pipeline.cache.shard import read_shard, write_shard
from pipeline.fingerprint import digest_json
from pipeline.records import SparseLogprobs
from tests.support.caches import (
    assert_rows_agree,
    cache_folder,
    cached_rows,
    dataset,
    flip_bit,
    shards,
)
from tests.support.command_line import QUICKSTART, ROOT, file_times, polystill, token_environment
from tests.support.quickstart import some_prompts

pytestmark = pytest.mark.timeout(900)
TEACHERS = ("arithmetic", "words")
RUN = "quickstart"


@dataclass(frozen=True)
class Scored:
    """A run whose rows are scored; the references are its answers, so no engine wrote any."""

    root: Path
    head: LocalHead
    overrides: list[str]

    def stage(self, name: str) -> None:
        self._expect(0, "submit", name, str(QUICKSTART / "config.yaml"), address=True)

    def cache(self, command: str, *options: str, code: int = 0, address: bool = True) -> str:
        return self._expect(
            code, "cache", command, str(QUICKSTART / "config.yaml"), *options, address=address
        )

    def _expect(self, code: int, *arguments: str, address: bool) -> str:
        to = ["--address", self.head.address] if address else []
        token = token_environment(self.head.token)
        finished = polystill(*arguments, *to, *self.overrides, seconds=600, env=token)
        printed = finished.stdout + finished.stderr
        assert finished.returncode == code, printed
        assert "Traceback" not in finished.stderr, printed
        return printed

    def shards(self, teacher: str) -> list[Path]:
        return shards(self.root, teacher)


@pytest.fixture(scope="module")
def scored(ray_head: LocalHead, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    folder = tmp_path_factory.mktemp("prompts")
    root = folder.parent / "out"
    overrides = [
        f"storage.root={root}",
        f"storage.shared_roots=[{folder.parent}, {ROOT}]",
        f"prompts.sources.0.path={some_prompts('prompts.jsonl', 40, folder)}",
        f"prompts.sources.1.path={some_prompts('holdout.jsonl', 5, folder)}",
        "synthesis.recipes=[{type: dataset}]",
        "synthesis.prompts_per_shard=20",
    ]
    run = Scored(root, ray_head, overrides)
    for stage in ("prepare", "synthesize", "score"):
        run.stage(stage)
    return run


def test_a_healthy_cache_needs_no_cluster(scored: Scored) -> None:
    before = file_times(scored.root / "caches")
    assert "nothing to do" in scored.cache("regenerate", address=False)
    assert file_times(scored.root / "caches") == before


def test_a_flipped_bit_is_found_named_and_mended(scored: Scored) -> None:
    bad, *others = scored.shards("words")
    expected = cached_rows([bad])
    content = flip_bit(bad)
    untouched = file_times(cache_folder(scored.root, "arithmetic"))
    times = {path: path.stat().st_mtime_ns for path in others}

    found = scored.cache("verify", code=1, address=False)
    assert str(bad) in found and "1 problems" in found
    mended = scored.cache("regenerate")
    assert f"words: shard {bad.stem} is corrupt and set aside" in mended

    assert_rows_agree(cached_rows([bad]), expected)
    assert (bad.parent.parent / "g1.aside" / bad.name).read_bytes() == content
    assert {path: path.stat().st_mtime_ns for path in others} == times
    assert file_times(cache_folder(scored.root, "arithmetic")) == untouched


def a_nat_lower(row: SparseLogprobs) -> SparseLogprobs:
    """A false row without a flaw: descending, gold as its entry, head and tail of mass 1."""
    lower = {name: getattr(row, name) - np.float16(1) for name in ("logprobs", "gold_logprobs")}
    starts = np.cumsum(row.num_entries.astype(np.int64)) - row.num_entries
    head = np.add.reduceat(np.exp(lower["logprobs"].astype(np.float64)), starts)
    return replace(row, **lower, tail_mass=(1 - head).astype(np.float16))


def test_a_false_row_with_a_right_checksum_is_found_by_scoring_it_again(scored: Scored) -> None:
    path = scored.shards("arithmetic")[0]
    whole, rows = path.read_bytes(), read_shard(str(path))
    prepared = json.loads((scored.root / "runs" / RUN / "prepared.json").read_text())
    recipe = prepared["scoring_recipes"]["arithmetic"]
    write_shard(str(path), [a_nat_lower(row) for row in rows], digest_json(recipe))
    index = cache_folder(scored.root, "arithmetic") / "g1.index.parquet"
    indexed = index.read_bytes()
    index.unlink()
    found = scored.cache("verify", "--rescore", "1000", code=1)
    assert set(re.findall(r"(\w+): \d+ shards, .*: no problems", found)) == set(TEACHERS)
    named = set(re.findall(r"arithmetic: sequence (\w+) differs by (?:1\.|0\.99)", found))
    assert named == {row.sequence_id for row in rows}
    # The other teacher's cache, a shard of which was mended, is what that teacher says.
    size = len(dataset(scored.root, RUN))
    assert re.search(rf"words: {size} rows scored again; .*: no rows beyond it", found)
    path.write_bytes(whole)
    index.write_bytes(indexed)


def test_a_changed_teacher_is_scored_again_and_no_other(scored: Scored) -> None:
    before = file_times(scored.root / "caches")
    changed = Scored(
        scored.root, scored.head, [*scored.overrides, "teachers.words.vllm.dtype=bfloat16"]
    )
    status = changed.cache("status", address=False)
    assert "vllm.dtype: 'float32' -> 'bfloat16'" in status
    changed.cache("regenerate")
    now = file_times(scored.root / "caches")
    assert {name: now[name] for name in before} == before
    new = {name.split("/")[0] for name in now.keys() - before.keys()}
    (folder,) = new
    assert folder.startswith("words-")
    rows = cached_rows(sorted((scored.root / "caches" / folder / "g1").glob("*.parquet")))
    assert rows.keys() == dataset(scored.root, RUN).keys()
    assert "nothing to do" in changed.cache("regenerate", address=False)
