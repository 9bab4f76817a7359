"""Bounds of rounding hold on a real model of 30 layers, and see faults of its weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.records import TokenSequence
from students.architecture.body import body_hidden_states
from students.architecture.checks import check_architecture
from students.reference import gold_logprobs, noisy_logprobs
from teachers.noise import expected_noise, mean_tolerance
from tests.support.real_model import EXAMPLE

DTYPES = ("float32", "bfloat16")
NUM_SEQUENCES, NUM_LAYERS = 4, 30


@pytest.fixture(scope="module")
def sequences(real_model: Path) -> list[TokenSequence]:
    """Real questions as chats, with their references as answers."""
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    lines = (EXAMPLE / "prompts/gsm8k_holdout.jsonl").read_text().splitlines()
    found = []
    for number, row in enumerate(map(json.loads, lines[:NUM_SEQUENCES])):
        text = tokenizer.apply_chat_template(
            row["messages"], tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["reference"], add_special_tokens=False)["input_ids"]
        ids = np.array([*prompt, *answer, tokenizer.eos_token_id], np.int32)
        span = (len(prompt), len(ids))
        found.append(TokenSequence(str(number), ids, (span,), "p", "gsm8k", ("dataset",), "stop"))
    return found


@pytest.fixture(scope="module")
def exact(real_model: Path, sequences: list[TokenSequence]) -> np.ndarray:
    """Log-probabilities of all answers in float32."""
    return flat(gold_logprobs(load(real_model, "float32"), sequences))


def load(folder: Path, dtype: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def flat(logprobs: dict[str, list[float]]) -> np.ndarray:
    return np.concatenate([np.asarray(values) for values in logprobs.values()])


@torch.no_grad()
def packed_logprobs(model: Any, sequences: list[TokenSequence]) -> dict[str, list[float]]:
    """As a training computes them: all sequences in one packed row."""
    texts = [torch.from_numpy(s.input_ids.astype(np.int64)) for s in sequences]
    places = torch.cat([torch.arange(len(ids)) for ids in texts])[None]
    hidden_TH = body_hidden_states(model, torch.cat(texts)[None], places)
    found = {}
    parts = hidden_TH.split([len(ids) for ids in texts])
    for sequence, ids, part in zip(sequences, texts, parts, strict=True):
        where = torch.tensor(sequence.position_indices)
        logprobs_PV = model.lm_head(part[where - 1]).float().log_softmax(-1)
        found[sequence.sequence_id] = logprobs_PV.gather(1, ids[where, None])[:, 0].tolist()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_proof_of_an_export_holds_and_sees_a_halved_layer(
    real_model: Path, sequences: list[TokenSequence], dtype: str
) -> None:
    model = load(real_model, dtype)
    noisy, trained = noisy_logprobs(model, sequences), packed_logprobs(model, sequences)
    agreement = noisy.agreement(trained)
    assert agreement.holds, str(agreement)
    assert agreement.tokens == sum(sequence.num_positions for sequence in sequences)
    with torch.no_grad():
        model.model.layers[12].mlp.down_proj.weight.mul_(0.5)
    assert not noisy.agreement(packed_logprobs(model, sequences)).holds


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_expected_noise_of_an_engine_covers_another_computation(
    real_model: Path, sequences: list[TokenSequence], exact: np.ndarray, dtype: str
) -> None:
    model, engine = load(real_model, dtype), {"dtype": dtype, "num_layers": NUM_LAYERS}
    other = flat(packed_logprobs(model, sequences))
    assert np.abs(other - exact).mean() <= expected_noise(engine, exact)
    with torch.no_grad():
        for parameter in model.model.layers[12].parameters():
            parameter.mul_(0.5)
    halved = flat(gold_logprobs(model, sequences))
    assert np.abs(halved - exact).mean() > mean_tolerance(engine, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_real_student_passes_the_check_before_training(real_model: Path, dtype: str) -> None:
    model = load(real_model, dtype)
    for packing in (True, False):
        check_architecture(model, packing)
