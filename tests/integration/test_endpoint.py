"""A real vLLM server as a teacher: its rows and answers are those of an engine of our own, its key
is needed and written nowhere, and losing it halfway costs only what it had not said.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import ray

from pipeline.cache.shard import read_shard
from pipeline.config.base import Resources
from pipeline.config.scoring import TopK
from pipeline.config.student import StudentConfig
from pipeline.config.teachers import EndpointConfig
from pipeline.errors import ConfigError, TeacherError
from pipeline.fingerprint import digest_ids
from pipeline.layout import Layout
from pipeline.records import TokenSequence
from pipeline.sequences import write_sequences
from teachers.endpoint.teacher import EndpointTeacher
from teachers.pool.actor import CPU_ENV_VARS, ENGINE_ENV_VARS
from teachers.pool.pool import TeacherWork, run_pools
from teachers.protocol import EndpointSpec, EngineSpec, ScoringRequest
from teachers.tasks.score import CacheOutput, ScoredShard, ScoreTask
from tests.integration.models import VOCABULARY, save_tiny_llama
from tests.support.engines import Running, started
from tests.support.tokenizers_for_tests import SPECIAL, save_tokenizer

pytestmark = pytest.mark.timeout(600)

T = TypeVar("T")
KEY = "sk-SECRET-0123456789"
WIDTH, MAX_MODEL_LEN, EOS = 8, 64, 1


@dataclass
class Server:
    """A vLLM server, started and stopped by its process id."""

    model: Path
    port: int
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        options = ["--model", self.model, "--served-model-name", "tiny", "--api-key", KEY]
        options += ["--host", "127.0.0.1", "--port", self.port, "--dtype", "float32"]
        options += ["--enforce-eager", "--max-model-len", MAX_MODEL_LEN, "--max-num-seqs", 8]
        # As few threads as an engine in an actor; the rest is a vLLM server as it comes.
        environment = os.environ | CPU_ENV_VARS | ENGINE_ENV_VARS | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        said: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said.append(line)
            if "Application startup complete" in line:
                break
        else:
            raise AssertionError("".join(said[-40:]))
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def stop(self) -> None:
        """Ends it and all that it started, without a chance to say goodbye."""
        if self.process is None:
            return
        parent = psutil.Process(self.process.pid)
        family = [*parent.children(recursive=True), parent]
        for member in family:
            member.kill()
        self.process.wait()
        psutil.wait_procs(family)
        self.process = None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has a token for every id, and an end of sequence of its own."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    save_tiny_llama(folder, seed=0)
    others = [chr(0x100 + i) for i in range(VOCABULARY - len(SPECIAL))]
    save_tokenizer(folder, tokens=SPECIAL + others)
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server(folder, free_port())
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Running]:
    """An engine of our own on the same model."""
    block = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8}
    spec = EngineSpec(
        model=str(folder),
        min_model_len=MAX_MODEL_LEN,
        vllm=block,
        num_logprobs=WIDTH,
        eos_token_ids=(EOS,),
    )
    with started(spec) as running:
        yield running


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_API_KEY", KEY)


@pytest.fixture
def spec(server: Server, folder: Path, tmp_path: Path) -> EndpointSpec:
    return EndpointSpec(
        endpoint=endpoint(server, folder),
        student=StudentConfig(model=str(folder), initialization="random"),
        min_model_len=MAX_MODEL_LEN,
        num_logprobs=WIDTH,
        eos_token_ids=(EOS,),
        canary_path=str(tmp_path / "canary.json"),
    )


def endpoint(server: Server, folder: Path, **settings: Any) -> EndpointConfig:
    values = {"url": server.url, "model": "tiny", "api": "vllm", "tokenizer": str(folder)}
    values |= {"dtype": "float32", "api_key_env": "TEST_API_KEY", "max_retries": 2}
    return EndpointConfig.model_validate(values | settings)


def asked(spec: EndpointSpec, request: Callable[[EndpointTeacher], Coroutine[Any, Any, T]]) -> T:
    async def run() -> T:
        teacher = await EndpointTeacher.start(spec)
        try:
            return await request(teacher)
        finally:
            teacher.shutdown()
            await asyncio.sleep(0)

    return asyncio.run(run())


def tokens(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(6, VOCABULARY, length).tolist()


async def description(teacher: EndpointTeacher) -> dict[str, Any]:
    return teacher.metadata()


@pytest.mark.parametrize(("length", "first_index"), [(2, 1), (20, 1), (63, 40)])
def test_rows_are_those_of_an_engine(
    spec: EndpointSpec, engine: Running, length: int, first_index: int
) -> None:
    input_ids = tokens(length, seed=length)
    rows = asked(spec, lambda teacher: teacher.score(ScoringRequest(input_ids, first_index)))
    expected = engine(engine.teacher.score(ScoringRequest(input_ids, first_index)))
    assert rows.token_ids.shape == expected.token_ids.shape == (length - first_index, WIDTH)
    # float32 sums in another order; entries that tie within that may swap
    np.testing.assert_allclose(rows.logprobs, expected.logprobs, atol=1e-4)
    np.testing.assert_allclose(rows.gold_logprobs, expected.gold_logprobs, atol=1e-4)
    assert (rows.token_ids == expected.token_ids).mean() > 0.99


def test_answers_are_those_of_an_engine(spec: EndpointSpec, engine: Running) -> None:
    prompts = [tokens(5 + i, seed=i) for i in range(8)]
    for sampling in (
        {"max_tokens": 24, "temperature": 0.0, "seed": 1},
        {"max_tokens": 1, "temperature": 0.0, "allowed_token_ids": [7, 11, 13]},
        {"max_tokens": 6, "min_tokens": 6, "ignore_eos": True, "stop": None, "temperature": 0.0},
    ):
        for prompt in prompts:
            (answer,) = asked(spec, lambda t, p=prompt, s=sampling: t.generate(p, s, 1))
            (expected,) = engine(engine.teacher.generate(prompt, sampling, 1))
            assert answer.token_ids == expected.token_ids
            assert answer.finish_reason == expected.finish_reason


def test_samples_differ_by_their_seeds_and_come_again(spec: EndpointSpec) -> None:
    sampling = {"max_tokens": 16, "temperature": 2.0, "seed": 3}
    answers, again = (
        [answer.token_ids for answer in asked(spec, lambda t: t.generate([9, 8], sampling, 6))]
        for _ in range(2)
    )
    assert answers == again and len({tuple(each) for each in answers}) == 6


def test_it_says_what_it_is(spec: EndpointSpec, engine: Running) -> None:
    described = asked(spec, description)
    assert described["engine_version"] == engine.teacher.metadata()["engine_version"]
    assert (described["max_model_len"], described["max_logprobs"]) == (MAX_MODEL_LEN, 20)


def test_the_key_is_needed(spec: EndpointSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_API_KEY", "sk-WRONG")
    with pytest.raises(ConfigError, match=r"status 401.*endpoint.api_key_env") as refused:
        asked(spec, description)
    assert "sk-" not in str(refused.value)
    monkeypatch.delenv("TEST_API_KEY")
    with pytest.raises(ConfigError, match="TEST_API_KEY"):
        asked(spec, description)


def test_more_log_probabilities_than_the_server_gives_are_refused_at_start(
    spec: EndpointSpec,
) -> None:
    with pytest.raises(TeacherError, match=r"status 400.*21.*20"):
        asked(replace(spec, num_logprobs=21), description)


def test_what_the_server_would_cut_is_refused(spec: EndpointSpec) -> None:
    with pytest.raises(TeacherError, match="64 tokens and room for 1 exceed its max_model_len 64"):
        asked(spec, lambda teacher: teacher.score(ScoringRequest(tokens(MAX_MODEL_LEN, seed=0), 1)))
    with pytest.raises(TeacherError, match="room for 61"):
        asked(spec, lambda teacher: teacher.generate([7, 8, 9, 10], {"max_tokens": 61}, 1))


def test_what_the_server_refuses_is_said_in_its_words(spec: EndpointSpec) -> None:
    with pytest.raises(TeacherError, match=r"status 400.*vocab"):
        asked(spec, lambda teacher: teacher.score(ScoringRequest([7, VOCABULARY], 1)))


@dataclass
class Shards:
    """Sequences in shards of two, and the cache that they are scored into."""

    root: Path

    def tasks(self) -> list[ScoreTask]:
        layout, found = Layout(str(self.root), "run"), []
        cache = layout.cache("tiny", "0" * 32)
        output = CacheOutput("tiny", cache, "0" * 32, TopK(type="top_k", max_entries=4), 8)
        for number in range(12):
            sequences = [self.sequence(2 * number + i) for i in range(2)]
            shard = write_sequences(layout, "d", sequences)
            identifiers = tuple(each.sequence_id for each in sequences)
            found.append(ScoreTask(f"{self.root}/{shard}", identifiers, (output,)))
        return found

    @staticmethod
    def sequence(number: int) -> TokenSequence:
        ids = np.array(tokens(30, seed=number), np.int32)
        return TokenSequence(f"{number:032x}", ids, ((10, 30),), str(number), "d", ("t",), "stop")

    def written(self) -> list[Path]:
        return sorted(self.root.glob("caches/*/g1/*.parquet"))


@pytest.fixture
def cluster() -> Iterator[Path]:
    """Ray, whose workers have this process's environment; its folder of logs."""
    context = ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield Path(context.address_info["session_dir"])
    ray.shutdown()


