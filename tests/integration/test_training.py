"""Training on a tiny student and a hand-made cache, with the real DeepSpeed.

Some trainings go the whole way through Ray Train; the others run the same `train` in worker
processes that live as long as this module, which saves their start.
"""

import dataclasses
import itertools
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from safetensors.numpy import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from pipeline.cache import write_shard
from pipeline.cache_index import open_cache
from pipeline.config import Config
from pipeline.config_training import CrossEntropy
from pipeline.datasets import (
    DatasetEntry,
    read_dataset,
    read_sequences,
    write_dataset,
    write_sequences,
)
from pipeline.errors import ConfigError, TrainingError
from pipeline.features import to_bfloat16
from pipeline.fingerprint import digest_ids, sequence_id
from pipeline.layout import Layout
from pipeline.records import HiddenStates, SparseLogprobs, TokenSequence
from pipeline.training import TrainingJob
from students.batches import DataOrder
from students.checkpoint import latest_complete, prepare_resume
from students.dataset import open_examples
from students.evaluation import holdout_numbers, teacher_holdout_numbers
from students.export import export_student
from students.launch import remove_stale_build_locks, train_student
from students.model import build_student
from students.progress import read_metrics
from teachers.identity import student_identity

VOCABULARY, DOMAINS, TEACHERS = 64, ("sums", "words"), ("first", "second")
LONGEST = 13
STEPS = [1, 2, 3, 4, 5, 6]
TOLERANCE, WEIGHTS_TOLERANCE = 1e-4, 1e-4
"""Sums in another order, through six steps of Adam: losses were seen 3e-7 apart and weights, of a
largest size of 1, 3e-5.
"""
TOKENS_FOR_ACCUMULATION = {1: 800, 2: 58}
"""Over all workers, so that every step of 8 sequences takes this many micro-batches on each."""
pytestmark = [pytest.mark.timeout(300), pytest.mark.integration]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Ray with its own copy of the compiled ops; gives the place of the lock of an op's build."""
    extensions = tmp_path_factory.mktemp("ops") / "torch_extensions"
    built = Path(sys.prefix, "torch_extensions")
    if built.exists():
        shutil.copytree(built, extensions)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
        lock = extensions / "deepspeed_shm_comm" / "lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        yield lock
        ray.shutdown()


@ray.remote(num_cpus=0)
class Worker:
    """A process of a group that trains one job after another."""

    def __init__(self, rank, world_size, meeting_place):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=world_size
        )

    def train(self, job, stop_before):
        """Trains and gives the number of micro-batches of every step; raises `InterruptedError` in
        place of the step after `stop_before` steps.
        """
        import students.trainer

        original, num_micro_batches = students.trainer.train_step, []

        def train_step(engine, batch, *args):
            if engine.deepspeed.global_steps == stop_before:
                raise InterruptedError
            num_micro_batches.append(len(batch.micro_batches))
            return original(engine, batch, *args)

        students.trainer.train_step = train_step
        try:
            students.trainer.train(job, torch.device("cpu"))
        finally:
            students.trainer.train_step = original
        return num_micro_batches


@pytest.fixture(scope="module")
def run(cluster, tmp_path_factory):
    """Trains a job on workers that already run."""
    folder, groups = tmp_path_factory.mktemp("groups"), {}

    def run(job, stop_before=None):
        size = job.config.training.workers
        if size not in groups:
            groups[size] = [Worker.remote(n, size, str(folder / str(size))) for n in range(size)]
        prepare_resume(job)
        counts = ray.get([worker.train.remote(job, stop_before) for worker in groups[size]])
        micro_batches[job.config.name] = counts
        return job

    run.micro_batches = micro_batches = {}

    return run


@pytest.fixture(scope="module")
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


def write_student(folder, tied):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    config.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")),
        bos_token="w0",
        eos_token="w1",
        pad_token="w1",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    tokenizer.save_pretrained(folder)


def hand_made_sequence(generator, domain):
    """Of few of the words, so that a loss falls within a handful of steps."""
    length = int(generator.integers(6, LONGEST + 1))
    input_ids = generator.integers(2, 12, length).astype(np.int32)
    middle = length // 2
    spans = ((2, middle), (middle + 1, length))
    return TokenSequence(
        sequence_id(input_ids, spans, "tokenizer"),
        input_ids,
        spans,
        f"p{generator.integers(1e9)}",
        domain,
        ("first",),
        "stop",
    )


def hand_made_row(generator, sequence, k=5):
    num_positions = sequence.num_positions
    logits = generator.normal(size=(num_positions, VOCABULARY))
    logits[np.arange(num_positions), sequence.gold_ids] += 6
    dense = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-dense, axis=1)[:, :k]
    kept = np.take_along_axis(dense, ids, axis=1)
    gold = dense[np.arange(num_positions), sequence.gold_ids]
    half = np.float16
    return SparseLogprobs(
        sequence.sequence_id,
        np.full(num_positions, k, np.uint8),
        ids.ravel().astype(np.uint32),
        kept.ravel().astype(half),
        np.zeros(0, np.uint8),
        gold.astype(half),
        (1 - np.exp(kept).sum(1)).astype(half),
        (-(np.exp(dense) * dense).sum(1)).astype(half),
    )


