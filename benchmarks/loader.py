"""Speed of making a training's data: reading shards, combining the teachers' rows, packing.

    python benchmarks/loader.py [--quick] [--json PATH]

Sequences and caches are made up: a prompt of 64 tokens and an answer of 448, and for each teacher a
ragged number of entries, about 16 on average, from a vocabulary of 151,936. Every round reads all
of it anew, in the order of a training, in one process; its processor time counts, so that the
figure is the speed of one core. The same is then measured through a loader process, by the clock.
Only tokens with targets count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import MADE_UP, machine, made_up_spec, print_table, write_json
from pipeline.cache.shard import write_shard
from pipeline.fingerprint import digest_ids, sequence_id
from pipeline.layout import CacheLayout, Layout
from pipeline.records import DatasetEntry, SparseLogprobs, TokenSequence
from pipeline.sequences import write_dataset, write_sequences
from students.data.batches import BatchSource, Share
from students.data.loader import Loader

VOCABULARY, PROMPT, ANSWER, ENTRIES, MOST_ENTRIES = 151_936, 64, 448, 16, 64
TEACHERS = (1, 2, 4)
SEQUENCES_PER_STEP, TOKENS_PER_MICRO_BATCH = 64, 8_192


@dataclass(frozen=True)
class Size:
    """Amount of made-up data, and number of times that it is read."""

    shards: int
    sequences_per_shard: int
    rounds: int


FULL = Size(shards=8, sequences_per_shard=256, rounds=5)
QUICK = Size(shards=2, sequences_per_shard=64, rounds=2)


@dataclass(frozen=True)
class Material:
    """Sequences on disk, and the cache of each teacher."""

    layout: Layout
    entries: list[DatasetEntry]
    caches: dict[str, CacheLayout]


def make_material(folder: Path, size: Size, num_teachers: int) -> Material:
    generator = np.random.default_rng(0)
    layout = Layout(str(folder), "loader")
    caches = {f"t{m}": layout.cache(f"t{m}", MADE_UP) for m in range(num_teachers)}
    entries = []
    for _ in range(size.shards):
        sequences = [make_sequence(generator) for _ in range(size.sequences_per_shard)]
        shard = write_sequences(layout, "domain", sequences)
        entries += [
            DatasetEntry(
                s.sequence_id, "p", "domain", "train", ("t0",), shard, PROMPT + ANSWER, ANSWER
            )
            for s in sequences
        ]
        for cache in caches.values():
            rows = [make_row(generator, s.sequence_id) for s in sequences]
            path = cache.shard(digest_ids([s.sequence_id for s in sequences]))
            write_shard(path, rows, MADE_UP)
    return Material(layout, entries, caches)


def make_sequence(generator: np.random.Generator) -> TokenSequence:
    ids = generator.integers(0, VOCABULARY, PROMPT + ANSWER).astype(np.int32)
    spans = ((PROMPT, PROMPT + ANSWER),)
    name = sequence_id(ids, spans, "made up")
    return TokenSequence(name, ids, spans, "p", "domain", ("t0",), "stop")


def make_row(generator: np.random.Generator, name: str) -> SparseLogprobs:
    """Entries by position as `top_p` leaves them: geometric, few nearly always, many at times."""
    num_entries = np.minimum(generator.geometric(1 / ENTRIES, ANSWER), MOST_ENTRIES)
    total = int(num_entries.sum())
    rank = np.arange(total) - np.repeat(np.cumsum(num_entries) - num_entries, num_entries)
    first = np.repeat(generator.integers(0, VOCABULARY, ANSWER), num_entries)
    half = np.float16
    return SparseLogprobs(
        sequence_id=name,
        num_entries=num_entries.astype(np.uint8),
        token_ids=((first + 2357 * rank) % VOCABULARY).astype(np.uint32),  # no id twice
        logprobs=(-0.7 * (rank + 1)).astype(half),
        counts=np.zeros(0, np.uint8),
        gold_logprobs=generator.uniform(-3, 0, ANSWER).astype(half),
        tail_mass=np.full(ANSWER, 1e-3, half),
        entropies=generator.uniform(0, 4, ANSWER).astype(half),
    )


def share_of(material: Material) -> Share:
    """The share of the only worker of a training."""
    spec = made_up_spec(
        Path(material.layout.root),
        list(material.caches),
        write_dataset(material.layout, material.entries),
        {},
        steps=len(material.entries) // SEQUENCES_PER_STEP,
        sequences_per_step=SEQUENCES_PER_STEP,
        tokens_per_micro_batch=TOKENS_PER_MICRO_BATCH,
    )
    return Share(spec, VOCABULARY, rank=0, world_size=1)


def seconds_of_a_core(share: Share) -> float:
    """Processor seconds of all steps, in this process, with everything read anew."""
    started = time.process_time()
    source = BatchSource(share)
    for step in range(share.spec.config.training.steps):
        source.step(step)
    return time.process_time() - started


def seconds_between_steps(share: Share, num_processes: int) -> float:
    """Seconds by the clock for each step after the first, with no other use of the batches."""
    steps = range(share.spec.config.training.steps)
    with Loader(share, steps, num_processes) as loader:
        loader.receive()
        started = time.perf_counter()
        for _ in steps[1:]:
            loader.receive()
        return (time.perf_counter() - started) / len(steps[1:])


def measure(size: Size, folder: Path) -> list[dict[str, Any]]:
    """Rows for each number of teachers, measured in alternating rounds; the first is dropped."""
    shares = {m: share_of(make_material(folder / str(m), size, m)) for m in TEACHERS}
    positions = size.shards * size.sequences_per_shard * ANSWER
    positions_of_a_step = SEQUENCES_PER_STEP * ANSWER
    speeds: dict[int, list[tuple[float, float]]] = {m: [] for m in TEACHERS}
    for turn in range(size.rounds + 1):
        for m in TEACHERS if turn % 2 else reversed(TEACHERS):
            core = positions / seconds_of_a_core(shares[m])
            clock = positions_of_a_step / seconds_between_steps(shares[m], 1)
            if turn:
                speeds[m].append((core, clock))
    rows = []
    for m, rounds in speeds.items():
        core, clock = zip(*rounds, strict=True)
        rows.append(
            {
                "teachers": m,
                "tokens_per_second_per_core": statistics.median(core),
                "lowest": min(core),
                "highest": max(core),
                "through_one_process": statistics.median(clock),
                "rounds": list(core),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the data")
    parser.add_argument("--json", type=Path, help="where the result is written")
    options = parser.parse_args()
    print(", ".join(f"{key} {value}" for key, value in machine().items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(QUICK if options.quick else FULL, Path(folder))
    print_table([{k: v for k, v in row.items() if k != "rounds"} for row in rows])
    by_teachers = {row["teachers"]: row["tokens_per_second_per_core"] for row in rows}
    ratios = {"ktok_per_second_per_core_2_teachers": by_teachers[2] / 1000}
    for name, value in ratios.items():
        print(f"{name}: {value:.0f}")
    if options.json:
        write_json(options.json, rows, ratios)


if __name__ == "__main__":
    main()
