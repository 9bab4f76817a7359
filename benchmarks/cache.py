"""Size, speed and fidelity of the logit cache, for each selection.

    python benchmarks/cache.py DATA [--quick] [--json PATH] [--output FOLDER] [--seconds N]

DATA is a folder with GSM8K's `train.jsonl` and `test.jsonl`.

- *Fidelity*: the gradient of exactly 1,024 tokens with what a selection keeps, against the one with
  the teacher's dense distributions: angle and ratio of norms, means over batches and draws. `bias`
  is the angle between the mean gradients of all batches and draws: the noise of an unbiased
  selection falls with the number of tokens, its bias does not.
- *Size*: bytes per token of a shard, with ids, counts, figures per position, and all of Parquet.
- *Speed*: tokens per second to write a shard and to read it to numpy, in one process, against the
  same content in nested lists (`benchmarks/nested_lists.py`), in alternating rounds. The ratio
  `read_over_nested` is to reading them row by row, as loaders over rows of a table do;
  `read_over_flattened` to flattening whole columns, the best that can be done with them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import print_table, write_json
from benchmarks.distributions import (
    CAPTURED,
    TOKENS,
    Batch,
    Captured,
    real_batches,
    real_text,
    synthetic_batches,
    train_models,
)
from benchmarks.nested_lists import read_by_rows, read_flattened, write_nested
from pipeline.cache.selection import select
from pipeline.cache.shard import read_shard, write_shard
from pipeline.config.scoring import HeadAndSampled, Sampled, Selection, TopK, TopP
from pipeline.records import CombinedTargets, SparseLogprobs
from students.data.examples import example_of
from students.data.packing import pack
from students.losses.distillation import distillation_loss
from students.losses.divergences import ForwardKL
from students.losses.inputs import Targets
from students.micro_batch import MicroBatch

REFERENCE = "top_k 50"
TIMED = "top_p 0.99, 64"
NESTED, FLATTENED = "nested lists", "nested lists, flattened"
BYTES_TO_REACH = 20
FEWEST_DRAWS = 8
FORWARD_KL = (ForwardKL(name="forward_kl", weight=1.0),)


def _top_k(most: int) -> TopK:
    return TopK(type="top_k", max_entries=most)


def _top_p(mass: float) -> TopP:
    return TopP(type="top_p", mass=mass, max_entries=64)


def _sampled(draws: int, renormalise: bool = False) -> Sampled:
    return Sampled(type="sampled", num_draws=draws, renormalise=renormalise)


def _headed(mass: float, most: int, draws: int) -> HeadAndSampled:
    return HeadAndSampled(
        type="head_and_sampled", head_mass=mass, max_head_entries=most, num_draws=draws
    )


SELECTIONS: dict[str, Selection] = {
    "top_k 12": _top_k(12),
    REFERENCE: _top_k(50),
    "top_p 0.9, 64": _top_p(0.9),
    TIMED: _top_p(0.99),
    "sampled 8": _sampled(8),
    "sampled 12": _sampled(12),
    "sampled 16": _sampled(16),
    "sampled 25": _sampled(25),
    "head 1 + 8 draws": _headed(1.0, 1, 8),
    "head 1 + 12 draws": _headed(1.0, 1, 12),
    "head 4 + 12 draws": _headed(1.0, 4, 12),
    "head 0.5 + 16 draws": _headed(0.5, 64, 16),
    "head 0.8 + 16 draws": _headed(0.8, 64, 16),
    "sampled 12 of 256": _sampled(12),
    "sampled 12 of 256, renormalised": _sampled(12, renormalise=True),
}
NARROW = {name: 256 for name in SELECTIONS if "of 256" in name}
"""Entries that are captured where it is fewer than all: what lies beyond is lost to draws."""
ON_SYNTHETIC = (REFERENCE, TIMED, "sampled 12", *NARROW, "head 0.5 + 16 draws")


READERS: dict[str, Callable[[str], list[SparseLogprobs]]] = {
    "cache": read_shard,
    NESTED: read_by_rows,
    FLATTENED: read_flattened,
}


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    seconds: float = 300.0
    positions: int = 280_000
    batches: int = 24
    draws: int = 6
    synthetic_batches: int = 20
    synthetic_vocabulary: int = 151_936
    rounds: int = 7


QUICK = Scale(seconds=60.0, positions=30_000, batches=4, draws=2, synthetic_batches=1, rounds=3)


@dataclass
class Directions:
    """Gradients of one selection beside those of the dense distributions."""

    angles: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    total: Tensor | float = 0.0

    def add(self, found: Tensor, dense: Tensor) -> None:
        self.angles.append(angle(found, dense))
        self.norms.append(float(found.norm() / dense.norm()))
        self.total = self.total + found


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees between two vectors, exact for small angles too."""
    a, b = a.double() / a.double().norm(), b.double() / b.double().norm()
    return math.degrees(2 * math.atan2(float((a - b).norm()), float((a + b).norm())))


