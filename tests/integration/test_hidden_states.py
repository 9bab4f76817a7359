"""Hidden states out of a real engine: those of transformers, with and without the prefix cache."""

import asyncio
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from teachers.protocol import CapturedRows, EngineSpec, ScoringRequest
from tests.support.engines import Running, started

pytest_plugins = ["tests.integration.models"]
pytestmark = pytest.mark.timeout(600)

VOCABULARY = 96
LAYERS = (0, 1, 2)
TOLERANCE = 1e-4
"""Of states of size 10 in float32, whose sums are taken in another order."""


@pytest.fixture(scope="module")
def running(tiny_teacher_folder: Path) -> Iterator[Running]:
    """An engine that computes a prompt once for all its answers, in steps shorter than prompts."""
    engine = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 48,
    }
    spec = EngineSpec(
        model=str(tiny_teacher_folder),
        min_model_len=128,
        vllm=engine,
        num_logprobs=8,
        hidden_layers=LAYERS,
        share_prefixes=True,
    )
    with started(spec) as running:
        yield running


def sequence(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


PROMPTS = [sequence(70, seed=1), sequence(33, seed=2)]
ANSWERED = [
    (prompt + sequence(3 + 3 * i, seed=10 + i), len(prompt)) for prompt in PROMPTS for i in range(6)
]


def expected_states(folder: Path, input_ids: list[int]) -> np.ndarray:
    """[T, L, H] by transformers; of its last layer what comes into the final norm."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before_norm = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: before_norm.append(inputs[0][0]))
    with torch.no_grad():
        output = model(torch.tensor([input_ids]), output_hidden_states=True, use_cache=False)
    states = [*(output.hidden_states[layer][0] for layer in LAYERS[:-1]), before_norm[0]]
    return torch.stack(states, dim=1).numpy()


def scored(running: Running, requests: list[tuple[list[int], int]], **asked: bool):
    async def together() -> list[CapturedRows]:
        return list(
            await asyncio.gather(
                *(running.teacher.score(ScoringRequest(*each, **asked)) for each in requests)
            )
        )

    return running(together())


@pytest.mark.parametrize(("length", "first_index"), [(2, 1), (60, 12), (127, 126)])
def test_states_are_those_of_transformers_before_each_token(
    running: Running, tiny_teacher_folder: Path, length: int, first_index: int
) -> None:
    input_ids = sequence(length, seed=length)
    (rows,) = scored(running, [(input_ids, first_index)], hidden_states=True)
    whole = expected_states(tiny_teacher_folder, input_ids)
    assert rows.hidden_states is not None and rows.hidden_states.dtype == np.float32
    np.testing.assert_allclose(rows.hidden_states, whole[first_index - 1 : -1], atol=TOLERANCE)
    assert len(rows.token_ids) == len(rows.hidden_states), "distributions come along"


def test_states_out_of_the_prefix_cache_are_the_same(
    running: Running, tiny_teacher_folder: Path
) -> None:
    assert running.teacher.metadata()["prefix_sharing"] is True, "the canary has agreed"
    shared = scored(running, ANSWERED, hidden_states=True)
    assert sum(rows.num_cached_tokens for rows in shared) > 0
    for (input_ids, first), rows in zip(ANSWERED, shared, strict=True):
        whole = expected_states(tiny_teacher_folder, input_ids)
        np.testing.assert_allclose(rows.hidden_states, whole[first - 1 : -1], atol=TOLERANCE)


def test_either_of_the_two_alone(running: Running) -> None:
    request = (sequence(40, seed=7), 20)
    (both,) = scored(running, [request], hidden_states=True)
    (states,) = scored(running, [request], hidden_states=True, distributions=False)
    (rows,) = scored(running, [request])
    assert states.token_ids.shape == (20, 0) and len(states.gold_logprobs) == 0
    np.testing.assert_allclose(states.hidden_states, both.hidden_states, atol=TOLERANCE)
    assert rows.hidden_states is None
    np.testing.assert_allclose(rows.gold_logprobs, both.gold_logprobs, atol=1e-4)


def test_sharing_ends_where_cached_states_differ(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = running.teacher.capture
    rows_of, num_cached = capture.rows, []

    async def counted(request, read_prefixes=False):
        rows = await rows_of(request, read_prefixes)
        num_cached.append(rows.num_cached_tokens)
        return rows

    async def forgetful(request, read_prefixes=False):
        rows = await rows_of(request, read_prefixes)
        states = rows.hidden_states * (0.5 if read_prefixes else 1.0)
        return replace(rows, hidden_states=states)

    monkeypatch.setattr(capture, "shares_prefixes", True)
    monkeypatch.setattr(capture, "rows", counted)
    running(capture.check_shared_hidden_states())
    assert capture.shares_prefixes
    assert num_cached[0] == 0 < num_cached[1], "the second capture reads what the first has left"
    monkeypatch.setattr(capture, "rows", forgetful)
    running(capture.check_shared_hidden_states())
    assert not capture.shares_prefixes


def test_no_file_stays(running: Running) -> None:
    scored(running, ANSWERED[:3], hidden_states=True)
    scored(running, ANSWERED[:3])
    folders = Path(tempfile.gettempdir()).glob("polystill-states-*")
    assert [path for folder in folders for path in folder.iterdir()] == []
