"""Training through Ray Train and DeepSpeed, on a tiny student and a hand-made cache."""

import dataclasses
import json
import logging
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from pipeline.cache import write_shard
from pipeline.cache_index import open_cache
from pipeline.config import Config
from pipeline.config_training import CrossEntropy
from pipeline.datasets import DatasetEntry, read_dataset, write_dataset, write_sequences
from pipeline.errors import TrainingError
from pipeline.fingerprint import digest_ids, sequence_id
from pipeline.layout import Layout
from pipeline.records import SparseLogprobs, TokenSequence
from pipeline.training import TrainingJob
from students.checkpoint import latest_complete, read_metrics
from students.dataset import open_examples
from students.evaluation import holdout_numbers, teacher_holdout_numbers
from students.export import export_student
from students.launch import remove_stale_build_locks, train_student

VOCABULARY, DOMAINS, TEACHERS = 64, ("sums", "words"), ("first", "second")
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def cluster():
    os.environ["DS_ACCELERATOR"] = "cpu"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=True, configure_logging=False)
    yield
    ray.shutdown()


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
    length = int(generator.integers(6, 14))
    input_ids = generator.integers(2, VOCABULARY, length).astype(np.int32)
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
    logits = generator.normal(size=(num_positions, VOCABULARY)) * 3
    logits[np.arange(num_positions), sequence.gold_ids] += 5
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
            "synthesis": {"generator": "every_teacher"},
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
                "learning_rate": 0.01,
                "warmup_steps": 2,
                "log_every_steps": 1,
                "evaluate_every_steps": 3,
                "checkpoint_every_steps": 2,
                "max_failures": 0,
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


@pytest.fixture(scope="module")
def reference(cluster, material):
    """One worker, stage 0, unbroken: what every other way of training must equal."""
    job = make_job(material, "reference")
    return job, train_student(job)


