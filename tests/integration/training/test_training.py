"""Training on a tiny student and a hand-made cache, with the real DeepSpeed."""

import itertools
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import TrainingError
from pipeline.sequences import read_dataset, read_sequences
from students.architecture.build import build_student
from students.checkpoints.resume import latest_complete
from students.data.batches import DataOrder
from students.export.folder import export_student
from students.launching.launch import train_student
from students.progress import read_metrics
from tests.support.architectures import ARCHITECTURES
from tests.support.trainings import (
    LONGEST,
    STEPS,
    TOLERANCE,
    VOCABULARY,
    WEIGHTS_TOLERANCE,
    curve,
    final_weights,
    make_spec,
    steps_of,
    write_student,
)

SHARDED = ("Qwen3-MoE", "DeepSeek-V3", "Gemma 3", "LFM2", "Falcon-H1")
pytestmark = pytest.mark.timeout(300)
TOKENS_FOR_ACCUMULATION = {1: 800, 2: 58}
"""Over all workers, so that every step of 8 sequences takes this many micro-batches on each."""


def test_summary_metrics_and_checkpoints(reference):
    spec, summary, _ = reference
    assert summary["steps"] == 6
    assert steps_of(spec) == STEPS
    assert list(curve(spec, "holdout/loss")) == [3, 6]
    first = read_metrics(spec.metrics_path)[0]
    assert first["train/loss"] == pytest.approx(
        first["train/forward_kl"] + 0.5 * first["train/cross_entropy"]
    )
    assert first["train/grad_norm"] > 0
    assert summary["final"]["holdout/loss"] == curve(spec, "holdout/loss")[6]
    assert summary["final"]["train/loss"] < 0.8 * first["train/loss"]
    assert curve(spec, "holdout/loss")[6] < curve(spec, "holdout/loss")[3]
    assert latest_complete(spec.folder).name == "step-00000006"
    assert len(list(Path(spec.folder, "checkpoints").iterdir())) == 2
    entries = {e.sequence_id: e for e in read_dataset(spec.layout, spec.dataset_digest)}
    train = [entry for entry in entries.values() if entry.split == "train"]
    positions = [e.num_positions for e in train]
    order = DataOrder([e.shard for e in train], positions, spec.config.seed, spec.dataset_digest, 8)
    seen = [train[i].num_tokens for step in range(6) for i in order.batch(step)]
    assert summary["tokens"] == sum(seen)


