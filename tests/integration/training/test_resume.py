"""An interrupted training goes on, on the same workers or others, or is refused."""

import dataclasses
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from pipeline.config.losses import CrossEntropy
from pipeline.errors import StorageError, TrainingError
from pipeline.sequences import read_dataset, write_dataset
from pipeline.storage import read_json
from students.checkpoints.resume import latest_complete
from students.data.batches import DataOrder
from students.export.folder import export_student
from students.launching.launch import train_student
from tests.support.disks import small_disk
from tests.support.trainings import (
    STEPS,
    TOLERANCE,
    WEIGHTS_TOLERANCE,
    curve,
    final_weights,
    make_spec,
    steps_of,
)

BF16_TOLERANCE = 2e-2
pytestmark = pytest.mark.timeout(300)


@pytest.mark.parametrize(
    ("workers", "zero_stage", "dtype"),
    [
        (1, 0, "float32"),
        (2, 1, "float32"),
        (2, 2, "float32"),
        (2, 3, "float32"),
        (2, 0, "bfloat16"),
        (2, 2, "bfloat16"),
        (2, 3, "bfloat16"),
    ],
)
def test_resume_equals_the_unbroken_run(run, material, workers, zero_stage, dtype):
    name = f"{workers}{zero_stage}{dtype}"
    options = {"workers": workers, "zero_stage": zero_stage, "student_options": {"dtype": dtype}}
    whole = run(make_spec(material, f"whole{name}", **options))
    broken = make_spec(material, f"broken{name}", loader_processes=2, **options)
    done = drawn_step(name)
    with pytest.raises(InterruptedError):
        run(broken, stop_before=done)
    assert latest_complete(broken.folder).name == f"step-{done - done % 2:08d}"
    assert steps_of(broken) == STEPS[:done]
    with Path(broken.folder, "metrics.jsonl").open("a") as stream:
        stream.write(f'{{"step": {done + 1}, "trai')
    # a checkpoint that was not finished does not count
    shutil.copytree(
        latest_complete(broken.folder),
        Path(broken.folder, "checkpoints", f"step-{done + 1:08d}"),
        ignore=shutil.ignore_patterns("COMPLETE", "state.json"),
    )
    run(broken)
    assert steps_of(broken) == STEPS
    for name in ("train/loss", "train/grad_norm", "train/learning_rate", "holdout/loss"):
        assert curve(broken, name) == curve(whole, name), name
    for name, value in final_weights(broken).items():
        assert np.array_equal(value, final_weights(whole)[name]), name


def drawn_step(name):
    """Steps done when a training ends, after its first checkpoint and before its last step."""
    return random.Random(name).randint(2, 5)


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_resume_in_bfloat16_on_fewer_workers(run, material, zero_stage):
    """One worker rounds other sums than two."""
    options = {"zero_stage": zero_stage, "student_options": {"dtype": "bfloat16"}}
    whole = run(make_spec(material, f"halves{zero_stage}", workers=2, **options))
    with pytest.raises(InterruptedError):
        run(make_spec(material, f"fewer{zero_stage}", workers=2, **options), stop_before=3)
    fewer = run(make_spec(material, f"fewer{zero_stage}", workers=1, **options))
    assert steps_of(fewer) == STEPS
    for name in ("train/loss", "holdout/loss"):
        assert curve(fewer, name) == pytest.approx(curve(whole, name), rel=BF16_TOLERANCE), name


