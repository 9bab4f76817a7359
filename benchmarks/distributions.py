"""Dense next-token distributions for `benchmarks/cache.py`: of a real model, and made up.

The real teacher is a small Llama with a tokenizer of its own, trained by the clock on DATA's
`train.jsonl`; the student is a smaller one, trained shorter. Their folder is named by the digest of
what made them, so that a second run finds them. The sequences are those of `test.jsonl`; as in a
cache, the positions are those of their answers.

Legend: P positions, H hidden size, V vocabulary, K captured entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from examples.gsm8k import make_teachers as gsm8k
from pipeline.fingerprint import digest_bytes
from pipeline.records import TokenSequence
from students.architecture.body import body_hidden_states
from students.architecture.build import load_model
from students.architecture.head import lm_head_of

VOCABULARY = 4096
CAPTURED = 4096
"""Entries of a position. A model of minutes is flat: 256 of them hold 87 % of its probability,
where those of a grown one hold nearly all. Of the real model this is the whole vocabulary.
"""
TOKENS = 1024
"""Of one gradient."""


@dataclass(frozen=True)
class Captured:
    """A sequence and what a teacher's engine would return for it."""

    sequence: TokenSequence
    token_ids_PK: np.ndarray
    logprobs_PK: np.ndarray
    gold_logprobs_P: np.ndarray


@dataclass(frozen=True)
class Batch:
    """`TOKENS` positions: the student's graph up to the LM head, and the teacher in full.

    Attributes:
        captured: whole sequences; the first `TOKENS` of their positions count.
        dense_logprobs_PV: the teacher's, float32.
        parameters: what gradients are taken of.
    """

    captured: list[Captured]
    dense_logprobs_PV: Tensor
    hidden_PH: Tensor
    head_VH: Tensor
    parameters: list[Tensor]


def train_models(data: Path, output: Path, seconds: float) -> Path:
    """The folder with `teacher` and `student`; trains them where it does not exist.

    Args:
        seconds: training time of the teacher; the student gets a fifth.
    """
    sources = [Path(__file__), Path(gsm8k.__file__), data / "train.jsonl"]
    settings = f"{VOCABULARY} {seconds}".encode()
    digest = digest_bytes(*(path.read_bytes() for path in sources), settings)
    folder = output / f"cache-models-{digest[:12]}"
    if (folder / "student" / "config.json").exists():
        return folder
    rows = gsm8k.read_rows(data / "train.jsonl")
    tokenizer = gsm8k.build_tokenizer((row.text for row in rows), VOCABULARY)
    sequences = gsm8k.encode(tokenizer, rows)
    configs = {
        "teacher": gsm8k.llama_config(tokenizer, hidden=160, intermediate=448, layers=4),
        "student": gsm8k.student_config(tokenizer),
    }
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        budget = seconds if name == "teacher" else seconds / 5
        steps = gsm8k.train(model, sequences, budget, learning_rate=2e-3, seed=seed)
        print(f"{name}: {model.num_parameters():,} parameters, {steps} steps in {budget:.0f} s")
        tokenizer.save_pretrained(folder / name)
        model.save_pretrained(folder / name)
    return folder


def real_text(
    models: Path, data: Path, max_positions: int | None = None, width: int = CAPTURED
) -> Iterator[Captured]:
    """The teacher's captured distributions over the answers of `test.jsonl`, in their order."""
    teacher = load_model(models / "teacher", False, "cpu")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models / "teacher")
    num_positions = 0
    rows = gsm8k.encode(tokenizer, gsm8k.read_rows(data / "test.jsonl"))
    for number, (ids, start) in enumerate(rows):
        sequence = _sequence(f"test-{number}", np.array(ids, np.int32), start)
        yield _capture(sequence, _teacher_logprobs(teacher, sequence), width)
        num_positions += sequence.num_positions
        if max_positions is not None and num_positions >= max_positions:
            return


