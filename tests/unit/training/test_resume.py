"""The checkpoints that a training resumes from or refuses, without any training."""

import dataclasses
import itertools
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import AdamW

from jobs.__main__ import _load, main, parse
from jobs.bookkeeping.stage_records import read_record
from jobs.stages import entry
from jobs.stages import train as train_stage
from pipeline import storage
from pipeline.config.load import load_config
from pipeline.config.training import IDENTITY
from pipeline.errors import ConfigError, TrainingError
from pipeline.layout import Layout
from pipeline.run.training_spec import TrainingSpec
from students.architecture.initial_weights import checkpoint_weights
from students.checkpoints import ranks
from students.checkpoints.attempts import begin_attempt
from students.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from students.checkpoints.resume import (
    TrainingState,
    allowed_changes,
    check_resume,
    prepare_resume,
)
from students.deepspeed_engine import make_optimizer
from students.progress import MetricsLog

CONFIG = Path(__file__).resolve().parents[3] / "examples/quickstart/config.yaml"
NODES = [f"n-s{rank} (10.77.0.1{rank})" for rank in range(4)]
WORKS = {(0, 0), (1, 1), (1, 2), (2, 1), (2, 2), (3, 3)}


def make_spec(tmp_path, stage=0, workers=1, tokenizer="one", overrides=()):
    zero = f"training.deepspeed={{zero_optimization: {{stage: {stage}}}}}"
    config = load_config(CONFIG, [zero, f"training.workers={workers}", *overrides])
    layout = Layout(str(tmp_path), "run")
    caches = {name: layout.cache(name, "f" * 32) for name in config.teachers}
    return TrainingSpec(
        config=config,
        layout=layout,
        dataset_digest="d",
        student="student",
        losses=tuple(config.training.losses),
        caches=caches,
        cache_fingerprints=dict.fromkeys(caches, "f" * 32),
        tokenizer=tokenizer,
    )