def test_tensorboard_events_equal_the_metrics(reference):
    spec, *_ = reference
    events = EventAccumulator(str(Path(spec.folder, "tensorboard"))).Reload()
    for name in ("train/loss", "train/learning_rate", "holdout/forward_kl"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx(curve(spec, name), rel=1e-6)


def test_progress_reaches_the_drivers_log(reference):
    spec, summary, lines = reference
    assert lines[0] == "student: step 0 of 6, workers: 1"
    removed, place, begun = lines[1:4]
    assert removed.startswith("student found ") and "is dead" in removed
    assert place.startswith(f"student runs on {socket.gethostname()} (")
    assert begun == "student begins at step 0"
    assert [line.split(":")[0] for line in lines[4:-1]] == [f"student step {n}/6" for n in STEPS]
    loss, holdout = curve(spec)[3], curve(spec, "holdout/loss")[3]
    assert lines[6].startswith(f"student step 3/6: loss {loss:.4g}, hold-out loss {holdout:.4g}, ")
    assert lines[-1].startswith(f"student: 6 steps, {summary['tokens']} tokens in ")


def test_a_second_call_returns_the_finished_training(reference, material):
    spec, summary, _ = reference
    assert train_student(spec) == summary
    with pytest.raises(TrainingError, match=r"learning_rate: 0.02 -> 0.03"):
        train_student(make_spec(material, "reference", learning_rate=0.03))


def test_the_loss_counts_the_tokens_of_the_loss_spans_and_no_others(reference):
    """The first step's cross-entropy, from a plain forward of one sequence at a time."""
    spec, *_ = reference
    entries = [e for e in read_dataset(spec.layout, spec.dataset_digest) if e.split == "train"]
    positions = [e.num_positions for e in entries]
    order = DataOrder(
        [e.shard for e in entries], positions, spec.config.seed, spec.dataset_digest, 8
    )
    model, total, count = build_student(spec.config.student, spec.config.seed), 0.0, 0
    for i in order.batch(0):
        shard = read_sequences(str(Path(spec.layout.root, entries[i].shard)))
        sequence = next(s for s in shard if s.sequence_id == entries[i].sequence_id)
        ids = torch.tensor(sequence.input_ids[None].astype(np.int64))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        for start, stop in sequence.loss_spans:
            for place in range(start, stop):
                total -= logprobs[place - 1, sequence.input_ids[place]].item()
                count += 1
    assert curve(spec, "train/cross_entropy")[1] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("zero_stage", range(4))
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_zero_stages_packing_and_accumulation_change_nothing(
    run, reference, material, workers, zero_stage
):
    for packing, accumulation in itertools.product((True, False), (1, 2)):
        name = f"w{workers}z{zero_stage}p{packing}a{accumulation}"
        spec = make_spec(
            material,
            name,
            workers=workers,
            zero_stage=zero_stage,
            packing=packing,
            tokens_per_micro_batch=TOKENS_FOR_ACCUMULATION[accumulation] // workers,
        )
        run(spec)
        assert run.micro_batches[name] == [[accumulation] * 6] * workers
        for metric in ("train/loss", "train/grad_norm", "holdout/loss"):
            found, expected = curve(spec, metric), curve(reference[0], metric)
            # float32 sums in another order: exact to rounding at first, then through Adam
            if 1 in expected:
                assert found[1] == pytest.approx(expected[1], rel=1e-5), (name, metric)
            assert found == pytest.approx(expected, rel=TOLERANCE), (name, metric)
        weights, expected = final_weights(spec), final_weights(reference[0])
        assert weights.keys() == expected.keys()
        for key, value in weights.items():
            assert np.abs(value - expected[key]).max() < WEIGHTS_TOLERANCE, (name, key)


def test_twin_needs_no_cache(run, material):
    twin = run(make_spec(material, "twin", student="twin", caches={}, steps=3))
    assert "train/forward_kl" not in read_metrics(twin.metrics_path)[-1]
    assert curve(twin)[3] < curve(twin)[1]


def test_a_list_of_losses_is_mixed_and_logged_apart(run, material):
    losses = [
        {"type": "reverse_kl", "weight": 0.5, "temperature": 2.0},
        {"type": "jensen_shannon", "weight": 2.0, "beta": 0.5, "temperature": 2.0},
        {"type": "cross_entropy", "weight": 0.25},
    ]
    spec = run(make_spec(material, "mixed", losses=losses, workers=2, zero_stage=3))
    lines = read_metrics(spec.metrics_path)
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
        run(make_spec(material, "long", tokens_per_micro_batch=8))


def test_a_loss_that_is_no_number_stops_training_and_leaves_no_checkpoint_of_it(run, material):
    spec = make_spec(material, "diverges", learning_rate=1e30, warmup_steps=0, log_every_steps=6)
    with pytest.raises(TrainingError, match=r"at step 2 the loss is .* norm is nan; lower"):
        run(spec)
    assert latest_complete(spec.folder) is None


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_bfloat16_with_gradient_checkpointing_trains_and_exports(
    run, reference, material, zero_stage, tmp_path
):
    options = {"dtype": "bfloat16", "gradient_checkpointing": True}
    spec = make_spec(
        material, f"bfloat16{zero_stage}", zero_stage=zero_stage, student_options=options
    )
    run(spec)
    assert curve(spec)[1] == pytest.approx(curve(reference[0])[1], rel=0.02)
    assert curve(spec)[6] < 0.8 * curve(spec)[1]
    export_student(spec, str(tmp_path / "export"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "export").dtype == torch.bfloat16


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_bfloat16_gradients_of_many_micro_batches_stay_near_those_of_one(run, material, zero_stage):
    """DeepSpeed adds up bfloat16 gradients in bfloat16, where stages 1 to 3 are not told otherwise:
    8 bits, so that each of 5 to 8 additions may be off by 0.2 % of the sum.
    """
    options = {"zero_stage": zero_stage, "student_options": {"dtype": "bfloat16"}}
    zero = {"stage": zero_stage, "stage3_param_persistence_threshold": 0}
    wide = {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}
    ways = {"one": {"tokens_per_micro_batch": 800}, "many": {"tokens_per_micro_batch": LONGEST}}
    if zero_stage:
        ways["wide"] = {"tokens_per_micro_batch": LONGEST, "deepspeed": wide}
    specs = {}
    for way, others in ways.items():
        specs[way] = run(make_spec(material, f"sums-{way}{zero_stage}", **options, **others))
        (counts,) = run.micro_batches[specs[way].config.name]
        assert counts == [1] * 6 if way == "one" else min(counts) >= 5
    for way, spec in specs.items():
        norms = curve(spec, "train/grad_norm"), curve(specs["one"], "train/grad_norm")
        assert norms[0][1] == pytest.approx(norms[1][1], rel=1e-2), way
        assert curve(spec) == pytest.approx(curve(specs["one"]), rel=2e-2), way


def test_gradient_checkpointing_changes_no_number(run, reference, material):
    options = {"gradient_checkpointing": True}
    spec = run(make_spec(material, "recomputes", steps=6, student_options=options))
    assert curve(spec) == pytest.approx(curve(reference[0]), rel=1e-5)


def test_tied_student_at_stage_3(run, material, tmp_path):
    root, *_ = material
    write_student(root / "tied", tied=True)
    options = {"model": str(root / "tied")}
    specs = [
        run(make_spec(material, f"tied{stage}", zero_stage=stage, student_options=options))
        for stage in (0, 3)
    ]
    assert curve(specs[1]) == pytest.approx(curve(specs[0]), rel=2e-3)
    assert "lm_head.weight" not in final_weights(specs[1])
    export_student(specs[1], str(tmp_path / "export"))


@pytest.mark.parametrize("name", SHARDED)
def test_two_workers_at_stage_3_train_every_kind_of_layer_as_one(run, material, tmp_path, name):
    """Experts, latent attention, windows, convolutions and states in partitioned weights."""
    root, *_ = material
    (architecture,) = [each for each in ARCHITECTURES if each.name == name]
    folder = shutil.copytree(root / "student", tmp_path / "student")
    own = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(architecture.kind, **architecture.config | own)
    config.save_pretrained(folder)
    options = {"student_options": {"model": str(folder)}, "packing": architecture.packs}
    kind = architecture.kind
    one = run(make_spec(material, f"{kind}-one", **options))
    two = run(make_spec(material, f"{kind}-two", workers=2, zero_stage=3, **options))
    for metric in ("train/loss", "train/grad_norm", "holdout/loss"):
        found, expected = curve(two, metric), curve(one, metric)
        if 1 in expected:
            assert found[1] == pytest.approx(expected[1], rel=1e-5), metric
        assert found == pytest.approx(expected, rel=TOLERANCE), metric
    weights, expected = final_weights(two), final_weights(one)
    assert weights.keys() == expected.keys()
    for key, value in weights.items():
        # Adam makes a whole step of the rounding of a gradient next to 0, so single weights differ.
        assert np.abs(value - expected[key]).mean() < WEIGHTS_TOLERANCE / 10, key
    export_student(two, str(tmp_path / "export"))