@pytest.mark.parametrize(
    "stages",
    [(0, 0), (1, 1), (2, 2), (3, 3), (1, 2), (2, 1)],
    ids=lambda stages: "z{}z{}".format(*stages),
)
def test_resume_on_other_workers_and_at_other_stages(run, reference, material, stages):
    """A training of 2 workers goes on with 1 and with 4, and a training of 1 worker with 2."""
    old, new = stages
    broken = {
        workers: make_spec(material, f"w{workers}z{old}z{new}", workers=workers, zero_stage=old)
        for workers in (1, 2)
    }
    for spec in broken.values():
        with pytest.raises(InterruptedError):
            run(spec, stop_before=5)
    # of a conversion that was killed
    Path(latest_complete(broken[2].folder), ".universal-0123abcd", "zero").mkdir(parents=True)
    for before, after in ((2, 1), (2, 4), (1, 2)):
        name = f"w{before}w{after}z{old}z{new}"
        spec = make_spec(material, name, workers=after, zero_stage=new)
        shutil.copytree(broken[before].folder, spec.folder)
        run(spec)
        universal = Path(spec.folder, "checkpoints", "step-00000004", "universal")
        assert universal.exists() == (old > 0)
        assert old == 0 or not list(universal.parent.glob(".universal-*"))
        assert steps_of(spec) == STEPS
        for metric in ("train/loss", "train/grad_norm", "holdout/loss"):
            expected = pytest.approx(curve(reference[0], metric), rel=TOLERANCE)
            assert curve(spec, metric) == expected, (name, metric)
        for key, value in final_weights(spec).items():
            assert np.abs(value - final_weights(reference[0])[key]).max() < WEIGHTS_TOLERANCE, (
                name,
                key,
            )


def test_a_full_disk_is_told_once_and_training_goes_on_when_there_is_room(
    run, material, reference, tmp_path
):
    with small_disk(tmp_path / "disk", mebibytes=8) as disk:
        if not disk.mounted:
            pytest.skip("a disk that fills up is a tmpfs here: mounting one needs root")
        spec = make_spec(material, "full", max_failures=2)
        spec = dataclasses.replace(
            spec, layout=dataclasses.replace(spec.layout, models_root=str(disk.folder))
        )
        with pytest.raises(InterruptedError):
            run(spec, stop_before=3)
        # Room for metrics and Ray Train's own files; a checkpoint has 200 KB.
        disk.fill(leave_bytes=100_000)
        with pytest.raises(StorageError) as caught:
            train_student(spec)
        assert all(part in str(caught.value) for part in disk.message_parts), caught.value
        assert latest_complete(spec.folder).name == "step-00000002"
        disk.free()
        assert train_student(spec)["steps"] == STEPS[-1]
        assert curve(spec) == pytest.approx(curve(reference[0]), rel=TOLERANCE)


def test_resume_of_another_training_is_refused(run, material):
    broken = make_spec(material, "moved")
    with pytest.raises(InterruptedError):
        run(broken, stop_before=4)
    root, dataset_digest, caches = material
    entries = read_dataset(broken.layout, dataset_digest)
    other = (root, write_dataset(broken.layout, entries[:-1]), caches)
    changed = make_spec(other, "moved", workers=2, zero_stage=1, weight_decay=0.2)
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
            run(make_spec(material, name, zero_stage=zero_stage), stop_before=3)
        changed = {"weight_decay": weight_decay, "allow_resume_with": ["training.weight_decay"]}
        spec = run(make_spec(material, name, zero_stage=zero_stage, **changed))
        assert steps_of(spec) == STEPS
        weights[zero_stage, weight_decay] = final_weights(spec)
    for name, value in weights[0, 0.9].items():
        if value.ndim == 2:
            assert np.abs(value - weights[0, 0.1][name]).max() > 10 * WEIGHTS_TOLERANCE, name
        for stage in (2, 3):
            assert np.abs(value - weights[stage, 0.9][name]).max() < WEIGHTS_TOLERANCE, name
    export_student(spec, str(tmp_path / "export"))
    card = (tmp_path / "export" / "README.md").read_text()
    assert "training.weight_decay: 0.1 -> 0.9" in card


def test_batches_of_another_size_skip_no_data_and_repeat_none(run, material):
    """Four steps of 8 sequences before the resume and two of 4 after it."""
    with pytest.raises(InterruptedError):
        run(make_spec(material, "smaller"), stop_before=5)
    options = {"sequences_per_step": 4, "allow_resume_with": ["training.sequences_per_step"]}
    spec = run(make_spec(material, "smaller", loader_processes=2, **options))
    assert steps_of(spec) == STEPS
    entries = read_dataset(spec.layout, spec.dataset_digest)
    train = [entry for entry in entries if entry.split == "train"]
    positions = [e.num_positions for e in train]
    order = DataOrder([e.shard for e in train], positions, spec.config.seed, spec.dataset_digest, 1)
    seen = [train[i].num_tokens for place in range(4 * 8 + 2 * 4) for i in order.batch(place)]
    assert read_json(spec.summary_path)["tokens"] == sum(seen)