class SavingStudent:
    """A student under DeepSpeed that only writes a file, which may fail."""

    def __init__(self, fails=False, width=4):
        self.parameter_shapes = {"model.head": [7, 4], "features.projections.0.weight": [width, 4]}
        self.fails, self.deepspeed = fails, SimpleNamespace(save_checkpoint=self.save)
        self.loaded, self.device = [], torch.device("cpu")

    def save(self, path, tag, save_latest):
        """Writes the files of all workers: the test is rank 0."""
        Path(path, tag).mkdir(parents=True)
        Path(path, tag, "state.pt").write_bytes(b"state")
        for rank in range(4):
            Path(path, f"rng-{rank}.pt").write_bytes(b"state")
            Path(path, tag, f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").write_bytes(b"state")
        if self.fails:
            raise InterruptedError

    def load(self, folder, tag):
        self.loaded.append(folder)
        return True


@pytest.fixture(autouse=True, scope="module")
def process_group(tmp_path_factory):
    place = tmp_path_factory.mktemp("group") / "file"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def save(spec, *steps, fails=False, student=None):
    attempt = begin_attempt(spec.folder, "here")
    for step in steps:
        state = TrainingState(step, 8 * step, 10 * step, 1.0)
        save_checkpoint(student or SavingStudent(fails), spec, state, attempt, NODES)


def complete(spec):
    return sorted(path.parent.name for path in Path(spec.folder).glob("checkpoints/*/COMPLETE"))


def test_old_checkpoints_go_only_after_a_newer_one_is_complete(tmp_path):
    training = make_spec(tmp_path, overrides=["training.keep_checkpoints=2"])
    save(training, 10, 20)
    with pytest.raises(InterruptedError):
        save(training, 30, fails=True)
    assert Path(training.folder, "checkpoints/step-00000030/zero/state.pt").exists()
    assert complete(training) == ["step-00000010", "step-00000020"]
    assert check_resume(training).state == TrainingState(20, 160, 200, 1.0)
    save(training, 30)
    assert complete(training) == ["step-00000020", "step-00000030"]
    assert len(list(Path(training.folder, "checkpoints").iterdir())) == 2
    assert check_resume(training).state.step == 30


def test_a_checkpoint_is_not_complete_without_the_files_of_a_worker(tmp_path, monkeypatch):
    """Rank 1's node does not mount the folder, and keeps its files to itself."""
    monkeypatch.setattr(ranks, "WAIT_SECONDS", 0.0)
    for stage, lacking in ((0, "rng-1.pt"), (2, "rng-1.pt"), (2, "zero/zero_pp_rank_1_*")):
        training = make_spec(tmp_path / f"{stage}{lacking[:4]}", stage, workers=2)
        save(training, 10)
        with pytest.raises(TrainingError) as refusal:
            save(training, 20, student=LosingStudent(lacking))
        assert "rank 1 on n-s1 (10.77.0.11) does not write to " in str(refusal.value)
        assert "is the folder mounted there?" in str(refusal.value)
        assert complete(training) == ["step-00000010"]
        assert check_resume(training).state.step == 10


class LosingStudent(SavingStudent):
    """A student that writes all files but those that fit a pattern."""

    def __init__(self, lacking):
        super().__init__()
        self.lacking = lacking

    def save(self, path, tag, save_latest):
        super().save(path, tag, save_latest)
        for file in Path(path).glob(self.lacking):
            file.unlink()


def test_files_that_show_late_are_waited_for(tmp_path, monkeypatch):
    training = make_spec(tmp_path, 2, workers=2)
    late = threading.Timer(0.3, lambda: place.write_bytes(b"state"))
    place = Path(training.folder, "checkpoints/step-00000010/zero/zero_pp_rank_1_mp_rank_00_x.pt")
    monkeypatch.setattr(ranks, "PAUSE_SECONDS", 0.01)
    late.start()
    save(training, 10, student=LosingStudent("zero/zero_pp_rank_1_*"))
    late.join()
    assert complete(training) == ["step-00000010"]


def test_an_old_checkpoint_that_lacks_a_worker_is_passed_over(tmp_path, caplog):
    """Its marker stands, since versions before looked at no files."""
    training = make_spec(tmp_path, 2, workers=2, overrides=["training.keep_checkpoints=3"])
    save(training, 10, 20, 30)
    for step in (20, 30):
        Path(training.folder, f"checkpoints/step-000000{step}/rng-1.pt").unlink()
    assert check_resume(training).state.step == 10
    assert "step-00000030 lacks the files of rank 1, so training resumes" in caplog.text
    save(training, 40)
    assert complete(training) == ["step-00000010", "step-00000040"]
    caplog.clear()
    assert check_resume(training).state.step == 40
    assert "lacks" not in caplog.text


def test_nothing_starts_anew_beside_a_checkpoint_that_can_be_mended(tmp_path):
    training = make_spec(tmp_path, 2, workers=2)
    save(training, 10)
    checkpoint = Path(training.folder, "checkpoints/step-00000010")
    (checkpoint / "rng-1.pt").rename(tmp_path / "rng-1.pt")
    with pytest.raises(TrainingError, match=r"lacks the files of rank 1, .* copy them here"):
        check_resume(training)
    with pytest.raises(TrainingError, match="lacks the files of rank 1"):
        checkpoint_weights(checkpoint)
    (tmp_path / "rng-1.pt").rename(checkpoint / "rng-1.pt")
    assert check_resume(training).state.step == 10


def test_of_two_trainings_in_a_folder_the_one_that_began_last_goes_on(tmp_path):
    training = make_spec(tmp_path, overrides=["training.keep_checkpoints=1"])
    older, newer = (begin_attempt(training.folder, node) for node in ("n-s1", "n-s2"))
    state = TrainingState(10, 80, 100, 1.0)
    save_checkpoint(SavingStudent(), training, state, newer, NODES)
    for step in (10, 20):  # neither a step that the newer one has nor another
        with pytest.raises(TrainingError, match=r"began at .* on node n-s2 \(attempt 2\), so this"):
            save_checkpoint(SavingStudent(), training, TrainingState(step, 0, 0, 1), older, NODES)
    assert [path.name for path in Path(training.folder, "checkpoints").iterdir()] == [
        "step-00000010"
    ]
    log = MetricsLog(training.metrics_path, 10, newer.check)
    with pytest.raises(TrainingError, match="this one ends"):
        MetricsLog(training.metrics_path, 0, older.check)
    begin_attempt(training.folder, "n-s3")
    with pytest.raises(TrainingError, match="n-s3"):
        log.write(11, {})
    Path(training.folder, "attempt.json").unlink()
    with pytest.raises(TrainingError, match=r"attempt\.json is gone"):
        newer.check()


def test_an_older_training_that_is_writing_completes_no_checkpoint(tmp_path):
    training = make_spec(tmp_path)
    attempt = begin_attempt(training.folder, "n-s1")
    student = SavingStudent()
    saved = student.deepspeed.save_checkpoint

    def save_while_another_begins(*arguments, **options):
        begin_attempt(training.folder, "n-s2")
        saved(*arguments, **options)

    student.deepspeed.save_checkpoint = save_while_another_begins
    with pytest.raises(TrainingError, match="so this one ends"):
        save_checkpoint(student, training, TrainingState(10, 80, 100, 1.0), attempt, NODES)
    assert complete(training) == []


def test_the_seconds_of_training_are_those_of_all_its_starts(tmp_path, monkeypatch):
    """A start was killed after a checkpoint of the twin and the end of the student."""
    student = make_spec(tmp_path)
    twin = dataclasses.replace(student, student="twin")
    clock = SimpleNamespace(now=1000.0)

    def train(spec):
        clock.now += 7
        summary = {"identity": {}, "steps": 20, "tokens": 200}
        summary["seconds"] = 47.0 if spec is twin else 300.0
        storage.write_json(spec.summary_path, summary)
        return summary

    monkeypatch.setattr(train_stage, "time", SimpleNamespace(time=lambda: clock.now))
    monkeypatch.setattr(train_stage, "ray", SimpleNamespace(nodes=list))
    monkeypatch.setattr(train_stage, "dataset_to_train_on", lambda run: "d")
    monkeypatch.setattr(train_stage, "stage_key", lambda *_: "key")
    monkeypatch.setattr(train_stage, "training_specs", lambda *_: [student, twin])
    monkeypatch.setattr("teachers.pool.placement.check_placement", lambda *_: None)
    monkeypatch.setattr("students.launching.launch.train_student", train)
    storage.write_json(
        student.summary_path, {"identity": {}, "steps": 20, "tokens": 200, "seconds": 300.0}
    )
    attempt = begin_attempt(twin.folder, "here")
    save_checkpoint(SavingStudent(), twin, TrainingState(10, 20, 100, 40.0), attempt, NODES)

    run: Any = SimpleNamespace(config=student.config)
    record = train_stage.train(run)
    assert record.seconds == 300 + 40 + 2 * 7
    # Again, as when a file of the weights was lost: all of it is known already.
    entry._keep_record(student.layout, "train", record)
    again = train_stage.train(run)
    entry._keep_record(student.layout, "train", again)
    assert read_record(student.layout, "train").seconds == 300 + 47 + 2 * 7


@pytest.mark.parametrize("old_new", list(itertools.product(range(4), range(4))))
def test_stages_and_workers_that_resume_and_how(tmp_path, old_new):
    old, new = old_new
    save(make_spec(tmp_path, old, workers=2), 10)
    for workers in (1, 2, 4):
        wanted = make_spec(tmp_path, new, workers)
        if old_new in WORKS:
            assert check_resume(wanted).universal == (old > 0 and (old != new or workers != 2))
            continue
        at = {0: "0", 1: "1 or 2", 2: "1 or 2", 3: "3"}[old]
        with pytest.raises(TrainingError, match=f"{old} -> {new} .* at stage {at} only"):
            check_resume(wanted)


@pytest.mark.parametrize("key", ["partitioning", "sequences", "shapes"])
def test_a_checkpoint_that_does_not_say_what_resume_needs_is_named(tmp_path, key):
    training = make_spec(tmp_path)
    save(training, 10)
    path = Path(training.folder, "checkpoints/step-00000010")
    state = json.loads((path / "state.json").read_text())
    del state[key]
    (path / "state.json").write_text(json.dumps(state))
    reads = [lambda: check_resume(training), lambda: checkpoint_weights(path)]
    for read in reads if key == "partitioning" else reads[:1]:
        message = rf"step-00000010 lacks {key} in .*: go on with .*, or remove the checkpoint"
        with pytest.raises(TrainingError, match=message):
            read()


def test_what_was_learned_is_compared(tmp_path):
    """Weights that a new fit moved make another target, even with the same config."""
    learned = {"words": {"words": 0.75, "arithmetic": 0.25}}
    combine = "combine={method: mixture, weights: {type: learned}}"
    training = dataclasses.replace(make_spec(tmp_path, overrides=[combine]), learned=learned)
    save(training, 10)
    assert check_resume(training).changes == []
    moved = dataclasses.replace(training, learned={"words": {"words": 0.5, "arithmetic": 0.5}})
    with pytest.raises(TrainingError, match=r"combine\.learned\.words\.words: 0\.75 -> 0\.5"):
        check_resume(moved)


def test_an_optimizer_on_the_cpu_does_not_take_over_another(tmp_path):
    save(make_spec(tmp_path, 2), 10)
    offload = "training.deepspeed.zero_optimization.offload_optimizer={device: cpu}"
    allow = "training.allow_resume_with=[training]"
    with pytest.raises(TrainingError, match="offload_optimizer: None -> "):
        check_resume(make_spec(tmp_path, 2, overrides=[offload, allow]))


def test_an_offload_to_nowhere_is_none(tmp_path):
    save(make_spec(tmp_path, 2), 10)
    nowhere = "training.deepspeed.zero_optimization.offload_optimizer={device: none}"
    allow = "training.allow_resume_with=[training.deepspeed]"
    training = make_spec(tmp_path, 2, overrides=[nowhere, allow])
    assert check_resume(training).state.step == 10
    assert type(make_optimizer(torch.nn.Linear(2, 2), training.config.training)) is AdamW


def test_exceptions_are_named_one_by_one_and_recorded(tmp_path):
    save(make_spec(tmp_path), 10)
    changes = ["training.learning_rate=0.5", "training.losses=[{type: cross_entropy, weight: 1}]"]
    names = ["tokenizer", "losses", "combine", "caches", "training.learning_rate"]
    for count in range(len(names)):
        allowed = f"training.allow_resume_with={json.dumps(names[:count])}"
        with pytest.raises(TrainingError) as refusal:
            check_resume(make_spec(tmp_path, tokenizer="other", overrides=[*changes, allowed]))
        named = [name in str(refusal.value).split("\nto resume")[0] for name in names]
        assert named == [False] * count + [True] * (len(names) - count)
    allowed = f"training.allow_resume_with={json.dumps(names)}"
    changed = make_spec(tmp_path, tokenizer="other", overrides=[*changes, allowed])
    resume, engine = check_resume(changed), SavingStudent()
    assert load_checkpoint(engine, changed, resume) == TrainingState(10, 80, 100, 1.0)
    assert engine.loaded == [resume.path]
    (kept,) = allowed_changes(changed.folder)
    assert kept == {"step": 10, "differences": resume.changes}
    assert "tokenizer: 'one' -> 'other'" in resume.changes
    save(changed, 20)
    resume = check_resume(dataclasses.replace(changed, tokenizer="third"))
    assert resume.changes == ["tokenizer: 'other' -> 'third'"]
    load_checkpoint(engine, changed, resume)
    load_checkpoint(engine, changed, check_resume(changed))
    assert allowed_changes(changed.folder) == [kept]


def test_an_exception_names_whole_words_of_the_identity(tmp_path):
    assert sorted(make_spec(tmp_path).identity()) == sorted(IDENTITY)
    save(make_spec(tmp_path), 10)
    near = "training.allow_resume_with=[training.learning]"
    with pytest.raises(TrainingError, match=r"training\.learning_rate: "):
        check_resume(make_spec(tmp_path, overrides=["training.learning_rate=0.5", near]))
    for name, message in (("cache", "no part of"), ("student.dtype", "depends on student.dtype")):
        with pytest.raises(ConfigError, match=message):
            load_config(CONFIG, [f"training.allow_resume_with=[{name}]"])


@pytest.mark.parametrize("command", ["run", "submit train --address http://localhost:8265"])
def test_allow_travels_in_the_config(command):
    first, *rest = command.split()
    options = parse(
        [first, *rest[:1], str(CONFIG), *rest[1:], "--allow", "caches", "--allow", "losses"]
    )
    assert _load(options).training.allow_resume_with == ["caches", "losses"]


def test_train_starts_from_a_checkpoint_and_ends_with_the_export(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr("jobs.distill.run", lambda *arguments: called.append(arguments))
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(CONFIG), "--from-checkpoint", "old: 1", "name=again"]) == 0
    ((config, address, stages),) = called
    assert config.student.initial_weights == str(tmp_path / "old: 1")
    assert (config.name, address) == ("again", None)
    assert stages == ("prepare", "synthesize", "score", "train", "export")