def test_summary_metrics_and_checkpoints(reference):
    job, summary = reference
    assert summary["steps"] == 6
    steps = [line["step"] for line in read_metrics(job.folder) if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert list(curve(job, "holdout/loss")) == [3, 6]
    first = read_metrics(job.folder)[0]
    assert first["train/loss"] == pytest.approx(
        first["train/forward_kl"] + 0.5 * first["train/cross_entropy"]
    )
    assert abs(first["train/cross_entropy"] - math.log(VOCABULARY)) < 0.2
    assert summary["final"]["holdout/loss"] == curve(job, "holdout/loss")[6]
    assert summary["final"]["train/loss"] < first["train/loss"]
    assert first["train/grad_norm"] > 0
    assert latest_complete(job.folder).name == "step-00000006"
    assert len(list(Path(job.folder, "checkpoints").iterdir())) == 2
    assert list(Path(job.folder, "tensorboard").glob("events*"))


def test_a_second_call_returns_the_finished_training(reference, material):
    job, summary = reference
    assert train_student(job) == summary
    with pytest.raises(TrainingError, match=r"learning_rate: 0.01 -> 0.02"):
        train_student(make_job(material, "reference", learning_rate=0.02))


@pytest.mark.parametrize(("workers", "zero_stage"), [(2, 0), (1, 3), (2, 3)])
def test_workers_and_zero_stages_change_nothing(reference, material, workers, zero_stage):
    job = make_job(material, f"w{workers}z{zero_stage}", workers=workers, zero_stage=zero_stage)
    train_student(job)
    for name in ("train/loss", "train/grad_norm", "holdout/loss"):
        expected = curve(reference[0], name)
        # float32 sums in another order, through six optimizer steps
        assert curve(job, name) == pytest.approx(expected, rel=2e-3), name
    weights, expected = (torch_weights(j) for j in (job, reference[0]))
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert np.abs(value - expected[name]).max() < 5e-3, name


def torch_weights(job):
    from safetensors.numpy import load_file

    return load_file(Path(job.folder, "final", "weights.safetensors"))


@pytest.mark.parametrize(("workers", "zero_stage"), [(1, 0), (2, 3)])
def test_resume_equals_the_unbroken_run(cluster, reference, material, workers, zero_stage):
    whole = (
        reference[0]
        if zero_stage == 0
        else make_job(material, "whole3", workers=workers, zero_stage=zero_stage)
    )
    train_student(whole)
    # a run that died after step 5: its newest complete checkpoint is step 4, later lines and files
    # lie about
    broken = make_job(material, f"broken{zero_stage}", workers=workers, zero_stage=zero_stage)
    shutil.copytree(
        whole.folder,
        broken.folder,
        ignore=shutil.ignore_patterns("training.json", "final", "tensorboard"),
    )
    newest = latest_complete(broken.folder)
    (newest / "COMPLETE").unlink()
    state_path = latest_complete(broken.folder) / "state.json"
    assert json.loads(state_path.read_text())["step"] == 4
    metrics = Path(broken.folder, "metrics.jsonl")
    lines = [line for line in metrics.read_text().splitlines() if json.loads(line)["step"] <= 5]
    metrics.write_text("\n".join(lines) + '\n{"step": 5, "trai')
    train_student(broken)
    steps = [line["step"] for line in read_metrics(broken.folder) if "train/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert curve(broken) == curve(whole)
    for name, value in torch_weights(broken).items():
        assert np.array_equal(value, torch_weights(whole)[name]), name


def test_resume_on_other_workers_at_stage_0_and_refusals(cluster, reference, material):
    moved = make_job(material, "moved", workers=2)
    shutil.copytree(
        reference[0].folder, moved.folder, ignore=shutil.ignore_patterns("training.json", "final")
    )
    (latest_complete(moved.folder) / "COMPLETE").unlink()
    train_student(moved)
    assert curve(moved) == pytest.approx(curve(reference[0]), rel=2e-3)
    Path(moved.summary_path).unlink()
    with pytest.raises(TrainingError) as refusal:
        train_student(make_job(material, "moved", workers=2, zero_stage=1, weight_decay=0.2))
    assert "zero_optimization.stage: 0 -> 1" in str(refusal.value)
    assert "training.weight_decay: 0.1 -> 0.2" in str(refusal.value)
    assert "workers" not in str(refusal.value)


def test_a_worker_that_dies_is_restarted_from_the_checkpoint(
    cluster, reference, material, monkeypatch, tmp_path
):
    marker = tmp_path / "died"
    job = make_job(material, "dies", max_failures=1)
    monkeypatch.setattr("students.launch._worker", dying_worker(str(marker)))
    train_student(job)
    assert marker.exists()
    assert curve(job) == curve(reference[0])


def dying_worker(marker):
    def worker(config):
        import os
        from pathlib import Path

        import students.launch

        original = students.launch._worker
        if not Path(marker).exists():
            os.environ["DS_ACCELERATOR"] = "cpu"
            import students.trainer

            step = students.trainer.train_step

            def train_step(engine, *args):
                if engine.global_steps == 5:
                    Path(marker).touch()
                    os.kill(os.getpid(), 9)
                return step(engine, *args)

            students.trainer.train_step = train_step
        original(config)

    return worker


def test_twin_needs_no_cache_and_missing_caches_are_named(cluster, material):
    job = make_job(material, "twin", student="twin", caches={}, steps=3)
    summary = train_student(job)
    assert "train/forward_kl" not in summary["final"]
    with pytest.raises(TrainingError, match="second"):
        train_student(make_job(material, "lacking", caches={"first": material[2]["first"]}))


def test_long_sequences_are_listed(cluster, material):
    with pytest.raises(TrainingError, match="longer than training.tokens_per_micro_batch"):
        train_student(make_job(material, "long", tokens_per_micro_batch=8))


@pytest.mark.parametrize(("dtype", "zero_stage"), [("bfloat16", 0), ("bfloat16", 2)])
def test_bfloat16_trains_and_exports(cluster, reference, material, dtype, zero_stage, tmp_path):
    options = {"dtype": dtype, "gradient_checkpointing": True}
    job = make_job(material, f"{dtype}{zero_stage}", zero_stage=zero_stage, student_options=options)
    summary = train_student(job)
    assert summary["final"]["train/loss"] == pytest.approx(
        reference[1]["final"]["train/loss"], rel=0.02
    )
    export_student(job, str(tmp_path / "export"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == torch.bfloat16


def test_tied_student_at_stage_3(cluster, material, tmp_path):
    root, *_ = material
    write_student(root / "tied", tied=True)
    options = {"model": str(root / "tied")}
    jobs = [
        make_job(material, f"tied{stage}", zero_stage=stage, student_options=options)
        for stage in (0, 3)
    ]
    for job in jobs:
        train_student(job)
    assert curve(jobs[1]) == pytest.approx(curve(jobs[0]), rel=2e-3)
    assert "lm_head.weight" not in torch_weights(jobs[1])
    export_student(jobs[1], str(tmp_path / "export"))


def test_export_loads_and_evaluates_like_training(reference, material, tmp_path):
    job, summary = reference
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


def test_export_refuses_other_weights(reference, material, tmp_path):
    from safetensors.numpy import save_file

    job = make_job(material, "tampered")
    shutil.copytree(reference[0].folder, job.folder)
    weights = torch_weights(job)
    weights["lm_head.weight"] = weights["lm_head.weight"][::-1].copy()
    save_file(weights, Path(job.folder, "final", "weights.safetensors"))
    with pytest.raises(TrainingError, match="differs from the trained one"):
        export_student(job, str(tmp_path / "export"))
    with pytest.raises(TrainingError, match="no finished training"):
        export_student(dataclasses.replace(job, student="twin"), str(tmp_path / "export"))


def test_progress_reaches_the_drivers_log(cluster, material, caplog):
    caplog.set_level(logging.INFO, logger="students.launch")
    train_student(make_job(material, "logged", steps=3, log_every_steps=3))
    lines = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("student step 3/3 train/loss=") for line in lines)
    assert any(line.startswith("student step 3/3 holdout/loss=") for line in lines)


def test_only_locks_without_a_living_builder_are_removed(tmp_path):
    for name in ("dead", "alive"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    with (tmp_path / "alive" / "lock").open():
        assert remove_stale_build_locks(tmp_path) == [tmp_path / "dead" / "lock"]
    assert (tmp_path / "alive" / "lock").exists()
