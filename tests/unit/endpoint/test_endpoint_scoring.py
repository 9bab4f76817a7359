"""A teacher behind an endpoint in the score stage: its cache, its marks, its loss halfway; and one
that only writes, which has none of these.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.caches.run_caches import open_caches
from pipeline import storage
from pipeline.cache.reader import open_cache
from pipeline.errors import ConfigError, TeacherError
from pipeline.sequences import SequenceReader
from teachers.pool.contracts import PoolReport
from teachers.protocol import EndpointSpec, ScoringRequest
from tests.support.endpoints import DROPPED, FakeVllm, Json, Loopback, loopback, run_in_process
from tests.support.fabricated import FabricatedRun, FakePools, FakeTeacher
from tests.support.tokenizers_for_tests import SPECIAL, save_tokenizer

KEY = "sk-SECRET-0123456789"
SELECTION = "scoring.selection={type: top_k, max_entries: 5}"


@pytest.fixture
def student(tmp_path: Path) -> str:
    save_tokenizer(tmp_path / "student", tokens=SPECIAL + list("abcdefghijklmnop"))
    return f"student.model={tmp_path / 'student'}"


def run_with(root: Path, student: str, teacher: str) -> FabricatedRun:
    overrides = [student, SELECTION, f"teachers.third={{{teacher}}}"]
    weights = "combine.weights={type: confidence, per: token, temperature: 1}"
    return FabricatedRun(root / "out", overrides=[*overrides, weights])


def scoring(server: Loopback, identity: str = "third at 1") -> str:
    endpoint = f"url: '{server.url}', model: served, api: vllm, tokenizer: ./student"
    endpoint += ", api_key_env: TEST_API_KEY, max_retries: 1, dtype: float32"
    return f"endpoint: {{{endpoint}}}, model_identity: {identity}"


@pytest.fixture(autouse=True)
def pools(monkeypatch: pytest.MonkeyPatch) -> FakePools:
    """Engines are faked; endpoints are asked."""
    monkeypatch.setenv("TEST_API_KEY", KEY)
    fake = FakePools()

    def run_pools(jobs: Sequence[Any]) -> dict[str, PoolReport]:
        remote = [job for job in jobs if isinstance(job.spec, EndpointSpec)]
        return fake([job for job in jobs if job not in remote]) | run_in_process(remote)

    monkeypatch.setattr("jobs.stages.score.run_pools", run_pools)
    return fake


def until(num_scored: int) -> Callable[[str, Json], Any]:
    """A server that is gone after so many sequences; the canary is none."""
    fake, left = FakeVllm("third"), num_scored

    def respond(path: str, body: Json) -> Any:
        nonlocal left
        if path == "/v1/completions" and len(body["prompt"]) < 33:
            left -= 1
        return fake(path, body) if left >= 0 else DROPPED

    return respond


def test_its_rows_are_like_any_teachers_and_marked_as_an_endpoints(
    tmp_path: Path, student: str
) -> None:
    with loopback(FakeVllm("third")) as server:
        run = run_with(tmp_path, student, scoring(server))
        entries = run.write_answers(0, 6)
        run.score()
        assert {h.get("Authorization") for *_, h in server.requests} == {f"Bearer {KEY}"}
    prepared = run.prepare()
    cache = prepared.cache_layouts()["third"]
    reader, sequences = open_cache(cache), SequenceReader(run.layout, entries)
    for entry in entries:
        row, sequence = reader.row(entry.sequence_id), sequences.get(entry.sequence_id)
        assert row is not None and sequence is not None
        expected = _row(sequence.input_ids.tolist())
        np.testing.assert_array_equal(row.gold_logprobs, expected.gold_logprobs.astype("f2"))
        np.testing.assert_array_equal(row.token_ids, expected.token_ids[:, :5].ravel())
    manifest = storage.read_json(cache.manifest)
    (engine,) = manifest["provenance"]["engines"]
    assert (engine["engine"], engine["capture"], engine["max_logprobs"]) == (
        "endpoint",
        "endpoint",
        20,
    )
    assert manifest["provenance"]["endpoint_model"] == "served"
    assert len(list((tmp_path / "out/endpoints").glob("*.json"))) == 1
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10 and not any(b"SECRET" in content for content in written)


def _row(ids: list[int]) -> Any:
    return asyncio.run(FakeTeacher("third").score(ScoringRequest(ids, 4)))


def test_a_server_that_goes_halfway_costs_only_what_it_had_not_said(
    tmp_path: Path, student: str
) -> None:
    with loopback(until(8)) as server:
        run = run_with(tmp_path, student, scoring(server))
        run.write_answers(0, 6)
        with pytest.raises(TeacherError, match="given up after 2 tries"):
            run.score()
    finished = run.shards("third")
    assert len(finished) == 1
    with loopback(FakeVllm("third")) as server:
        again = run_with(tmp_path, student, scoring(server))
        again.score()
        asked = [b for b in server.bodies("/v1/completions") if len(b["prompt"]) < 33]
    assert len(asked) == 6, "the other shard's sequences alone"
    assert finished.items() <= run.shards("third").items()
    assert len(run.shards("third")) == 2


def test_another_model_at_the_same_identity_is_refused_before_it_writes(
    tmp_path: Path, student: str
) -> None:
    with loopback(FakeVllm("third")) as server:
        run = run_with(tmp_path, student, scoring(server))
        run.write_answers(0, 2)
        run.score()
    run.write_answers(2, 4)
    before = run.shards("third")
    with loopback(FakeVllm("other weights")) as server:
        moved = run_with(tmp_path, student, scoring(server))
        with pytest.raises(TeacherError, match="`model_identity`"):
            moved.score()
    assert run.shards("third") == before


def test_one_that_only_writes_has_no_cache_and_says_so(tmp_path: Path, student: str) -> None:
    endpoint = "endpoint: {url: 'http://127.0.0.1:9/v1', model: m, api: openai, scores: false}"
    run = run_with(tmp_path, student, endpoint)
    run.write_answers(0, 2)
    run.score()
    opened = open_caches(run.config)
    assert sorted(opened.layouts) == ["arithmetic", "words"]
    assert not list((tmp_path / "out").glob("endpoints/*"))
    with pytest.raises(ConfigError, match="teacher 'third' only writes, so it has no cache"):
        opened.chosen("third")