def test_a_server_that_dies_halfway_is_waited_for_and_then_missed_by_name(
    spec: EndpointSpec,
    engine: Running,
    server: Server,
    folder: Path,
    cluster: Path,
    tmp_path: Path,
) -> None:
    shards, results = Shards(tmp_path), []

    def stop_at_the_fifth(done: int, total: int, result: ScoredShard) -> None:
        results.append(result)
        if len(results) == 5:
            server.stop()

    # One request at a time, so that some are still open when the server dies.
    slow = replace(spec, endpoint=endpoint(server, folder, max_concurrency=1))
    job = TeacherWork(
        "tiny", slow, Resources(num_cpus=0.5), 1, shards.tasks(), progress=stop_at_the_fifth
    )
    with pytest.raises(TeacherError, match=r"given up after 3 tries.*run it again"):
        run_pools([job])
    finished = shards.written()
    assert 5 <= len(finished) < 12
    server.start()
    left = [task for task in shards.tasks() if not _is_written(task)]
    report = run_pools([replace(job, tasks=left, progress=None)])["tiny"]
    assert len(report.results) == 12 - len(finished) and report.num_deaths == 0
    assert report.engines[0]["capture"] == "endpoint"
    for path in shards.written():
        for row in read_shard(str(path)):
            ids = Shards.sequence(int(row.sequence_id, 16)).input_ids.tolist()
            expected = engine(engine.teacher.score(ScoringRequest(ids, 10)))
            np.testing.assert_allclose(
                row.gold_logprobs.astype(np.float32), expected.gold_logprobs, rtol=1e-3, atol=1e-3
            )
    for place in (tmp_path, cluster):
        for path in place.rglob("*"):
            if path.is_file():
                assert b"SECRET" not in path.read_bytes(), path


def _is_written(task: ScoreTask) -> bool:
    return Path(task.outputs[0].cache.shard(digest_ids(task.sequence_ids))).exists()
