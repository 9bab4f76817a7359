"""Weights out of a training, and into another one."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from pipeline.cache.reader import open_cache
from pipeline.errors import ConfigError, TrainingError
from pipeline.sequences import read_dataset
from students.architecture.build import build_student, load_model
from students.checkpoints.resume import latest_complete
from students.data.examples import open_examples
from students.evaluation import Measured, domain_means, student_sums, teacher_holdout_numbers
from students.export.folder import export_student
from teachers.preflight.identity import student_identity
from tests.support.trainings import DOMAINS, VOCABULARY, curve, final_weights, make_spec, steps_of

pytestmark = pytest.mark.timeout(300)


def test_export_loads_and_evaluates_like_training(reference, material, tmp_path):
    spec, summary, _ = reference
    figures = export_student(spec, str(tmp_path / "export"))
    assert figures["agreement"]["tokens"] > 20
    assert figures["agreement"]["mean_difference"] < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert tokenizer.eos_token_id == 1
    assert (
        tokenizer.chat_template
        == AutoTokenizer.from_pretrained(spec.config.student.model).chat_template
    )
    assert (
        AutoModelForCausalLM.from_pretrained(tmp_path / "export").generation_config.eos_token_id
        == 1
    )
    card = (tmp_path / "export" / "README.md").read_text()
    assert spec.dataset_digest in card
    entries = [
        entry
        for entry in read_dataset(spec.layout, spec.dataset_digest)
        if entry.split == "holdout"
    ]
    examples = open_examples(
        spec.layout,
        spec.caches,
        list(spec.config.teachers),
        spec.config.combine,
        entries,
        VOCABULARY,
    )
    exported = load_model(tmp_path / "export")
    sums = student_sums(exported, entries, {None: Measured(examples)}, 64, True)
    numbers = domain_means(entries, sums[None])
    tokens = {d: sum(e.num_positions for e in entries if e.domain == d) for d in DOMAINS}
    assert {domain: found["tokens"] for domain, found in numbers.items()} == tokens
    for name, figure in (("loss", "cross_entropy"), ("kl_to_mixture", "forward_kl")):
        mean = np.average([numbers[d][name] for d in DOMAINS], weights=list(tokens.values()))
        assert mean == pytest.approx(summary["final"][f"holdout/{figure}"], rel=1e-4)
    readers = {name: open_cache(cache) for name, cache in spec.caches.items()}
    teachers = teacher_holdout_numbers(entries, examples, readers)
    # `first` alone is the mixture of `sums`
    assert teachers["first"]["sums"]["kl_to_mixture"] == pytest.approx(0, abs=1e-4)
    assert teachers["first"]["sums"]["agreement"] == 1
    assert teachers["first"]["sums"]["bounded_mass"] == 0
    assert teachers["second"]["sums"]["kl_to_mixture"] > 0.1


def test_a_training_starts_from_old_weights(run, reference, material, tmp_path):
    """The weights of checkpoints at every kind of stage, or of an export, and nothing else."""
    spec, expected = reference[0], final_weights(reference[0])
    export_student(spec, str(tmp_path / "export"))
    sources = {"export": str(tmp_path / "export"), "z0": str(latest_complete(spec.folder))}
    trained = {"export": expected, "z0": expected}
    for stage in (2, 3):
        partitioned = run(make_spec(material, f"source{stage}", workers=2, zero_stage=stage))
        sources[f"z{stage}"] = str(latest_complete(partitioned.folder))
        trained[f"z{stage}"] = final_weights(partitioned)
    identities = set()
    for name, source in sources.items():
        options = {"initial_weights": source}
        following = make_spec(material, f"after_{name}", student_options=options, steps=3)
        state = build_student(following.config.student, 7).state_dict()
        for key, value in trained[name].items():
            assert np.array_equal(state[key].numpy(), value), (name, key)
        identity = student_identity(following.config.student, following.layout)
        identities.add(identity["initial_weights"])
    assert len(identities) == 4
    following = run(dataclasses.replace(following, start=identity))
    assert steps_of(following) == [1, 2, 3]
    assert curve(following)[1] < 0.8 * curve(spec)[1]
    assert curve(following, "train/learning_rate")[1] == pytest.approx(0.01)
    export_student(following, str(tmp_path / "following"))
    card = (tmp_path / "following" / "README.md").read_text()
    assert Path(sources["z3"]).name in card and identity["initial_weights"] in card
    assert "initial_step: '6'" in card


def test_old_weights_that_do_not_fit_are_refused(reference, material, tmp_path):
    checkpoint = tmp_path / "step-00000006"
    shutil.copytree(latest_complete(reference[0].folder), checkpoint)
    spec = make_spec(
        material,
        "unfit",
        student_options={"model": str(tmp_path / "wide"), "initial_weights": str(checkpoint)},
    )
    config = LlamaConfig.from_pretrained(reference[0].config.student.model)
    config.num_hidden_layers, config.intermediate_size = 3, 64
    config.save_pretrained(tmp_path / "wide")
    with pytest.raises(TrainingError) as refusal:
        build_student(spec.config.student, 0)
    assert "model.layers.2.mlp.up_proj.weight is missing" in str(refusal.value)
    shapes = "model.layers.0.mlp.gate_proj.weight has shape (48, 32), the student's (64, 32)"
    assert shapes in str(refusal.value)
    config.num_hidden_layers, config.intermediate_size, config.tie_word_embeddings = 2, 48, True
    config.save_pretrained(tmp_path / "wide")
    with pytest.raises(TrainingError, match="is tied to another matrix"):
        build_student(spec.config.student, 0)
    (checkpoint / "COMPLETE").unlink()
    with pytest.raises(TrainingError, match="neither a complete checkpoint nor"):
        build_student(spec.config.student, 0)
    with pytest.raises(ConfigError, match="neither a complete checkpoint"):
        student_identity(spec.config.student, spec.layout)


def test_export_refuses_other_weights(reference, material, tmp_path):
    spec = make_spec(material, "tampered")
    shutil.copytree(reference[0].folder, spec.folder)
    weights = final_weights(spec)
    weights["lm_head.weight"] = weights["lm_head.weight"][::-1].copy()
    save_file(weights, Path(spec.folder, "final", "weights.safetensors"))
    with pytest.raises(TrainingError, match="does not compute with them what it computed"):
        export_student(spec, str(tmp_path / "export"))
    with pytest.raises(TrainingError, match="no finished training"):
        export_student(dataclasses.replace(spec, student="twin"), str(tmp_path / "export"))
