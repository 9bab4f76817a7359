"""The real engine: its rows, its answers, and a pool of actors that loses one and meets poison."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import psutil
import pytest
import ray
import torch
from transformers import LlamaForCausalLM

from pipeline.config.base import Resources
from pipeline.errors import TeacherError
from teachers.canary import check_replicas_agree
from teachers.pool.pool import TeacherWork, run_pools
from teachers.protocol import CapturedRows, EngineDiedError, EngineSpec, ScoringRequest
from teachers.tasks.siblings import Siblings
from tests.support.engines import Running, started

if TYPE_CHECKING:
    from teachers.engine.vllm_teacher import VllmTeacher

pytest_plugins = ["tests.integration.models"]
pytestmark = pytest.mark.timeout(600)

T = TypeVar("T")
VOCABULARY, EOS, SECOND_EOS = 96, 2, 5
MAX_MODEL_LEN = 48
NUM_LOGPROBS = 8


def spec(folder: Path) -> EngineSpec:
    return EngineSpec(
        model=str(folder),
        min_model_len=MAX_MODEL_LEN,
        # float32, so that transformers is an exact oracle; short steps, so that prompts are chunked
        vllm={
            "dtype": "float32",
            "enforce_eager": True,
            "max_num_seqs": 8,
            "max_num_batched_tokens": 32,
        },
        num_logprobs=NUM_LOGPROBS,
        eos_token_ids=(SECOND_EOS,),
    )


@pytest.fixture(scope="module")
def running(tiny_teacher_folder: Path) -> Iterator[Running]:
    with started(spec(tiny_teacher_folder)) as running:
        yield running


@pytest.fixture(scope="module")
def sharing(tiny_teacher_folder: Path) -> Iterator[Running]:
    """An engine that computes a prompt once for all of its answers."""
    longer = replace(spec(tiny_teacher_folder), min_model_len=128, share_prefixes=True)
    with started(longer) as running:
        yield running


def sequence(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


@pytest.mark.parametrize(("length", "first_index"), [(2, 1), (20, 1), (33, 12), (47, 46)])
def test_rows_are_those_of_transformers(
    running: Running, tiny_teacher_folder: Path, length: int, first_index: int
) -> None:
    input_ids = sequence(length, seed=length)
    rows = running(running.teacher.score(ScoringRequest(input_ids, first_index)))
    model = LlamaForCausalLM.from_pretrained(tiny_teacher_folder, dtype=torch.float32)
    with torch.no_grad():
        dense = model(torch.tensor([input_ids])).logits[0].log_softmax(-1).numpy()
    # The row over the token at index i is what the model says at index i - 1.
    dense = dense[first_index - 1 : -1]
    gold = np.array(input_ids[first_index:])
    assert rows.token_ids.shape == rows.logprobs.shape == (length - first_index, NUM_LOGPROBS)
    assert (rows.token_ids.dtype, rows.logprobs.dtype) == (np.int32, np.float32)
    np.testing.assert_allclose(rows.gold_logprobs, dense[np.arange(len(gold)), gold], atol=1e-4)
    np.testing.assert_allclose(
        rows.logprobs, np.take_along_axis(dense, rows.token_ids, axis=1), atol=1e-4
    )
    np.testing.assert_allclose(rows.logprobs, -np.sort(-dense, axis=1)[:, :NUM_LOGPROBS], atol=1e-4)


def test_arrays_are_chosen_and_equal_the_flat_path(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert running.teacher.metadata()["capture"] == "arrays"
    input_ids = sequence(31, seed=3)
    arrays = running(running.teacher.score(ScoringRequest(input_ids, 1)))
    monkeypatch.setattr(running.teacher.capture, "mode", "flat")
    flat = running(running.teacher.score(ScoringRequest(input_ids, 1)))
    np.testing.assert_array_equal(arrays.token_ids, flat.token_ids)
    np.testing.assert_array_equal(arrays.logprobs, flat.logprobs)
    np.testing.assert_array_equal(arrays.gold_logprobs, flat.gold_logprobs)


def test_requests_that_cannot_be_honoured_are_refused(running: Running) -> None:
    with pytest.raises(TeacherError, match="48 tokens and room for 1 exceed max_model_len 48"):
        running(running.teacher.score(ScoringRequest(sequence(48, seed=0), 1)))
    with pytest.raises(TeacherError, match="ids outside 0 to 95"):
        running(running.teacher.score(ScoringRequest([3, 4, VOCABULARY], 1)))
    with pytest.raises(TeacherError, match="room for 46"):
        running(running.teacher.generate([3, 4, 5], {"max_tokens": 46}, 1))


def test_answers_end_properly_and_samples_differ(running: Running) -> None:
    sampling = {"max_tokens": 24, "temperature": 2.0, "seed": 11}
    answers = running(running.teacher.generate([3, 4, 5], sampling, 16))
    assert len({tuple(answer.token_ids) for answer in answers}) == 16
    for answer in answers:
        ends = [token for token in answer.token_ids if token in (EOS, SECOND_EOS)]
        if answer.finish_reason == "stop":
            assert answer.token_ids[-1:] == ends
        else:
            assert (answer.finish_reason, len(answer.token_ids), ends) == ("length", 24, [])
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    assert {answer.token_ids[-1] for answer in answers if answer.finish_reason == "stop"} == {
        EOS,
        SECOND_EOS,
    }
    again = running(running.teacher.generate([3, 4, 5], sampling, 16))
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in answers]


def test_a_judge_can_write_nothing_but_the_allowed_tokens(running: Running) -> None:
    """One token of the given ones, the likeliest, also where the model would rather stop."""
    allowed = [7, 11, 13]
    sampling = {"max_tokens": 1, "temperature": 0.0, "allowed_token_ids": allowed}
    for prompt in ([3, 4, 5], [9, 8], [EOS, 20, 21, 22]):
        ((answer,),) = [running(running.teacher.generate(prompt, sampling, 1))]
        row = running(running.teacher.score(ScoringRequest([*prompt, allowed[0]], len(prompt))))
        assert answer.token_ids[0] in allowed and len(answer.token_ids) == 1
        others = [
            running(running.teacher.score(ScoringRequest([*prompt, i], len(prompt))))
            for i in allowed[1:]
        ]
        gold = [float(each.gold_logprobs[0]) for each in (row, *others)]
        assert answer.token_ids[0] == allowed[gold.index(max(gold))]


def test_description_and_memory(running: Running, tiny_teacher_folder: Path) -> None:
    metadata = running.teacher.metadata()
    model = LlamaForCausalLM.from_pretrained(tiny_teacher_folder)
    assert metadata["num_parameters"] == model.num_parameters()
    assert (metadata["dtype"], metadata["max_model_len"]) == ("float32", MAX_MODEL_LEN)
    peak = running.teacher.peak_memory_bytes()
    assert peak is not None and 100e6 < peak < 64e9


def test_context_that_cannot_hold_the_sequences_is_refused(tiny_teacher_folder: Path) -> None:
    from teachers.engine.vllm_teacher import VllmTeacher

    too_low = replace(spec(tiny_teacher_folder), vllm={"max_model_len": 40})
    with pytest.raises(TeacherError, match=r"max_model_len \(40\).*\(48\)"):
        asyncio.run(VllmTeacher.start(too_low))
    too_long = replace(spec(tiny_teacher_folder), min_model_len=4096)
    with pytest.raises(TeacherError, match="4096"):
        asyncio.run(VllmTeacher.start(too_long))


PROMPTS = [sequence(70, seed=1), sequence(101, seed=2), sequence(33, seed=3)]
ANSWERED = [
    (prompt + sequence(3 + 3 * i, seed=10 + i), len(prompt)) for prompt in PROMPTS for i in range(8)
]


def scored(running: Running, requests: list[tuple[list[int], int]]) -> list[CapturedRows]:
    async def together() -> list[CapturedRows]:
        return list(
            await asyncio.gather(
                *(running.teacher.score(ScoringRequest(*each)) for each in requests)
            )
        )

    return running(together())


def assert_same_rows(found: list[CapturedRows], expected: list[CapturedRows]) -> None:
    """To the noise of float32 sums in another order; entries that tie within it may swap."""
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.gold_logprobs, other.gold_logprobs, atol=1e-4)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        assert (one.token_ids == other.token_ids).mean() > 0.99


@pytest.mark.parametrize("capture", ["arrays", "flat"])
def test_shared_prompts_are_computed_once_and_give_the_same_rows(
    sharing: Running, monkeypatch: pytest.MonkeyPatch, capture: str
) -> None:
    assert sharing.teacher.metadata()["prefix_sharing"] is True
    monkeypatch.setattr(sharing.teacher.capture, "mode", capture)
    monkeypatch.setattr(sharing.teacher.capture, "shares_prefixes", False)
    apart = scored(sharing, ANSWERED)
    assert {rows.num_cached_tokens for rows in apart} == {0}
    sharing(sharing.teacher.engine.llm.reset_prefix_cache())
    monkeypatch.setattr(sharing.teacher.capture, "shares_prefixes", True)
    shared = scored(sharing, ANSWERED)
    assert_same_rows(shared, apart)
    for prompt, start in zip(PROMPTS, range(0, len(ANSWERED), 8), strict=True):
        whole_blocks = (len(prompt) - 1) // 32 * 32
        cached = [rows.num_cached_tokens for rows in shared[start : start + 8]]
        assert cached == [0] + [whole_blocks] * 7
    assert not any(rows.is_rescored for rows in shared)


def test_rows_that_the_prefix_cache_holds_back_are_scored_again(sharing: Running) -> None:
    whole = [(ids, 1) for ids, _ in ANSWERED[:3]]
    first = scored(sharing, whole)
    again = scored(sharing, whole)
    assert all(rows.is_rescored and rows.num_cached_tokens == 0 for rows in again)
    assert_same_rows(again, first)


@pytest.mark.parametrize(
    ("prompt", "common"), [(PROMPTS[0], 40), (sequence(64, seed=4), 0), (sequence(60, seed=4), 4)]
)
def test_rows_inside_the_cached_prefix_are_those_of_an_earlier_answer(
    sharing: Running, monkeypatch: pytest.MonkeyPatch, prompt: list[int], common: int
) -> None:
    """Answers begin alike, or the prompt fills its blocks: its last row is over their first tokens,
    few of which are among the captured.
    """
    begin = prompt + sequence(common, seed=20)
    answers = [begin + sequence(9 + i, seed=30 + i) for i in range(8)]
    requests = [(ids, len(prompt)) for ids in answers]
    with monkeypatch.context() as patch:
        patch.setattr(sharing.teacher.capture, "shares_prefixes", False)
        apart = scored(sharing, requests)
    sharing(sharing.teacher.engine.llm.reset_prefix_cache())

    async def together() -> list[CapturedRows]:
        siblings = Siblings()
        each = [
            siblings.score(sharing.teacher, ScoringRequest(ids, len(prompt))) for ids in answers
        ]
        return list(await asyncio.gather(*each))

    found = sharing(together())
    assert_same_rows(found, apart)
    assert not any(rows.is_rescored for rows in found)
    assert [rows.num_cached_tokens for rows in found] == [0] + [len(begin) // 32 * 32] * 7


@pytest.mark.parametrize("fault", ["too much is cached", "preempted: rows are garbage"])
def test_either_sign_of_incomplete_rows_is_enough(
    sharing: Running, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    from teachers.engine.row_capture import scoring_parameters

    input_ids, first_index = sequence(60, seed=6), 40
    (expected,) = scored(sharing, [(input_ids, first_index)])
    finish, num_requests = sharing.teacher.engine.finish, 0

    async def faulty_at_first(*request: Any) -> Any:
        nonlocal num_requests
        num_requests += 1
        parameters = scoring_parameters(NUM_LOGPROBS, flat=False, read_prefixes=False)
        output, hidden_states = await finish(request[0], parameters)
        if num_requests == 1 and fault == "too much is cached":
            output.num_cached_tokens = first_index
        elif num_requests == 1:
            rows = output.prompt_logprobs
            token_ids = rows.token_ids.copy()
            token_ids[first_index - 1] = 7 * 10**8
            output.prompt_logprobs = replace(rows, token_ids=token_ids)
        return output, hidden_states

    monkeypatch.setattr(sharing.teacher.engine, "finish", faulty_at_first)
    (found,) = scored(sharing, [(input_ids, first_index)])
    assert found.is_rescored and num_requests == 2
    assert_same_rows([found], [expected])


def test_more_prompts_with_seeds_than_a_step_holds_are_answered(tiny_teacher_folder: Path) -> None:
    """vLLM's engine on a CPU dies where a step cuts one of them in two."""
    writer = replace(spec(tiny_teacher_folder), vllm={"enforce_eager": True}, num_logprobs=0)
    sampling = {"max_tokens": 4, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    with started(writer) as running:
        steps = running.teacher.engine.config.scheduler_config.max_num_batched_tokens
        prompts = [sequence(41, seed=n) for n in range(2 * steps // 41)]

        async def answers() -> list:
            generate = running.teacher.generate
            return await asyncio.gather(*(generate(each, sampling, 1) for each in prompts))

        assert {len(answer.token_ids) for (answer,) in running(answers())} == {4}


def test_an_engine_for_single_answers_keeps_no_prefixes(running: Running) -> None:
    input_ids = sequence(47, seed=5)
    for _ in range(2):
        rows = running(running.teacher.score(ScoringRequest(input_ids, 40)))
        assert (rows.num_cached_tokens, rows.is_rescored) == (0, False)
    assert running.teacher.metadata()["prefix_sharing"] is False


def test_engines_of_one_model_say_the_same_of_the_canary(
    running: Running, sharing: Running
) -> None:
    ours, other = running.teacher.canary(), sharing.teacher.canary()
    assert ours is not None and other is not None
    assert ours.gold_logprobs.shape == (32,)
    check_replicas_agree("tiny", ours, other)
    with pytest.raises(TeacherError, match="disagree"):
        check_replicas_agree("tiny", ours, replace(other, gold_logprobs=other.gold_logprobs[::-1]))


def test_memory_that_runs_out_at_start_names_the_knobs(
    tiny_teacher_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from teachers.engine.vllm_teacher import VllmTeacher

    score_full_step = VllmTeacher._score_full_step
    before = set(psutil.Process().children(recursive=True))

    async def without_more_memory(self: VllmTeacher) -> None:
        for process in set(psutil.Process().children(recursive=True)) - before:
            size = process.memory_info().vms
            resource.prlimit(process.pid, resource.RLIMIT_AS, (size, size))
        await score_full_step(self)

    monkeypatch.setattr(VllmTeacher, "_score_full_step", without_more_memory)
    large_steps = {"enforce_eager": True, "max_num_seqs": 256, "max_num_batched_tokens": 8192}
    starving = replace(spec(tiny_teacher_folder), vllm=large_steps)
    refused = pytest.raises(EngineDiedError, match="176 sequences of 47 tokens with 8")
    with refused as death, started(starving):
        pass
    for knob in (
        "gpu_memory_utilization (0.85)",
        "max_num_batched_tokens (8192)",
        "max_num_seqs (256)",
        "num_logprobs (8)",
    ):
        assert knob in str(death.value)


@dataclass(frozen=True)
class ScoreTask:
    """Scores sequences; one of them kills the actor, and one is longer than allowed."""

    folder: Path
    numbers: tuple[int, ...]

    POISON = 3
    DEADLY = 8

    @property
    def label(self) -> str:
        return f"sequences {self.numbers}"

    def __len__(self) -> int:
        return len(self.numbers)

    def halves(self) -> tuple[ScoreTask, ScoreTask]:
        middle = len(self) // 2
        return replace(self, numbers=self.numbers[:middle]), replace(
            self, numbers=self.numbers[middle:]
        )

    def quarantine(self, error: str) -> None:
        (number,) = self.numbers
        (self.folder / f"poison-{number}").write_text(error)

    async def run(self, teacher: VllmTeacher) -> dict[int, float]:
        if self.DEADLY in self.numbers:
            children = [child.pid for child in psutil.Process().children(recursive=True)]
            (self.folder / f"killed-{os.getpid()}").write_text(" ".join(map(str, children)))
            os.kill(os.getpid(), signal.SIGKILL)
        length = {n: MAX_MODEL_LEN if n == self.POISON else 10 + n for n in self.numbers}
        rows = await asyncio.gather(
            *(teacher.score(ScoringRequest(np.arange(length[n]).tolist(), 1)) for n in self.numbers)
        )
        return {
            n: float(row.gold_logprobs.sum()) for n, row in zip(self.numbers, rows, strict=True)
        }


@pytest.fixture
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    ray.shutdown()


@pytest.mark.faults
def test_poison_is_set_aside_though_it_kills_its_actor_each_time(
    cluster: None, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    tasks = [ScoreTask(tmp_path, tuple(range(start, start + 4))) for start in range(0, 16, 4)]
    done: list[tuple[int, int]] = []
    job = TeacherWork(
        name="tiny",
        spec=spec(tiny_teacher_folder),
        resources=Resources(num_cpus=2),
        replicas=1,
        tasks=tasks,
        progress=lambda items, total, _: done.append((items, total)),
    )
    report = run_pools([job])["tiny"]
    numbers = sorted(number for result in report.results for number in result)
    assert numbers == [n for n in range(16) if n not in (ScoreTask.POISON, ScoreTask.DEADLY)]
    assert all(value < 0 for result in report.results for value in result.values())
    assert sorted(label for label, _ in report.quarantined) == ["sequences (3,)", "sequences (8,)"]
    assert "exceed max_model_len" in (tmp_path / "poison-3").read_text()
    assert (tmp_path / "poison-8").read_text()
    killed = list(tmp_path.glob("killed-*"))
    # In its task among others, then twice each alone: in its task, its half, as the last one left.
    assert report.num_deaths == len(killed) <= 7
    assert [engine["capture"] for engine in report.engines] == ["arrays"] * (len(killed) + 1)
    assert report.engines[-1]["peak_memory_bytes"] > 100e6
    assert done[-1][1] == 16
    orphans = [int(pid) for path in killed for pid in path.read_text().split()]
    assert orphans and not [pid for pid in orphans if psutil.pid_exists(pid)]
