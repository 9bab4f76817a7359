"""Does distillation help, and which targets? Hold-out loss of a student for each selection and each
combination of two teachers, against cross-entropy.

    python benchmarks/quality.py DATA [--quick] [--json PATH] [--cache FOLDER] [--processes N]

DATA is a folder with GSM8K's `train.jsonl` and `test.jsonl`; the other domain is the standard
library's source. Each domain has a teacher that never saw the other one, and every student, a
quarter of their size, spends the same number of trained tokens on both. Selection, combination,
targets, losses and batches are the product's own; the training loop is plain torch, teachers score
and write through transformers, and full KD is written down here from torch's `kl_div` alone.

Weights are learned, and bests are chosen, on the validation split; the hold-out is read once for
each student, and decides nothing. Teachers, answers, rows and every trained student's losses are
files below FOLDER, named by the digest of what made them: a second run goes on where a killed one
stopped. Students are trained in processes of one thread each.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.common import print_table, write_json
from benchmarks.quality_study.material import DOMAINS, Material, MaterialSize, Shape, make_material
from benchmarks.quality_study.students import (
    COMBINED,
    HEADED,
    METHODS,
    SAMPLED,
    SINGLE,
    TOP_12,
    TOP_P,
    Cell,
    Method,
    Size,
    combination,
    learned,
    train_student,
)
from benchmarks.quality_study.training import text_loss
from pipeline import storage
from pipeline.combine.weights import required_teachers

FULL = Size(
    MaterialSize(
        vocabulary=2048,
        teacher=Shape(hidden=192, intermediate=512, layers=4),
        code_characters=7_000_000,
        teacher_positions=2_000_000,
        train=2_300,
        held=100,
    ),
    student=Shape(hidden=96, intermediate=256, layers=3),
    positions=600_000,
    seeds=3,
)
QUICK = replace(
    FULL,
    material=replace(FULL.material, teacher_positions=400_000, train=500, held=40),
    positions=130_000,
)
TINY = Size(
    MaterialSize(
        vocabulary=512,
        teacher=Shape(hidden=64, intermediate=128, layers=1),
        code_characters=30_000,
        teacher_positions=6_000,
        train=8,
        held=4,
    ),
    student=Shape(hidden=32, intermediate=64, layers=1),
    positions=4_000,
    seeds=2,
)


Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


@contextmanager
def workers(processes: int) -> Iterator[Run]:
    """A `map` whose results come as they are ready; with one process it runs in this one."""
    if processes == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start_worker)

    def run(work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for future in as_completed([pool.submit(work, item) for item in items]):
            yield future.result()

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """One thread for arithmetic, and one that ends the process with its parent, even a killed
    one.
    """
    torch.set_num_threads(1)
    disable_progress_bar()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _teach(material: Material, size: MaterialSize, name: str) -> str:
    """Has a teacher trained, write its answers and score what any method asks of it."""
    started = time.perf_counter()
    material.train_teacher(name, size)
    trained = time.perf_counter()
    material.write_answers(name)
    own = (name,)
    rules = {TOP_12: own, TOP_P: own, SAMPLED: own, HEADED: DOMAINS}
    material.score(name, rules, "train")
    material.score(name, {HEADED: DOMAINS}, "validation")
    rest = time.perf_counter() - trained
    return f"teacher {name}: {trained - started:.0f} s, its answers and rows {rest:.0f} s"


def measure(
    data: Path, cache: Path, size: Size, processes: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Trains what is missing, prints the tables and returns rows and ratios."""
    disable_progress_bar()
    material = make_material(data, cache, size.material)
    with workers(processes) as run:
        for line in run(partial(_teach, material, size.material), DOMAINS):
            print(line, flush=True)
        cells = [Cell(material, size, name, seed) for seed in range(size.seeds) for name in METHODS]
        missing = [cell for cell in cells if not cell.path.exists()]
        for number, line in enumerate(run(train_student, missing), start=1):
            print(f"{number}/{len(missing)} {line}", flush=True)
    rows = [_row(material, size, name) for name in METHODS]
    print_table([*rows, *_teacher_rows(material)])
    print("learned weights:", learned(material))
    return rows, ratios(rows)


def _row(material: Material, size: Size, name: str) -> dict[str, Any]:
    """Means over the seeds, and the standard deviation of the mean over domains."""
    found = [
        storage.read_json(str(Cell(material, size, name, seed).path)) for seed in range(size.seeds)
    ]
    means = [statistics.mean(each["holdout"].values()) for each in found]
    return {
        "method": name,
        "seeds": size.seeds,
        **{f"{d}_loss": statistics.mean(each["holdout"][d] for each in found) for d in DOMAINS},
        "loss": statistics.mean(means),
        "spread": statistics.stdev(means),
        "validation_loss": statistics.mean(
            value for each in found for value in each["validation"].values()
        ),
        **_size_of_rows(material, METHODS[name]),
    }


def _size_of_rows(material: Material, method: Method) -> dict[str, float | None]:
    """What of the teachers is cached for a position, means over the shards that are read."""
    combine = combination(material, method)
    if method.selection is None or combine is None:
        return {"entries": None, "bytes_per_token": None}
    needed = {n for d in DOMAINS for n in required_teachers(combine, list(DOMAINS), d)}
    shards = [material.shard(name, method.selection, "train") for name in sorted(needed)]
    positions = sum(shard.num_positions for shard in shards)
    return {
        "entries": sum(shard.figures.num_entries for shard in shards) / positions,
        "bytes_per_token": sum(shard.num_bytes for shard in shards) / positions,
    }


def _teacher_rows(material: Material) -> list[dict[str, Any]]:
    """The teachers' own losses on the hold-out, for comparison; nobody learns from them."""
    found = []
    for name in DOMAINS:
        model = material.teacher(name)
        losses = {d: text_loss(model, material.sequences(d, "holdout")) for d in DOMAINS}
        found.append(
            {
                "method": f"teacher {name} itself",
                "seeds": None,
                **{f"{domain}_loss": loss for domain, loss in losses.items()},
                "loss": statistics.mean(losses.values()),
                **dict.fromkeys(("spread", "validation_loss", "entries", "bytes_per_token")),
            }
        )
    return found


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of hold-out losses, means over domains and seeds; what is called best is so on validation."""
    by_name = {row["method"]: row for row in rows}

    def best(names: Iterable[str]) -> str:
        chosen = min(names, key=lambda name: by_name[name]["validation_loss"])
        print(f"best on validation of {', '.join(names)}: {chosen}")
        return chosen

    loss = {name: row["loss"] for name, row in by_name.items()}
    return {
        "sampled_over_full_loss": loss["sampled"] / loss["full"],
        "combined_over_best_single_loss": loss[best(COMBINED)] / loss[best(SINGLE)],
        "full_over_text_loss": loss["full"] / loss["text"],
        "top_k_renormalised_over_text_loss": loss["top_k renormalised"] / loss["text"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--quick", action="store_true", help="less text and shorter trainings")
    parser.add_argument("--json", type=Path, help="where rows and ratios are written")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("output/benchmarks"),
        help="folder that keeps what is trained (default: %(default)s)",
    )
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="students at a time"
    )
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    rows, found = measure(options.data, options.cache, size, options.processes)
    for name, ratio in found.items():
        print(f"{name}: {ratio:.4f}")
    if options.json:
        write_json(options.json, rows, found)


if __name__ == "__main__":
    main()
