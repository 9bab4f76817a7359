"""Training on hidden states that a teacher's cache holds, with the real DeepSpeed."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from pipeline.cache.projection import to_bfloat16
from pipeline.cache.shard import write_shard
from pipeline.errors import TrainingError
from pipeline.fingerprint import digest_ids
from pipeline.layout import Layout
from pipeline.records import HiddenStates
from pipeline.sequences import read_dataset, read_sequences
from students.architecture.build import build_student
from students.checkpoints.resume import latest_complete
from students.data.batches import DataOrder
from students.export.folder import export_student
from students.progress import read_metrics
from tests.support.trainings import TOLERANCE, WEIGHTS_TOLERANCE, curve, final_weights, make_spec

pytestmark = pytest.mark.timeout(300)
HIDDEN_STATES = "first+features"
LOSSES = [
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
NAMES = [
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
    cache = layout.cache(HIDDEN_STATES, "1" * 32)
    write_shard(cache.shard(digest_ids(rows)), list(rows.values()), "1" * 32)
    return cache, rows


def make_hidden_states_spec(material, states, name, losses=LOSSES, **options):
    options = {"tokens_per_micro_batch": 60, **options}
    spec = make_spec(material, name, losses=losses, **options)
    return dataclasses.replace(
        spec,
        caches=spec.caches | {HIDDEN_STATES: states[0]},
        cache_fingerprints=spec.cache_fingerprints | {HIDDEN_STATES: "1" * 32},
    )


@pytest.fixture(scope="module")
def state_reference(run, material, states):
    """One worker, stage 0, everything in one micro-batch, unbroken."""
    spec = make_hidden_states_spec(material, states, "states", tokens_per_micro_batch=800)
    run(spec)
    return spec


def test_losses_on_hidden_states_are_those_of_plain_forwards(state_reference, states):
    """The first step, one sequence at a time by transformers; states before each token."""
    spec = state_reference
    entries = [e for e in read_dataset(spec.layout, spec.dataset_digest) if e.split == "train"]
    positions = [e.num_positions for e in entries]
    order = DataOrder(
        [e.shard for e in entries], positions, spec.config.seed, spec.dataset_digest, 8
    )
    model = build_student(spec.config.student, spec.config.seed)
    cosines, similarities, num_positions, embeddings = 0.0, 0.0, 0, []
    for i in order.batch(0):
        shard = read_sequences(str(Path(spec.layout.root, entries[i].shard)))
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
        assert curve(spec, f"train/{name}")[1] == pytest.approx(value, rel=1e-5), name
    line = read_metrics(spec.metrics_path)[0]
    weighted = [loss["weight"] * line[f"train/{name}"] for loss, name in _named_losses()]
    assert line["train/loss"] == pytest.approx(sum(weighted))


def _named_losses():
    return zip(LOSSES, ["forward_kl", *NAMES], strict=True)


def assert_same_curves(spec, expected, names=("loss", *NAMES)):
    for name in names:
        for prefix in ("train", "holdout"):
            metric = f"{prefix}/{name}"
            assert curve(spec, metric) == pytest.approx(
                curve(expected, metric), rel=TOLERANCE, abs=1e-6
            ), metric


@pytest.mark.parametrize("zero_stage", range(4))
@pytest.mark.parametrize(("workers", "packing"), [(1, False), (2, True)])
def test_workers_stages_and_packing_change_no_loss_on_hidden_states(
    run, state_reference, material, states, workers, packing, zero_stage
):
    name = f"states-w{workers}p{packing}z{zero_stage}"
    options = {"workers": workers, "packing": packing, "zero_stage": zero_stage}
    spec = make_hidden_states_spec(material, states, name, **options)
    run(spec)
    assert run.micro_batches[name] == [[2 // workers] * 6] * workers
    assert_same_curves(spec, state_reference)
    for key, value in final_weights(state_reference).items():
        np.testing.assert_allclose(final_weights(spec)[key], value, atol=WEIGHTS_TOLERANCE)


@pytest.mark.parametrize(("old", "new"), [((1, 0), (1, 0)), ((2, 3), (2, 3)), ((2, 2), (1, 2))])
def test_learned_matrices_are_resumed(run, state_reference, material, states, old, new):
    (workers, zero_stage), name = old, "states-resume-{}-{}-{}-{}".format(*old, *new)
    spec = make_hidden_states_spec(material, states, name, workers=workers, zero_stage=zero_stage)
    with pytest.raises(ray.exceptions.RayTaskError, match="InterruptedError"):
        run(spec, stop_before=3)
    spec = make_hidden_states_spec(material, states, name, workers=new[0], zero_stage=new[1])
    run(spec)
    assert_same_curves(spec, state_reference)


def test_a_matrix_cannot_come_on_resume(run, material, states):
    plain = [loss for loss in LOSSES if loss.get("projection") != "learned"]
    spec = make_hidden_states_spec(material, states, "states-later", losses=plain)
    with pytest.raises(ray.exceptions.RayTaskError, match="InterruptedError"):
        run(spec, stop_before=3)
    with pytest.raises(TrainingError, match=r"learned projections: \[\] -> \[\"first"):
        run(make_hidden_states_spec(material, states, "states-later", allow_resume_with=["losses"]))


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
    with pytest.raises(
        TrainingError, match=r"keeps 4 sequences in one micro-batch.*take 5\d tokens"
    ):
        run(make_hidden_states_spec(material, states, "states-tight", tokens_per_micro_batch=40))


def test_bfloat16_trains_on_hidden_states(run, material, states):
    options = {"dtype": "bfloat16", "gradient_checkpointing": True}
    spec = make_hidden_states_spec(
        material, states, "states-bf16", zero_stage=2, student_options=options
    )
    run(spec)
    losses = curve(spec)
    assert losses[6] < losses[1]