def test_a_killed_worker_is_replaced_and_training_goes_on_exactly(
    run, cluster, material, monkeypatch, tmp_path
):
    """Rank 1 of 2 kills itself by its id in a drawn step and leaves the lock of an unfinished
    build.
    """
    whole = run(make_spec(material, "alive", workers=2))
    spec, marker = make_spec(material, "dies", workers=2, max_failures=1), tmp_path / "died"
    monkeypatch.setattr("students.launching.launch._worker", dying_worker(marker, cluster))
    train_student(spec)
    assert marker.exists() and not cluster.exists()
    assert steps_of(spec) == STEPS
    assert curve(spec) == curve(whole)
    assert curve(spec, "holdout/loss") == curve(whole, "holdout/loss")


def dying_worker(marker, lock):
    done = drawn_step("a worker")

    def worker(config):
        import students.launching.launch

        original = students.launching.launch._worker
        if ray.train.get_context().get_world_rank() == 1 and not marker.exists():
            os.environ["DS_ACCELERATOR"] = "cpu"
            import students.trainer

            step = students.trainer.train_step

            def train_step(engine, *args):
                if engine.deepspeed.global_steps == done:
                    lock.touch()
                    marker.touch()
                    os.kill(os.getpid(), 9)
                return step(engine, *args)

            students.trainer.train_step = train_step
        original(config)

    return worker


def test_all_workers_resume_from_one_checkpoint_whatever_each_sees(run, material, monkeypatch):
    """Rank 1's node does not see the newest checkpoint yet."""
    whole = run(make_spec(material, "fresh", workers=2, zero_stage=2))
    spec = make_spec(material, "stale", workers=2, zero_stage=2)
    with pytest.raises(InterruptedError):
        run(spec, stop_before=5)
    monkeypatch.setattr("students.launching.launch._worker", worker_with_an_old_listing)
    train_student(spec)
    assert steps_of(spec) == STEPS
    assert curve(spec) == curve(whole)


def worker_with_an_old_listing(config):
    import students.checkpoints.resume
    import students.launching.launch

    if ray.train.get_context().get_world_rank() == 1:
        students.checkpoints.resume.latest_complete = lambda folder: None
    students.launching.launch._worker(config)


def test_a_killed_trainer_actor_ends_the_run_and_the_next_goes_on_exactly(
    reference, material, monkeypatch
):
    spec = make_spec(material, "headless", max_failures=3)
    with monkeypatch.context() as patch:
        patch.setattr("students.launching.launch._worker", killer_of_its_controller())
        with pytest.raises(TrainingError, match="run the same command again to resume"):
            train_student(spec)
    done = drawn_step("the controller")
    assert latest_complete(spec.folder).name == f"step-{done - done % 2:08d}"
    train_student(spec)
    assert steps_of(spec) == STEPS
    assert curve(spec) == curve(reference[0])


def killer_of_its_controller():
    """A worker that kills the controller, which has the same parent, in place of a drawn step."""
    done = drawn_step("the controller")

    def worker(config):
        import students.launching.launch

        os.environ["DS_ACCELERATOR"] = "cpu"
        import students.trainer

        step = students.trainer.train_step

        def train_step(engine, *args):
            if engine.deepspeed.global_steps == done:
                siblings = psutil.Process(os.getppid()).children()
                (controller,) = [p for p in siblings if "TrainController" in " ".join(p.cmdline())]
                os.kill(controller.pid, signal.SIGKILL)
                signal.pause()
            return step(engine, *args)

        students.trainer.train_step = train_step
        students.launching.launch._worker(config)

    return worker


def test_an_error_of_the_users_is_not_tried_again(cluster, material):
    spec = make_spec(
        material, "lacking", caches={"first": material[2]["first"]}, max_failures=-1, steps=3
    )
    with pytest.raises(TrainingError) as error:
        train_student(spec)
    assert "second" in str(error.value) and "Traceback" not in str(error.value)