def fidelity(
    batches: Iterable[Batch], names: Iterable[str], num_draws: int
) -> tuple[dict[str, dict[str, float]], list[tuple[Captured, ...]]]:
    """By selection `angle`, `norm` and `bias`; and the captured sequences of each batch."""
    found = {name: Directions() for name in names}
    dense_total, seen = None, []
    for batch in batches:
        dense = _dense_gradient(batch)
        dense_total = dense if dense_total is None else dense_total + dense
        seen.append(tuple(batch.captured))
        for name, directions in found.items():
            rule = SELECTIONS[name]
            repeats = num_draws if isinstance(rule, Sampled | HeadAndSampled) else 1
            for repeat in range(repeats):
                gradient = _gradient(batch, _targets(batch.captured, name, f"teacher-{repeat}"))
                directions.add(gradient, dense)
    assert dense_total is not None
    figures = {
        name: {
            "angle": statistics.mean(directions.angles),
            "norm": statistics.mean(directions.norms),
            "bias": angle(torch.as_tensor(directions.total), dense_total),
        }
        for name, directions in found.items()
    }
    return figures, seen


def _dense_gradient(batch: Batch) -> Tensor:
    """By autograd through torch's own `kl_div`, a few positions at a time."""
    total: Tensor | None = None
    for rows in torch.arange(TOKENS).split(256):
        logits = batch.hidden_PH[rows] @ batch.head_VH.T
        loss = torch.nn.functional.kl_div(
            torch.log_softmax(logits.float(), -1),
            batch.dense_logprobs_PV[rows],
            log_target=True,
            reduction="sum",
        )
        part = _flat(torch.autograd.grad(loss, batch.parameters, retain_graph=True))
        total = part if total is None else total + part
    assert total is not None
    return total


def _gradient(batch: Batch, targets: Targets) -> Tensor:
    loss = distillation_loss(batch.hidden_PH, batch.head_VH, None, targets, FORWARD_KL)
    return _flat(torch.autograd.grad(loss.total, batch.parameters, retain_graph=True))


def _flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _targets(captured: Iterable[Captured], name: str, teacher: str) -> Targets:
    """Through the steps of training, cut to `TOKENS` positions."""
    examples = [
        example_of(
            CombinedTargets(
                one.sequence,
                (_row(one, name, teacher),),
                np.ones((1, one.sequence.num_positions), np.float32),
            )
        )
        for one in captured
    ]
    whole = MicroBatch.of(pack(examples)).targets
    return replace(
        whole,
        gold_ids=whole.gold_ids[:TOKENS],
        token_ids=whole.token_ids[:, :TOKENS],
        logprobs=whole.logprobs[:, :TOKENS],
        tail_mass=whole.tail_mass[:, :TOKENS],
        teacher_weights=whole.teacher_weights[:, :TOKENS],
    )


def _row(one: Captured, name: str, teacher: str) -> SparseLogprobs:
    width = NARROW.get(name, CAPTURED)
    return select(
        one.sequence.sequence_id,
        one.token_ids_PK[:, :width],
        one.logprobs_PK[:, :width],
        one.gold_logprobs_P,
        SELECTIONS[name],
        teacher=teacher,
    )


def size_and_fidelity(
    text: str,
    captured: list[Captured],
    figures: dict[str, dict[str, float]],
    folder: Path,
) -> list[dict[str, Any]]:
    """One row per selection, with the bytes of a shard of all `captured` sequences."""
    rows = []
    for name, found in figures.items():
        shard = [_row(one, name, "teacher") for one in captured]
        entry = write_shard(str(folder / "shard.parquet"), shard, "benchmark")
        rows.append(
            {
                "selection": name,
                "text": text,
                "angle_degrees": found["angle"],
                "bias_degrees": found["bias"],
                "norm_ratio": found["norm"],
                "entries": entry.figures.num_entries / entry.num_positions,
                "bytes_per_token": entry.num_bytes / entry.num_positions,
                "kept_mass": entry.figures.kept_mass,
                "tokens": entry.num_positions,
            }
        )
    return rows