def test_parameters_of_other_shapes_are_named_before_deepspeed_loads_any(tmp_path):
    training, other = make_spec(tmp_path), SavingStudent(width=2)
    save(training, 10)
    with pytest.raises(TrainingError) as refusal:
        load_checkpoint(other, training, check_resume(training))
    assert "\n  features.projections.0.weight: [4, 4] -> [2, 4]\n" in str(refusal.value)
    assert "model.head" not in str(refusal.value) and other.loaded == []


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path):
    save(make_spec(tmp_path), 10)
    fewer = ["training.steps=5", "training.warmup_steps=1", "training.allow_resume_with=[training]"]
    with pytest.raises(TrainingError, match=r"beyond the last step.* to at least 10"):
        check_resume(make_spec(tmp_path, overrides=fewer))


def test_a_checkpoint_that_deepspeed_cannot_convert_is_named_and_left_alone(tmp_path):
    save(make_spec(tmp_path, 1, workers=2), 10)
    with pytest.raises(TrainingError, match=r"could not convert .*step-00000010"):
        prepare_resume(make_spec(tmp_path, 1))
    names = {path.name for path in check_resume(make_spec(tmp_path, 1)).path.iterdir()}
    assert names == {"zero", *(f"rng-{rank}.pt" for rank in range(4)), "state.json", "COMPLETE"}