def make_job(
    material,
    name,
    student="student",
    caches=None,
    workers=1,
    zero_stage=0,
    student_options=None,
    **training,
):
    root, dataset_digest, all_caches = material
    zero = {"stage": zero_stage, "stage3_param_persistence_threshold": 0}
    config = Config.model_validate(
        {
            "name": name,
            "seed": 3,
            "storage": {"root": str(root)},
            "prompts": {"sources": [{"path": "unused.jsonl"}]},
            "teachers": {teacher: {"model": "unused"} for teacher in [*TEACHERS, "idle"]},
            "synthesis": {"recipes": [{"type": "dataset"}]},
            "scoring": {"num_logprobs": 5, "selection": {"type": "top_k", "max_entries": 5}},
            "combine": {
                "method": "mixture",
                "weights": {
                    "type": "by_domain",
                    "domains": {"sums": {"first": 1.0}, "words": {"first": 0.25, "second": 0.75}},
                },
            },
            "student": {
                "model": str(root / "student"),
                "initialization": "random",
                **(student_options or {}),
            },
            "training": {
                "losses": [
                    {"type": "forward_kl", "weight": 1.0},
                    {"type": "cross_entropy", "weight": 0.5},
                ],
                "steps": 6,
                "sequences_per_step": 8,
                "tokens_per_micro_batch": 40,
                "learning_rate": 0.02,
                "warmup_steps": 2,
                "log_every_steps": 1,
                "evaluate_every_steps": 3,
                "checkpoint_every_steps": 2,
                "max_failures": 0,
                "loader_processes": 0,
                "weight_decay": 0.1,
                "workers": workers,
                "deepspeed": {"zero_optimization": zero} if zero_stage else {},
                **training,
            },
            "evaluation": {"sampling": {}},
        }
    )
    losses = (
        config.training.losses
        if student == "student"
        else [CrossEntropy(type="cross_entropy", weight=1.0)]
    )
    fingerprints = dict.fromkeys(TEACHERS, "0" * 32)
    return TrainingJob(
        config,
        Layout(str(root), name),
        dataset_digest,
        student,
        tuple(losses),
        all_caches if caches is None else caches,
        fingerprints,
    )


def curve(job, name="train/loss"):
    return {line["step"]: line[name] for line in read_metrics(job.folder) if name in line}


def final_weights(job):
    return load_file(Path(job.folder, "final", "weights.safetensors"))


def steps_of(job):
    return [line["step"] for line in read_metrics(job.folder)]


@pytest.fixture(scope="module")
def reference(cluster, material):
    """One worker, stage 0, unbroken, through Ray Train beside the lock of a dead builder: what
    every other way of training must equal.

    Gives the job, its summary and the lines of the driver's log.
    """
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("students")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    cluster.touch()
    job = make_job(material, "reference", loader_processes=1)
    summary = train_student(job)
    logger.removeHandler(handler)
    assert not cluster.exists()
    return job, summary, lines


def test_summary_metrics_and_checkpoints(reference):
    job, summary, _ = reference
    assert summary["steps"] == 6
    assert steps_of(job) == STEPS
    assert list(curve(job, "holdout/loss")) == [3, 6]
    first = read_metrics(job.folder)[0]
    assert first["train/loss"] == pytest.approx(
        first["train/forward_kl"] + 0.5 * first["train/cross_entropy"]
    )
    assert first["train/grad_norm"] > 0
    assert summary["final"]["holdout/loss"] == curve(job, "holdout/loss")[6]
    assert summary["final"]["train/loss"] < 0.8 * first["train/loss"]
    assert curve(job, "holdout/loss")[6] < curve(job, "holdout/loss")[3]
    assert latest_complete(job.folder).name == "step-00000006"
    assert len(list(Path(job.folder, "checkpoints").iterdir())) == 2
    entries = {e.sequence_id: e for e in read_dataset(job.layout, job.dataset_digest)}
    train = [entry for entry in entries.values() if entry.split == "train"]
    order = DataOrder([e.shard for e in train], job.config.seed, job.dataset_digest, 8)
    seen = [train[i].num_tokens for step in range(6) for i in order.batch(step)]
    assert summary["tokens"] == sum(seen)


