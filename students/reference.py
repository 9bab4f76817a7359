"""Log-probabilities of an exported folder by transformers alone, a sequence at a time: any other
computation of the same numbers must reproduce them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from pipeline.records import TokenSequence
from students.architecture.build import load_model

POSITIONS_AT_ONCE = 512
"""Positions whose logits are cast to float32 together: with 152,000 ids they take 300 MiB."""


def vocabulary_size(folder: str, trust_remote_code: bool) -> int:
    """Rows of an exported folder's LM head."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return config.get_text_config().vocab_size


@torch.no_grad()
def gold_logprobs(
    folder: str | Path, sequences: Sequence[TokenSequence], trust_remote_code: bool, device: str
) -> dict[str, list[float]]:
    """Log-probabilities, in nats, of the tokens at every position of each sequence, by its id."""
    model = load_model(folder, trust_remote_code, device)
    logprobs = {}
    for sequence in sequences:
        ids = torch.tensor(sequence.input_ids[None], dtype=torch.int64, device=device)
        logits_TV = model(input_ids=ids, use_cache=False).logits[0]
        positions = torch.tensor(sequence.position_indices, device=device)
        logprobs[sequence.sequence_id] = [
            logprob
            for part in positions.split(POSITIONS_AT_ONCE)
            for logprob in _gold(logits_TV[part - 1], ids[0, part]).tolist()
        ]
    return logprobs


def _gold(logits_PV: torch.Tensor, gold_P: torch.Tensor) -> torch.Tensor:
    """float32[P]: log-probability of each gold id."""
    return torch.log_softmax(logits_PV.float(), dim=-1).gather(1, gold_P[:, None])[:, 0]