def speed(captured: list[Captured], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Tokens per second of both formats, medians of alternating rounds with their spread."""
    rows = [_row(one, TIMED, "teacher") for one in captured]
    num_positions = sum(row.num_positions for row in rows)
    ours, nested = str(folder / "shard.parquet"), str(folder / "nested.parquet")
    paths = {"cache": ours, NESTED: nested, FLATTENED: nested}
    actions: dict[tuple[str, str], Callable[[], Any]] = {
        ("cache", "write"): partial(write_shard, ours, rows, "benchmark"),
        (NESTED, "write"): partial(write_nested, nested, rows),
        **{(form, "read"): partial(read, paths[form]) for form, read in READERS.items()},
    }
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in actions}
    for _ in range(rounds):
        for key, action in actions.items():
            started = time.perf_counter()
            action()
            rates[key].append(num_positions / (time.perf_counter() - started))
    for form, read in READERS.items():
        _assert_equal(rows, read(paths[form]))
    return [
        {
            "format": form,
            "what": what,
            "selection": TIMED,
            "tokens_per_second": statistics.median(found),
            "slowest": min(found),
            "fastest": max(found),
            "bytes_per_token": Path(paths[form]).stat().st_size / num_positions,
            "tokens": num_positions,
        }
        for (form, what), found in rates.items()
    ]


def _assert_equal(ours: list[SparseLogprobs], others: list[SparseLogprobs]) -> None:
    for a, b in zip(ours, others, strict=True):
        for name in ("num_entries", "token_ids", "logprobs", "gold_logprobs", "tail_mass"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def best_small(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The smallest selection within the bytes that is no worse than top-50 in angle and bias."""
    (reference,) = [row for row in rows if row["selection"] == REFERENCE]
    passing = [
        row
        for row in rows
        if row["angle_degrees"] <= reference["angle_degrees"]
        and row["bias_degrees"] <= reference["bias_degrees"]
        and row["bytes_per_token"] <= BYTES_TO_REACH
        and _num_draws(row["selection"]) >= FEWEST_DRAWS
    ]
    return min(passing, key=lambda row: row["bytes_per_token"], default=None)


def _num_draws(name: str) -> float:
    rule = SELECTIONS[name]
    return rule.num_draws if isinstance(rule, Sampled | HeadAndSampled) else math.inf


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure size, speed and fidelity of the logit cache."
    )
    parser.add_argument("data", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--quick", action="store_true", help="less of everything: minutes")
    parser.add_argument("--json", type=Path, help="also write machine, rows and ratios here")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/benchmarks"),
        help="folder that keeps the trained models (default: %(default)s)",
    )
    parser.add_argument("--seconds", type=float, help="training time of the teacher")
    return parser.parse_args()


def measure(data: Path, output: Path, scale: Scale) -> tuple[list[dict], dict[str, float | None]]:
    """Prints a table for speed and for each kind of text; returns all rows, and the ratios."""
    models = train_models(data, output, scale.seconds)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = list(real_text(models, data, scale.positions, width=64))
        times = speed(text, scale.rounds, folder)
        print_table(times)
        batches = real_batches(models, data, scale.batches)
        figures, seen = fidelity(batches, SELECTIONS, scale.draws)
        captured = [one for members in seen for one in members]
        real = size_and_fidelity("GSM8K", captured, figures, folder)
        print_table(real)
        batches = synthetic_batches(scale.synthetic_batches, scale.synthetic_vocabulary)
        figures, seen = fidelity(batches, ON_SYNTHETIC, num_draws=1)
        made_up = [one for members in seen for one in members]
        kind = f"synthetic, V = {scale.synthetic_vocabulary:,}"
        synthetic = size_and_fidelity(kind, made_up, figures, folder)
        print_table(synthetic)
    small = best_small(real)
    read = {row["format"]: row["tokens_per_second"] for row in times if row["what"] == "read"}
    ratios = {
        "bytes_per_token": small and small["bytes_per_token"],
        "read_over_nested": read["cache"] / read[NESTED],
        "read_over_flattened": read["cache"] / read[FLATTENED],
        "read_mtok_per_second": read["cache"] / 1e6,
    }
    print(f"\nno worse than {REFERENCE}: {small['selection'] if small else 'none'}")
    print_table([ratios])
    return [*times, *real, *synthetic], ratios


def main() -> None:
    arguments = parse_arguments()
    scale = QUICK if arguments.quick else Scale()
    scale = replace(scale, seconds=arguments.seconds or scale.seconds)
    rows, ratios = measure(arguments.data, arguments.output, scale)
    if arguments.json:
        write_json(arguments.json, rows, ratios)


if __name__ == "__main__":
    main()