def test_tensorboard_events_equal_the_metrics(reference):
    job, *_ = reference
    events = EventAccumulator(str(Path(job.folder, "tensorboard"))).Reload()
    for name in ("train/loss", "train/learning_rate", "holdout/forward_kl"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(curve(job, name), rel=1e-6)


def test_progress_reaches_the_drivers_log(reference):
    job, summary, lines = reference
    assert lines[0] == "student: step 0 of 6, workers: 1"
    assert lines[1].startswith("removed ") and "is dead" in lines[1]
    assert [line.split(":")[0] for line in lines[2:-1]] == [f"student step {n}/6" for n in STEPS]
    loss, holdout = curve(job)[3], curve(job, "holdout/loss")[3]
    assert lines[4].startswith(f"student step 3/6: loss {loss:.4g}, hold-out loss {holdout:.4g}, ")
    assert lines[-1].startswith(f"student: 6 steps, {summary['tokens']} tokens in ")


def test_a_second_call_returns_the_finished_training(reference, material):
    job, summary, _ = reference
    assert train_student(job) == summary
    with pytest.raises(TrainingError, match=r"learning_rate: 0.02 -> 0.03"):
        train_student(make_job(material, "reference", learning_rate=0.03))


def test_the_loss_counts_the_tokens_of_the_loss_spans_and_no_others(reference):
    """The first step's cross-entropy, from a plain forward of one sequence at a time."""
    job, *_ = reference
    entries = [e for e in read_dataset(job.layout, job.dataset_digest) if e.split == "train"]
    order = DataOrder([e.shard for e in entries], job.config.seed, job.dataset_digest, 8)
    model, total, count = build_student(job.config.student, job.config.seed), 0.0, 0
    for i in order.batch(0):
        shard = read_sequences(str(Path(job.layout.root, entries[i].shard)))
        sequence = next(s for s in shard if s.sequence_id == entries[i].sequence_id)
        ids = torch.tensor(sequence.input_ids[None].astype(np.int64))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        for start, stop in sequence.loss_spans:
            for place in range(start, stop):
                total -= logprobs[place - 1, sequence.input_ids[place]].item()
                count += 1
    assert curve(job, "train/cross_entropy")[1] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("zero_stage", range(4))
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_zero_stages_packing_and_accumulation_change_nothing(
    run, reference, material, workers, zero_stage
):
    for packing, accumulation in itertools.product((True, False), (1, 2)):
        name = f"w{workers}z{zero_stage}p{packing}a{accumulation}"
        job = make_job(
            material,
            name,
            workers=workers,
            zero_stage=zero_stage,
            packing=packing,
            tokens_per_micro_batch=TOKENS_FOR_ACCUMULATION[accumulation] // workers,
        )
        run(job)
        assert run.micro_batches[name] == [[accumulation] * 6] * workers
        for metric in ("train/loss", "train/grad_norm", "holdout/loss"):
            found, expected = curve(job, metric), curve(reference[0], metric)
            # float32 sums in another order: exact to rounding at first, then through Adam
            if 1 in expected:
                assert found[1] == pytest.approx(expected[1], rel=1e-5), (name, metric)
            assert found == pytest.approx(expected, rel=TOLERANCE), (name, metric)
        weights, expected = final_weights(job), final_weights(reference[0])
        assert weights.keys() == expected.keys()
        for key, value in weights.items():
            assert np.abs(value - expected[key]).max() < WEIGHTS_TOLERANCE, (name, key)


@pytest.mark.parametrize(("workers", "zero_stage"), [(1, 0), (2, 2), (2, 3)])
def test_resume_equals_the_unbroken_run(run, material, workers, zero_stage):
    options = {"workers": workers, "zero_stage": zero_stage}
    whole = run(make_job(material, f"whole{workers}{zero_stage}", **options))
    broken = make_job(material, f"broken{workers}{zero_stage}", loader_processes=2, **options)
    with pytest.raises(InterruptedError):
        run(broken, stop_before=5)
    assert latest_complete(broken.folder).name == "step-00000004"
    assert steps_of(broken) == [1, 2, 3, 4, 5]
    with Path(broken.folder, "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 6, "trai')
    # a checkpoint that was not finished does not count
    shutil.copytree(
        latest_complete(broken.folder),
        Path(broken.folder, "checkpoints", "step-00000005"),
        ignore=shutil.ignore_patterns("COMPLETE", "state.json"),
    )
    run(broken)
    assert steps_of(broken) == STEPS
    for name in ("train/loss", "train/grad_norm", "train/learning_rate", "holdout/loss"):
        assert curve(broken, name) == curve(whole, name), name
    for name, value in final_weights(broken).items():
        assert np.array_equal(value, final_weights(whole)[name]), name


@pytest.mark.parametrize(
    "stages",
    [(0, 0), (1, 1), (2, 2), (3, 3), (1, 2), (2, 1)],
    ids=lambda stages: "z{}z{}".format(*stages),
)
def test_resume_on_other_workers_and_at_other_stages(run, reference, material, stages):
    """From 2 workers on 1 and on 4, and from 1 on 2."""
    old, new = stages
    broken = {
        workers: make_job(material, f"w{workers}z{old}z{new}", workers=workers, zero_stage=old)
        for workers in (1, 2)
    }
    for job in broken.values():
        with pytest.raises(InterruptedError):
            run(job, stop_before=5)
    # of a conversion that was killed
    Path(latest_complete(broken[2].folder), ".universal-0", "zero").mkdir(parents=True)
    for before, after in ((2, 1), (2, 4), (1, 2)):
        name = f"w{before}w{after}z{old}z{new}"
        job = make_job(material, name, workers=after, zero_stage=new)
        shutil.copytree(broken[before].folder, job.folder)
        run(job)
        universal = Path(job.folder, "checkpoints", "step-00000004", "universal")
        assert universal.exists() == (old > 0)
        assert old == 0 or not list(universal.parent.glob(".universal-*"))
        assert steps_of(job) == STEPS
        for metric in ("train/loss", "train/grad_norm", "holdout/loss"):
            expected = pytest.approx(curve(reference[0], metric), rel=TOLERANCE)
            assert curve(job, metric) == expected, (name, metric)
        for key, value in final_weights(job).items():
            assert np.abs(value - final_weights(reference[0])[key]).max() < WEIGHTS_TOLERANCE, (
                name,
                key,
            )


def test_resume_of_another_training_is_refused(run, material):
    broken = make_job(material, "moved")
    with pytest.raises(InterruptedError):
        run(broken, stop_before=4)
    root, dataset_digest, caches = material
    entries = read_dataset(broken.layout, dataset_digest)
    other = (root, write_dataset(broken.layout, entries[:-1]), caches)
    changed = make_job(other, "moved", workers=2, zero_stage=1, weight_decay=0.2)
    changed = dataclasses.replace(changed, losses=(CrossEntropy(type="cross_entropy", weight=1.0),))
    with pytest.raises(TrainingError) as refusal:
        train_student(changed)
    for difference in (
        f"dataset_digest: {dataset_digest!r} -> {other[1]!r}",
        "losses: [{'weight': 1.0, 'temperature': 1.0, 'type': 'forward_kl'}, "
        "{'weight': 0.5, 'type': 'cross_entropy'}]"
        " -> [{'weight': 1.0, 'type': 'cross_entropy'}]",
        "training.weight_decay: 0.1 -> 0.2",
        "zero_optimization.stage: 0 -> 1",
    ):
        assert difference in str(refusal.value)


def test_an_allowed_change_holds_after_the_resume(run, material, tmp_path):
    """DeepSpeed would go on with the optimizer's settings that are in the checkpoint."""
    weights = {}
    for zero_stage, weight_decay in ((0, 0.1), (0, 0.9), (2, 0.9), (3, 0.9)):
        name = f"decays{zero_stage}{weight_decay}"
        with pytest.raises(InterruptedError):
            run(make_job(material, name, zero_stage=zero_stage), stop_before=3)
        changed = {"weight_decay": weight_decay, "allow_resume_with": ["training.weight_decay"]}
        job = run(make_job(material, name, zero_stage=zero_stage, **changed))
        assert steps_of(job) == STEPS
        weights[zero_stage, weight_decay] = final_weights(job)
    for name, value in weights[0, 0.9].items():
        if value.ndim == 2:
            assert np.abs(value - weights[0, 0.1][name]).max() > 10 * WEIGHTS_TOLERANCE, name
        for stage in (2, 3):
            assert np.abs(value - weights[stage, 0.9][name]).max() < WEIGHTS_TOLERANCE, name
    export_student(job, str(tmp_path / "export"))
    card = (tmp_path / "export" / "README.md").read_text()
    assert "training.weight_decay: 0.1 -> 0.9" in card


def test_a_killed_worker_is_replaced_and_training_goes_on_exactly(
    run, cluster, material, monkeypatch, tmp_path
):
    """Rank 1 of 2 kills itself by its id in step 6 and leaves the lock of an unfinished build."""
    whole = run(make_job(material, "alive", workers=2))
    job, marker = make_job(material, "dies", workers=2, max_failures=1), tmp_path / "died"
    monkeypatch.setattr("students.launch._worker", dying_worker(marker, cluster))
    train_student(job)
    assert marker.exists() and not cluster.exists()
    assert steps_of(job) == STEPS
    assert curve(job) == curve(whole)
    assert curve(job, "holdout/loss") == curve(whole, "holdout/loss")


def dying_worker(marker, lock):
    def worker(config):
        import students.launch

        original = students.launch._worker
        if ray.train.get_context().get_world_rank() == 1 and not marker.exists():
            os.environ["DS_ACCELERATOR"] = "cpu"
            import students.trainer

            step = students.trainer.train_step

            def train_step(engine, *args):
                if engine.deepspeed.global_steps == 5:
                    lock.touch()
                    marker.touch()
                    os.kill(os.getpid(), 9)
                return step(engine, *args)

            students.trainer.train_step = train_step
        original(config)

    return worker


def test_a_killed_trainer_actor_ends_the_run_and_the_next_goes_on_exactly(
    reference, material, monkeypatch
):
    job = make_job(material, "headless", max_failures=3)
    with monkeypatch.context() as patch:
        patch.setattr("students.launch._worker", worker_that_kills_its_controller)
        with pytest.raises(TrainingError, match="run the same command again to resume"):
            train_student(job)
    assert latest_complete(job.folder).name == "step-00000004"
    train_student(job)
    assert steps_of(job) == STEPS
    assert curve(job) == curve(reference[0])


def worker_that_kills_its_controller(config):
    """In place of the fifth step, by the id of the one that has the same parent."""
    import students.launch

    os.environ["DS_ACCELERATOR"] = "cpu"
    import students.trainer

    step = students.trainer.train_step

    def train_step(engine, *args):
        if engine.deepspeed.global_steps == 4:
            siblings = psutil.Process(os.getppid()).children()
            (controller,) = [p for p in siblings if "TrainController" in " ".join(p.cmdline())]
            os.kill(controller.pid, signal.SIGKILL)
            signal.pause()
        return step(engine, *args)

    students.trainer.train_step = train_step
    students.launch._worker(config)


def test_an_error_of_the_users_is_not_tried_again(cluster, material):
    job = make_job(
        material, "lacking", caches={"first": material[2]["first"]}, max_failures=-1, steps=3
    )
    with pytest.raises(TrainingError) as error:
        train_student(job)
    assert "second" in str(error.value) and "Traceback" not in str(error.value)


def test_twin_needs_no_cache(run, material):
    twin = run(make_job(material, "twin", student="twin", caches={}, steps=3))
    assert "train/forward_kl" not in read_metrics(twin.folder)[-1]
    assert curve(twin)[3] < curve(twin)[1]


def test_a_list_of_losses_is_mixed_and_logged_apart(run, material):
    losses = [
        {"type": "reverse_kl", "weight": 0.5, "temperature": 2.0},
        {"type": "jensen_shannon", "weight": 2.0, "beta": 0.5, "temperature": 2.0},
        {"type": "cross_entropy", "weight": 0.25},
    ]
    job = run(make_job(material, "mixed", losses=losses, workers=2, zero_stage=3))
    lines = read_metrics(job.folder)
    weights = {
        "reverse_kl_temperature_2": 0.5,
        "jensen_shannon_temperature_2_beta_0.5": 2.0,
        "cross_entropy": 0.25,
    }
    for prefix, line in [("train", lines[0]), ("train", lines[-1]), ("holdout", lines[-1])]:
        total = sum(weight * line[f"{prefix}/{name}"] for name, weight in weights.items())
        assert line[f"{prefix}/loss"] == pytest.approx(total, rel=1e-5)
        # in `words` two teachers of five kept ids each, in `sums` one
        assert 0 < line[f"{prefix}/union_error_bound"] < 0.5
        assert line[f"{prefix}/reverse_kl_temperature_2_floored"] == 0
    for name in weights:
        assert lines[-1][f"train/{name}"] < lines[0][f"train/{name}"]


def test_long_sequences_are_listed(run, material):
    with pytest.raises(TrainingError, match=r"longer than training\.tokens_per_micro_batch"):
        run(make_job(material, "long", tokens_per_micro_batch=8))


def test_a_loss_that_is_no_number_stops_training_and_leaves_no_checkpoint_of_it(run, material):
    job = make_job(material, "diverges", learning_rate=1e30, warmup_steps=0, log_every_steps=6)
    with pytest.raises(TrainingError, match=r"at step 2 the loss is .* norm nan: lower"):
        run(job)
    assert latest_complete(job.folder) is None


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_bfloat16_with_gradient_checkpointing_trains_and_exports(
    run, reference, material, zero_stage, tmp_path
):
    options = {"dtype": "bfloat16", "gradient_checkpointing": True}
    job = make_job(
        material, f"bfloat16{zero_stage}", zero_stage=zero_stage, student_options=options
    )
    run(job)
    assert curve(job)[1] == pytest.approx(curve(reference[0])[1], rel=0.02)
    assert curve(job)[6] < 0.8 * curve(job)[1]
    export_student(job, str(tmp_path / "export"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == torch.bfloat16


def test_gradient_checkpointing_changes_no_number(run, reference, material):
    options = {"gradient_checkpointing": True}
    job = run(make_job(material, "recomputes", steps=6, student_options=options))
    assert curve(job) == pytest.approx(curve(reference[0]), rel=1e-5)


def test_tied_student_at_stage_3(run, material, tmp_path):
    root, *_ = material
    write_student(root / "tied", tied=True)
    options = {"model": str(root / "tied")}
    jobs = [
        run(make_job(material, f"tied{stage}", zero_stage=stage, student_options=options))
        for stage in (0, 3)
    ]
    assert curve(jobs[1]) == pytest.approx(curve(jobs[0]), rel=2e-3)
    assert "lm_head.weight" not in final_weights(jobs[1])
    export_student(jobs[1], str(tmp_path / "export"))


def test_export_loads_and_evaluates_like_training(reference, material, tmp_path):
    job, summary, _ = reference
    figures = export_student(job, str(tmp_path / "export"))
    assert figures["largest_difference_nats"] <= figures["tolerance_nats"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.eos_token_id == 1
    assert (
        tokenizer.chat_template
        == AutoTokenizer.from_pretrained(job.config.student.model).chat_template
    )
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "export").generation_config.eos_token_id
        == 1
    )
    card = (tmp_path / "export" / "README.md").read_text()
    assert job.dataset_digest in card
    entries = [
        entry for entry in read_dataset(job.layout, job.dataset_digest) if entry.split == "holdout"
    ]
    examples = open_examples(
        job.layout, job.caches, list(job.config.teachers), job.config.combine, entries, VOCABULARY
    )
    numbers = holdout_numbers(tmp_path / "export", entries, examples, 64)
    assert set(numbers) == {"all", *DOMAINS}
    assert numbers["all"]["loss"] == pytest.approx(
        summary["final"]["holdout/cross_entropy"], rel=1e-4
    )
    assert numbers["all"]["kl_to_mixture"] == pytest.approx(
        summary["final"]["holdout/forward_kl"], rel=1e-4
    )
    assert numbers["all"]["tokens"] == sum(entry.num_positions for entry in entries)
    readers = {name: open_cache(cache) for name, cache in job.caches.items()}
    teachers = teacher_holdout_numbers(entries, examples, readers)
    # `first` alone is the mixture of `sums`
    assert teachers["first"]["sums"]["kl_to_mixture"] == pytest.approx(0, abs=1e-4)
    assert teachers["first"]["sums"]["agreement"] == 1
    assert teachers["first"]["sums"]["bounded_mass"] == 0
    assert teachers["second"]["sums"]["kl_to_mixture"] > 0.1


def test_a_training_starts_from_old_weights(run, reference, material, tmp_path):
    """Of checkpoints at every kind of stage and of an export: the weights, and nothing else."""
    job, expected = reference[0], final_weights(reference[0])
    export_student(job, str(tmp_path / "export"))
    sources = {"export": str(tmp_path / "export"), "z0": str(latest_complete(job.folder))}
    trained = {"export": expected, "z0": expected}
    for stage in (2, 3):
        partitioned = run(make_job(material, f"source{stage}", workers=2, zero_stage=stage))
        sources[f"z{stage}"] = str(latest_complete(partitioned.folder))
        trained[f"z{stage}"] = final_weights(partitioned)
    identities = set()
    for name, source in sources.items():
        options = {"initial_weights": source}
        following = make_job(material, f"after_{name}", student_options=options, steps=3)
        state = build_student(following.config.student, 7).state_dict()
        for key, value in trained[name].items():
            assert np.array_equal(state[key].numpy(), value), (name, key)
        identity = student_identity(following.config.student, following.layout)
        identities.add(identity["initial_weights"])
    assert len(identities) == 4
    following = run(dataclasses.replace(following, start=identity))
    assert steps_of(following) == [1, 2, 3]
    assert curve(following)[1] < 0.8 * curve(job)[1]
    assert curve(following, "train/learning_rate")[1] == pytest.approx(0.01)
    export_student(following, str(tmp_path / "following"))
    card = (tmp_path / "following" / "README.md").read_text()
    assert sources["z3"] in card and identity["initial_weights"] in card
    assert "initial_step: '6'" in card


def test_old_weights_that_do_not_fit_are_refused(reference, material, tmp_path):
    checkpoint = tmp_path / "step-00000006"
    shutil.copytree(latest_complete(reference[0].folder), checkpoint)
    job = make_job(
        material,
        "unfit",
        student_options={"model": str(tmp_path / "wide"), "initial_weights": str(checkpoint)},
    )
    config = LlamaConfig.from_pretrained(reference[0].config.student.model)
    config.num_hidden_layers, config.intermediate_size = 3, 64
    config.save_pretrained(tmp_path / "wide")
    with pytest.raises(TrainingError) as refusal:
        build_student(job.config.student, 0)
    assert "model.layers.2.mlp.up_proj.weight is missing" in str(refusal.value)
    shapes = "model.layers.0.mlp.gate_proj.weight has shape (48, 32), the student's (64, 32)"
    assert shapes in str(refusal.value)
    config.num_hidden_layers, config.intermediate_size, config.tie_word_embeddings = 2, 48, True
    config.save_pretrained(tmp_path / "wide")
    with pytest.raises(TrainingError, match="is tied to another matrix"):
        build_student(job.config.student, 0)
    (checkpoint / "COMPLETE").unlink()
    with pytest.raises(TrainingError, match="neither a complete checkpoint nor"):
        build_student(job.config.student, 0)
    with pytest.raises(ConfigError, match="neither a complete checkpoint"):
        student_identity(job.config.student, job.layout)


def test_export_refuses_other_weights(reference, material, tmp_path):
    job = make_job(material, "tampered")
    shutil.copytree(reference[0].folder, job.folder)
    weights = final_weights(job)
    weights["lm_head.weight"] = weights["lm_head.weight"][::-1].copy()
    save_file(weights, Path(job.folder, "final", "weights.safetensors"))
    with pytest.raises(TrainingError, match="differs from the trained one"):
        export_student(job, str(tmp_path / "export"))
    with pytest.raises(TrainingError, match="no finished training"):
        export_student(dataclasses.replace(job, student="twin"), str(tmp_path / "export"))


def test_only_locks_without_a_living_builder_are_removed(tmp_path):
    for name in ("dead", "alive"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    with (tmp_path / "alive" / "lock").open():
        assert remove_stale_build_locks(tmp_path) == [tmp_path / "dead" / "lock"]
    assert (tmp_path / "alive" / "lock").exists()


FEATURES = "first+features"
STATE_LOSSES = [
    {"type": "forward_kl", "weight": 1.0},
    {
        "type": "hidden_state",
        "weight": 0.5,
        "teacher": "first",
        "layers": {3: 1, 7: 2},
        "measure": "mse",
        "projection": "learned",
    },
    {
        "type": "hidden_state",
        "weight": 0.3,
        "teacher": "first",
        "layers": {7: 1},
        "measure": "cosine",
        "projection": "none",
    },
    *(
        {"type": "relation", "weight": 1.0, "teacher": "first", "layers": {3: 1}} | kind
        for kind in (
            {"relation": "token_similarity"},
            {"relation": "distance", "sequences": 4},
            {"relation": "angle", "sequences": 4},
        )
    ),
]
NAMES_OF_STATE_LOSSES = [
    "hidden_state_mse_first_3_1_7_2",
    "hidden_state_cosine_first_7_1",
    "relation_token_similarity_first_3_1",
    "relation_distance_first_3_1",
    "relation_angle_first_3_1",
]


@pytest.fixture(scope="module")
def states(material):
    """The cache of hidden states of one teacher, and its rows; one sequence has none."""
    root, digest, _ = material
    layout, generator = Layout(str(root), "unused"), np.random.default_rng(8)
    rows = {
        entry.sequence_id: HiddenStates(
            entry.sequence_id,
            to_bfloat16(generator.normal(size=(entry.num_positions, 2, 32)).astype(np.float32)),
        )
        for entry in read_dataset(layout, digest)[1:]
    }
    cache = layout.cache(FEATURES, "1" * 32)
    write_shard(cache.shard(digest_ids(rows)), list(rows.values()), "1" * 32)
    return cache, rows


def make_state_job(material, states, name, losses=STATE_LOSSES, **options):
    options = {"tokens_per_micro_batch": 60, **options}
    job = make_job(material, name, losses=losses, **options)
    return dataclasses.replace(
        job,
        caches=job.caches | {FEATURES: states[0]},
        cache_fingerprints=job.cache_fingerprints | {FEATURES: "1" * 32},
    )


@pytest.fixture(scope="module")
def state_reference(run, material, states):
    """One worker, stage 0, everything in one micro-batch, unbroken."""
    job = make_state_job(material, states, "states", tokens_per_micro_batch=800)
    run(job)
    return job


def test_losses_on_hidden_states_are_those_of_plain_forwards(state_reference, states):
    """The first step, one sequence at a time by transformers; states before each token."""
    job = state_reference
    entries = [e for e in read_dataset(job.layout, job.dataset_digest) if e.split == "train"]
    order = DataOrder([e.shard for e in entries], job.config.seed, job.dataset_digest, 8)
    model = build_student(job.config.student, job.config.seed)
    cosines, similarities, num_positions, embeddings = 0.0, 0.0, 0, []
    for i in order.batch(0):
        shard = read_sequences(str(Path(job.layout.root, entries[i].shard)))
        sequence = next(s for s in shard if s.sequence_id == entries[i].sequence_id)
        ids = torch.tensor(sequence.input_ids[None].astype(np.int64))
        with torch.no_grad():
            output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        places = [p for span in sequence.loss_spans for p in range(*span)]
        student = output.hidden_states[1][0][[p - 1 for p in places]].double()
        teacher = torch.tensor(states[1][sequence.sequence_id].values).double()
        similarity = torch.nn.functional.cosine_similarity
        cosines += (1 - similarity(student, teacher[:, 1])).sum().item()
        gaps = [
            (
                similarity(student[a], student[b], dim=0)
                - similarity(teacher[a, 0], teacher[b, 0], dim=0)
            )
            ** 2
            for a, b in itertools.permutations(range(len(places)), 2)
        ]
        similarities += len(places) * torch.stack(gaps).mean().item()
        num_positions += len(places)
        embeddings.append((student.mean(0), teacher[:, 0].mean(0), len(places)))
    distances = 0.0
    for group in (embeddings[:4], embeddings[4:]):
        sides = [torch.pdist(torch.stack([each[n] for each in group])) for n in (0, 1)]
        value = torch.nn.functional.smooth_l1_loss(*(side / side.mean() for side in sides))
        distances += value.item() * sum(each[2] for each in group)
    expected = {
        "hidden_state_cosine_first_7_1": cosines / num_positions,
        "relation_token_similarity_first_3_1": similarities / num_positions,
        "relation_distance_first_3_1": distances / num_positions,
    }
    for name, value in expected.items():
        assert curve(job, f"train/{name}")[1] == pytest.approx(value, rel=1e-5), name
    line = read_metrics(job.folder)[0]
    weighted = [loss["weight"] * line[f"train/{name}"] for loss, name in _named_losses()]
    assert line["train/loss"] == pytest.approx(sum(weighted))


def _named_losses():
    return zip(STATE_LOSSES, ["forward_kl", *NAMES_OF_STATE_LOSSES], strict=True)


def assert_same_curves(job, expected, names=("loss", *NAMES_OF_STATE_LOSSES)):
    for name in names:
        for prefix in ("train", "holdout"):
            metric = f"{prefix}/{name}"
            assert curve(job, metric) == pytest.approx(
                curve(expected, metric), rel=TOLERANCE, abs=TOLERANCE
            ), metric


@pytest.mark.parametrize("zero_stage", range(4))
@pytest.mark.parametrize(("workers", "packing"), [(1, False), (2, True)])
def test_workers_stages_and_packing_change_no_loss_on_hidden_states(
    run, state_reference, material, states, workers, packing, zero_stage
):
    name = f"states-w{workers}p{packing}z{zero_stage}"
    options = {"workers": workers, "packing": packing, "zero_stage": zero_stage}
    job = make_state_job(material, states, name, **options)
    run(job)
    assert run.micro_batches[name] == [[2 // workers] * 6] * workers
    assert_same_curves(job, state_reference)
    for key, value in final_weights(state_reference).items():
        np.testing.assert_allclose(final_weights(job)[key], value, atol=WEIGHTS_TOLERANCE)


@pytest.mark.parametrize(("old", "new"), [((1, 0), (1, 0)), ((2, 3), (2, 3)), ((2, 2), (1, 2))])
def test_learned_matrices_are_resumed(run, state_reference, material, states, old, new):
    (workers, zero_stage), name = old, "states-resume-{}-{}-{}-{}".format(*old, *new)
    job = make_state_job(material, states, name, workers=workers, zero_stage=zero_stage)
    with pytest.raises(ray.exceptions.RayTaskError, match="InterruptedError"):
        run(job, stop_before=3)
    job = make_state_job(material, states, name, workers=new[0], zero_stage=new[1])
    run(job)
    assert_same_curves(job, state_reference)


def test_a_matrix_cannot_come_on_resume(run, material, states):
    plain = [loss for loss in STATE_LOSSES if loss.get("projection") != "learned"]
    job = make_state_job(material, states, "states-later", losses=plain)
    with pytest.raises(ray.exceptions.RayTaskError, match="InterruptedError"):
        run(job, stop_before=3)
    with pytest.raises(TrainingError, match=r"learned projections: \[\] -> \[\"first"):
        run(make_state_job(material, states, "states-later", allow_resume_with=["losses"]))


def test_learned_matrices_are_trained_and_not_exported(
    run, state_reference, material, states, tmp_path
):
    plain = build_student(state_reference.config.student, 0)
    assert final_weights(state_reference).keys() == plain.state_dict().keys()
    path = latest_complete(state_reference.folder) / "zero" / "mp_rank_00_model_states.pt"
    found = torch.load(path, weights_only=True)["module"]
    matrices = [found[f"features.projections.{n}.weight"] for n in (0, 1)]
    assert [tuple(matrix.shape) for matrix in matrices] == [(32, 32), (32, 32)]
    figures = export_student(state_reference, str(tmp_path / "export"))
    assert figures["num_parameters"] == plain.num_parameters()


def test_groups_that_do_not_fit_are_refused(run, material, states):
    with pytest.raises(TrainingError, match=r"keeps 4 sequences in one micro-batch.*take 5\d"):
        run(make_state_job(material, states, "states-tight", tokens_per_micro_batch=40))


def test_bfloat16_trains_on_hidden_states(run, material, states):
    options = {"dtype": "bfloat16", "gradient_checkpointing": True}
    job = make_state_job(material, states, "states-bf16", zero_stage=2, student_options=options)
    run(job)
    losses = curve(job)
    assert losses[6] < losses[1]
