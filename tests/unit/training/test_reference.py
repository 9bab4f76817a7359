"""Log-probabilities by transformers alone: their values, and how many are formed at once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.records import TokenSequence
from students import reference
from students.architecture.build import load_model
from tests.support.tiny_models import save_tiny_llama

VOCABULARY = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("model"), VOCABULARY)


def test_only_positions_are_normalised_and_few_at_once(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.arange(11, dtype=np.int32)
    sequence = TokenSequence("s", ids, ((4, 7), (9, 11)), "p", "words", ("t",), "stop")
    shapes, log_softmax = [], torch.log_softmax

    def counted(values: torch.Tensor, dim: int) -> torch.Tensor:
        shapes.append(tuple(values.shape))
        return log_softmax(values, dim)

    monkeypatch.setattr(reference, "POSITIONS_AT_ONCE", 2)
    monkeypatch.setattr(torch, "log_softmax", counted)
    found = reference.gold_logprobs(load_model(model), [sequence])["s"]
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(model)(torch.arange(11)[None]).logits[0].double()
    expected = [(logits[i - 1, i] - logits[i - 1].logsumexp(0)).item() for i in (4, 5, 6, 9, 10)]
    assert found == pytest.approx(expected, abs=1e-5)  # float32 of logits near 1
    assert shapes == [(2, VOCABULARY), (2, VOCABULARY), (1, VOCABULARY)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_are_perturbed_in_their_last_place_and_only_for_the_measurement(
    model: Path, dtype: torch.dtype
) -> None:
    loaded: Any = load_model(model)
    loaded.to(dtype)
    ids = torch.arange(VOCABULARY)[None]
    own = loaded.model.embed_tokens(ids).detach()
    draws = []
    for seed in (0, 0, 1):
        with reference.perturbed_inputs(loaded, seed, torch.finfo(dtype).eps):
            draws.append(loaded.model.embed_tokens(ids).detach())
    step = (draws[0].double() - own.double()).abs() / own.double().abs()
    assert 0.1 < float((step > 0).double().mean()) < 0.9
    # at most eps, and then rounded
    assert float(step.max()) <= 1.5 * torch.finfo(dtype).eps
    assert draws[0].dtype == dtype
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(loaded.model.embed_tokens(ids), own)


def test_the_noise_is_measured_with_several_perturbations(model: Path) -> None:
    ids = np.arange(11, dtype=np.int32)
    sequence = TokenSequence("s", ids, ((4, 7), (9, 11)), "p", "words", ("t",), "stop")
    noisy = reference.noisy_logprobs(load_model(model), [sequence])
    assert noisy.values == reference.gold_logprobs(load_model(model), [sequence])
    assert len(noisy.perturbed) == 3
    logits_TV = load_model(model)(torch.tensor(ids[None], dtype=torch.int64)).logits[0]
    gold_P = ids[[4, 5, 6, 9, 10]]
    largest_P = torch.maximum(
        logits_TV[[3, 4, 5, 8, 9], gold_P].abs(), logits_TV[[3, 4, 5, 8, 9]].logsumexp(1).abs()
    )
    assert noisy.terms is not None and noisy.terms["s"] == pytest.approx(largest_P.tolist())
    assert len({tuple(perturbed["s"]) for perturbed in noisy.perturbed}) > 1
    assert noisy.agreement(noisy.values).mean_difference == 0
    coarse = reference.noisy_logprobs(load_model(model), [sequence], coarse=True)
    assert coarse.agreement(noisy.values).noise > 100 * noisy.agreement(noisy.values).noise