def real_batches(models: Path, data: Path, count: int) -> Iterator[Batch]:
    """Batches of different sequences, as many as the text gives, at most `count`."""
    teacher, student = (load_model(models / n, False, "cpu") for n in ("teacher", "student"))
    remaining = real_text(models, data)
    for _ in range(count):
        members: list[Captured] = []
        while sum(member.sequence.num_positions for member in members) < TOKENS:
            if (following := next(remaining, None)) is None:
                return
            members.append(following)
        sequences = [member.sequence for member in members]
        dense = torch.cat([_teacher_logprobs(teacher, sequence) for sequence in sequences])
        yield Batch(
            members,
            dense[:TOKENS],
            _student_hidden(student, sequences)[:TOKENS],
            lm_head_of(student).weight,
            list(student.parameters()),
        )


def synthetic_batches(count: int, vocabulary: int) -> Iterator[Batch]:
    """Distributions as flat and as steep as text gives, over a large vocabulary.

    Zipf's law, shifted by a random model of few dimensions, at a temperature that differs from
    position to position; the student knows the law and half of the shift.
    """
    hidden_size = 32
    generator = torch.Generator().manual_seed(0)
    law_V = -torch.log(torch.arange(1, vocabulary + 1).float())
    law_V = law_V[torch.randperm(vocabulary, generator=generator)]
    head_VH = torch.randn(vocabulary, hidden_size, generator=generator) / hidden_size**0.5
    head_VH = torch.cat([head_VH, law_V[:, None]], dim=1)
    for number in range(count):
        hidden_PH = torch.randn(TOKENS, hidden_size, generator=generator) * 2.5
        steepness_P1 = 0.7 + 1.5 * torch.rand(TOKENS, 1, generator=generator)
        teacher_PH = torch.cat([hidden_PH * steepness_P1, steepness_P1], dim=1)
        dense_PV = torch.log_softmax(teacher_PH @ head_VH.T, dim=-1)
        gold_P = torch.multinomial(dense_PV.exp(), 1, generator=generator).squeeze(1)
        first = torch.zeros(1, dtype=gold_P.dtype)
        input_ids = torch.cat([first, gold_P]).numpy().astype(np.int32)
        sequence = _sequence(f"synthetic-{number}", input_ids, start=1)
        student_PH = torch.cat([hidden_PH / 2, torch.ones(TOKENS, 1)], dim=1).requires_grad_()
        student_VH = head_VH.clone().requires_grad_()
        yield Batch(
            [_capture(sequence, dense_PV)],
            dense_PV,
            student_PH,
            student_VH,
            [student_PH, student_VH],
        )


def _sequence(name: str, input_ids: np.ndarray, start: int) -> TokenSequence:
    spans = ((start, len(input_ids)),)
    return TokenSequence(name, input_ids, spans, name, "text", ("dataset",), "dataset")


@torch.no_grad()
def _teacher_logprobs(model: PreTrainedModel, sequence: TokenSequence) -> Tensor:
    ids = torch.from_numpy(sequence.input_ids[None].astype(np.int64))
    logits_TV = model(input_ids=ids, use_cache=False).logits[0]
    return torch.log_softmax(logits_TV[sequence.position_indices - 1].float(), -1)


def _student_hidden(model: PreTrainedModel, sequences: list[TokenSequence]) -> Tensor:
    input_ids = np.concatenate([sequence.input_ids for sequence in sequences]).astype(np.int64)
    places = [np.arange(len(sequence.input_ids)) for sequence in sequences]
    hidden_TH = body_hidden_states(
        model,
        torch.from_numpy(input_ids)[None],
        torch.from_numpy(np.concatenate(places))[None],
    )
    starts = np.cumsum([0] + [len(sequence.input_ids) for sequence in sequences])
    indices = [s.position_indices - 1 + start for s, start in zip(sequences, starts, strict=False)]
    return hidden_TH[torch.from_numpy(np.concatenate(indices))]


def _capture(sequence: TokenSequence, dense_PV: Tensor, width: int = CAPTURED) -> Captured:
    logprobs_PK, token_ids_PK = dense_PV.topk(min(width, dense_PV.shape[1]), dim=-1)
    gold_P1 = torch.from_numpy(sequence.gold_ids.astype(np.int64))[:, None]
    return Captured(
        sequence,
        token_ids_PK.numpy().astype(np.int32),
        logprobs_PK.numpy(),
        dense_PV.gather(1, gold_P1).squeeze(1).numpy(),
    )
