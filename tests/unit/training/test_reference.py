"""Log-probabilities by transformers alone: their values, and how many are formed at once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from pipeline.records import TokenSequence
from students import reference
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
    found = reference.gold_logprobs(model, [sequence], False, "cpu")["s"]
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(model)(torch.arange(11)[None]).logits[0].double()
    expected = [(logits[i - 1, i] - logits[i - 1].logsumexp(0)).item() for i in (4, 5, 6, 9, 10)]
    assert found == pytest.approx(expected, abs=1e-5)  # float32 of logits near 1
    assert shapes == [(2, VOCABULARY), (2, VOCABULARY), (1, VOCABULARY)]
