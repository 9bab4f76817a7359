"""One Ray, one storage root and one undisturbed training for all tests of training.

Some trainings go the whole way through Ray Train; the others run the same `train` in worker
processes that live as long as these tests, which saves their start.
"""

import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import ray

from pipeline.cache.shard import write_shard
from pipeline.fingerprint import digest_ids
from pipeline.layout import Layout
from pipeline.records import DatasetEntry
from pipeline.sequences import write_dataset, write_sequences
from students.checkpoints.resume import prepare_resume
from students.launching.launch import train_student
from tests.support.trainings import (
    DOMAINS,
    TEACHERS,
    Worker,
    hand_made_row,
    hand_made_sequence,
    make_spec,
    write_student,
)


@pytest.fixture(scope="package")
def cluster(tmp_path_factory):
    """Ray with its own copy of the compiled ops; yields the path of the lock of an op's build."""
    extensions = tmp_path_factory.mktemp("ops") / "torch_extensions"
    built = Path(sys.prefix, "torch_extensions")
    if built.exists():
        shutil.copytree(built, extensions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
        lock = extensions / "deepspeed_shm_comm" / "lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        yield lock
        ray.shutdown()


@pytest.fixture(scope="package")
def run(cluster, tmp_path_factory):
    """Function that trains on workers that already run, and returns the spec."""
    folder, groups = tmp_path_factory.mktemp("groups"), {}

    def run(spec, stop_before=None):
        size = spec.config.training.workers
        if size not in groups:
            groups[size] = [Worker.remote(n, size, str(folder / str(size))) for n in range(size)]
        prepare_resume(spec)
        counts = ray.get([worker.train.remote(spec, stop_before) for worker in groups[size]])
        micro_batches[spec.config.name] = counts
        return spec

    run.micro_batches = micro_batches = {}

    return run


@pytest.fixture(scope="package")
def material(tmp_path_factory):
    """A storage root with sequences, a dataset and one cache per teacher, and a student folder."""
    root = tmp_path_factory.mktemp("storage")
    write_student(root / "student", tied=False)
    layout, generator = Layout(str(root), "unused"), np.random.default_rng(0)
    entries, by_teacher = [], {name: [] for name in TEACHERS}
    for domain in DOMAINS:
        sequences = [hand_made_sequence(generator, domain) for _ in range(24)]
        shard = write_sequences(layout, domain, sequences)
        for n, sequence in enumerate(sequences):
            entries.append(
                DatasetEntry(
                    sequence.sequence_id,
                    sequence.prompt_id,
                    domain,
                    "holdout" if n < 6 else "train",
                    ("first",),
                    shard,
                    len(sequence.input_ids),
                    sequence.num_positions,
                )
            )
            for name in TEACHERS:
                by_teacher[name].append(hand_made_row(generator, sequence))
    caches = {}
    for name, rows in by_teacher.items():
        caches[name] = layout.cache(name, "0" * 32)
        write_shard(
            caches[name].shard(digest_ids([row.sequence_id for row in rows])), rows, "0" * 32
        )
    return root, write_dataset(layout, entries), caches


@pytest.fixture(scope="package")
def reference(cluster, material):
    """One worker, stage 0, unbroken, through Ray Train beside the lock of a dead builder: what
    every other way of training must equal.

    Gives the spec, its summary and the lines of the driver's log.
    """
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("students")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    cluster.touch()
    spec = make_spec(material, "reference", loader_processes=1)
    summary = train_student(spec)
    logger.removeHandler(handler)
    assert not cluster.exists()
    return spec, summary, lines
