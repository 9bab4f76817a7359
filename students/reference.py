"""Log-probabilities of an exported model by transformers alone, a sequence at a time, and their
noise, within which any other computation must reproduce them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import AutoConfig, PreTrainedModel

from pipeline.records import TokenSequence
from pipeline.report.rounding import NoisyLogprobs

POSITIONS_AT_ONCE = 512
"""Positions whose logits are cast to float32 together: with 152,000 ids they take 300 MiB."""
PERTURBATIONS = 3
"""Computations from which the noise is measured."""
TF32 = 2.0**-10
"""Step from 1 to the next number of TF32, to which kernels for GPUs and of engines may round."""


def vocabulary_size(folder: str, trust_remote_code: bool) -> int:
    """Rows of an exported folder's LM head."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return config.get_text_config().vocab_size


def noisy_logprobs(
    model: PreTrainedModel, sequences: Sequence[TokenSequence], coarse: bool = False
) -> NoisyLogprobs:
    """The log-probabilities of `gold_logprobs`, and those from perturbed inputs.

    Args:
        coarse: whether this computation or the one that it is compared with may round float32 to
            TF32, as kernels for GPUs and of engines do.
    """
    (values, terms), perturbed = _gold_logprobs(model, sequences), []
    step = torch.finfo(model.dtype).eps
    for seed in range(PERTURBATIONS):
        with perturbed_inputs(model, seed, max(step, TF32) if coarse else step):
            perturbed.append(gold_logprobs(model, sequences))
    return NoisyLogprobs(values, perturbed, terms)


@contextmanager
def perturbed_inputs(model: PreTrainedModel, seed: int, step: float) -> Iterator[None]:
    """Perturbs the embeddings of all tokens at random, each number by a share of at most `step`."""
    generator = torch.Generator().manual_seed(seed)

    def perturb(_module: torch.nn.Module, _arguments: object, states: torch.Tensor) -> torch.Tensor:
        share = 2 * torch.rand(states.shape, generator=generator, dtype=torch.float64) - 1
        factor = 1 + step * share
        return (states.double() * factor.to(states.device)).to(states.dtype)

    hook = model.get_input_embeddings().register_forward_hook(perturb)
    try:
        yield
    finally:
        hook.remove()


def gold_logprobs(
    model: PreTrainedModel, sequences: Sequence[TokenSequence]
) -> dict[str, list[float]]:
    """Log-probabilities, in nats, of the tokens at every position of each sequence, by its id."""
    return _gold_logprobs(model, sequences)[0]


@torch.no_grad()
def _gold_logprobs(
    model: PreTrainedModel, sequences: Sequence[TokenSequence]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Log-probabilities of the tokens at every position of each sequence, by its id; and the size
    of the numbers whose differences they are: the token's logit and the log-sum-exp.
    """
    logprobs: dict[str, list[float]] = {}
    terms: dict[str, list[float]] = {}
    for sequence in sequences:
        ids = torch.tensor(sequence.input_ids[None], dtype=torch.int64, device=model.device)
        logits_TV = model(input_ids=ids, use_cache=False).logits[0]
        positions = torch.tensor(sequence.position_indices, device=model.device)
        name = sequence.sequence_id
        logprobs[name], terms[name] = [], []
        for part in positions.split(POSITIONS_AT_ONCE):
            logits_PV, gold_P1 = logits_TV[part - 1].float(), ids[0, part][:, None]
            logit_P = logits_PV.gather(1, gold_P1)[:, 0]
            logprob_P = torch.log_softmax(logits_PV, dim=-1).gather(1, gold_P1)[:, 0]
            logprobs[name] += logprob_P.tolist()
            terms[name] += torch.maximum(logit_P.abs(), (logit_P - logprob_P).abs()).tolist()
    return logprobs, terms
