"""Cost that distillation adds to a training step: forward, loss, backward and update of a student
under DeepSpeed, against the same with cross-entropy alone.

    python benchmarks/train.py [--quick] [--json PATH]

Students, targets and texts are made up: packed rows of 512-token sequences, 50 kept ids per
position and teacher. The steps are those of the real training code, in one process, in alternating
rounds. The benchmark runs unchanged on a GPU, with a larger student in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine, made_up_spec, print_table, write_json

CUDA = torch.cuda.is_available()
SEQUENCE, PROMPT, ENTRIES = 512, 64, 50
RATE = 1e-4


@dataclass(frozen=True)
class Size:
    """A student, and the tokens of a step."""

    hidden: int
    layers: int
    vocabulary: int
    sequences: int
    rounds: int


QUICK = Size(hidden=64, layers=2, vocabulary=4_096, sequences=2, rounds=3)
FULL = (
    Size(hidden=1_024, layers=24, vocabulary=151_936, sequences=32, rounds=20)
    if CUDA
    else Size(hidden=256, layers=6, vocabulary=32_768, sequences=4, rounds=7)
)
METHODS: dict[str, tuple[list[dict[str, Any]], int]] = {
    "cross_entropy": ([{"type": "cross_entropy", "weight": 1.0}], 0),
    "forward_kl": ([{"type": "forward_kl", "weight": 1.0}], 1),
    "forward_kl_2_teachers": ([{"type": "forward_kl", "weight": 1.0}], 2),
    "forward_kl_and_cross_entropy_2_teachers": (
        [{"type": "forward_kl", "weight": 0.8}, {"type": "cross_entropy", "weight": 0.2}],
        2,
    ),
}
"""Losses, and number of teachers."""


def initialise_process_group(folder: Path) -> None:
    """Makes the process group of one rank, which DeepSpeed takes over."""
    if not CUDA:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # ninja
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))
    backend = "nccl" if CUDA else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/group", rank=0, world_size=1)


class Training:
    """A student with its losses, and a step that it takes again and again."""

    def __init__(self, size: Size, losses: list[dict[str, Any]], num_teachers: int) -> None:
        from students.data.batches import StepBatch
        from students.data.packing import pack
        from students.deepspeed_engine import DeepSpeedStudent
        from students.micro_batch import MicroBatch
        from students.model import StudentModule
        from students.trainer import distribution_losses

        dtype = "bfloat16" if CUDA else "float32"
        spec = made_up_spec(
            Path("made-up"),
            [f"t{m}" for m in range(max(1, num_teachers))],
            "made-up",
            {"dtype": dtype},
            losses=losses,
            steps=10_000,
            sequences_per_step=size.sequences,
            tokens_per_micro_batch=size.sequences * SEQUENCE,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(
                vocab_size=size.vocabulary,
                hidden_size=size.hidden,
                intermediate_size=4 * size.hidden,
                num_hidden_layers=size.layers,
                num_attention_heads=size.hidden // 64,
                num_key_value_heads=size.hidden // 64,
                max_position_embeddings=SEQUENCE,
                tie_word_embeddings=True,
            ),
            dtype=getattr(torch, dtype),
        )
        module = StudentModule(model, distribution_losses(spec))
        self.student = DeepSpeedStudent(module, spec)
        generator = np.random.default_rng(0)
        examples = [make_example(generator, size, num_teachers) for _ in range(size.sequences)]
        batch = MicroBatch.of(pack(examples), self.student.device)
        positions = sum(len(example.gold_ids) for example in examples)
        self.batch = StepBatch(0, [batch], positions, size.sequences * SEQUENCE)

    def seconds_of_a_step(self) -> float:
        from students.trainer import train_step

        synchronise()
        started = time.perf_counter()
        train_step(self.student, self.batch, RATE)
        synchronise()
        return time.perf_counter() - started


def make_example(generator: np.random.Generator, size: Size, num_teachers: int) -> Any:
    """A sequence with targets of any number of teachers."""
    from students.data.examples import Example

    positions = SEQUENCE - PROMPT
    shape = (num_teachers, positions, ENTRIES)
    ids = generator.integers(0, size.vocabulary, SEQUENCE).astype(np.int32)
    logits = np.sort(generator.normal(0, 2, shape), axis=-1)[..., ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True)) - 0.05
    first = generator.integers(0, size.vocabulary, (num_teachers, positions, 1))
    return Example(
        input_ids=ids,
        logit_indices=np.arange(PROMPT - 1, SEQUENCE - 1),
        gold_ids=ids[PROMPT:].astype(np.int64),
        token_ids=((first + np.arange(ENTRIES)) % size.vocabulary).astype(np.int32),
        logprobs=logprobs.astype(np.float16),
        tail_mass=np.full(shape[:2], 1 - np.exp(-0.05), np.float16),
        teacher_weights=np.full(shape[:2], 1 / max(1, num_teachers), np.float32),
    )


def synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()


def measure(size: Size) -> list[dict[str, Any]]:
    """Rows of all methods, measured in alternating rounds whose order turns; the first two rounds
    are dropped.
    """
    trainings = {name: Training(size, *method) for name, method in METHODS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for turn in range(size.rounds + 2):
        for name in list(trainings) if turn % 2 else reversed(trainings):
            taken = trainings[name].seconds_of_a_step()
            if turn > 1:
                seconds[name].append(taken)
    tokens = size.sequences * SEQUENCE
    return [
        {
            "losses": name,
            "teachers": METHODS[name][1],
            "tokens_per_second": tokens / statistics.median(rounds),
            "lowest": tokens / max(rounds),
            "highest": tokens / min(rounds),
            "over_cross_entropy": ratio(seconds["cross_entropy"], rounds),
            "seconds": rounds,
        }
        for name, rounds in seconds.items()
    ]


def ratio(of_cross_entropy: list[float], seconds: list[float]) -> float:
    """Ratio of tokens per second: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(of_cross_entropy, seconds, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny student")
    parser.add_argument("--json", type=Path, help="where the result is written")
    options = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    size = QUICK if options.quick else FULL
    print(f"{size}, {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        initialise_process_group(Path(folder))
        rows = measure(size)
        dist.destroy_process_group()
    print_table([{k: v for k, v in row.items() if k != "seconds"} for row in rows])
    over_cross_entropy = {row["losses"]: row["over_cross_entropy"] for row in rows}
    ratios = {"kd_over_ce_tokens_per_second": over_cross_entropy["forward_kl"]}
    for name, value in ratios.items():
        print(f"{name}: {value:.3f}")
    if options.json:
        write_json(options.json, rows, ratios)


if __name__ == "__main__":
    main()
