"""Training goes on where it was broken off, on as many workers or others, or is refused."""

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
from students.checkpoints.checkpoint import latest_complete
from students.data.batches import DataOrder
from students.export import export_student
from students.launch import remove_stale_build_locks, train_student
from tests.support.disks import small_disk
from tests.support.trainings import (
    STEPS,
    TOLERANCE,
    WEIGHTS_TOLERANCE,
    curve,
    final_weights,
    make_job,
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
    whole = run(make_job(material, f"whole{name}", **options))
    broken = make_job(material, f"broken{name}", loader_processes=2, **options)
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
    whole = run(make_job(material, f"halves{zero_stage}", workers=2, **options))
    with pytest.raises(InterruptedError):
        run(make_job(material, f"fewer{zero_stage}", workers=2, **options), stop_before=3)
    fewer = run(make_job(material, f"fewer{zero_stage}", workers=1, **options))
    assert steps_of(fewer) == STEPS
    for name in ("train/loss", "holdout/loss"):
        assert curve(fewer, name) == pytest.approx(curve(whole, name), rel=BF16_TOLERANCE), name


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


def test_a_full_disk_is_told_once_and_training_goes_on_when_there_is_room(
    run, material, reference, tmp_path
):
    with small_disk(tmp_path / "disk", mebibytes=8) as disk:
        if not disk.mounted:
            pytest.skip("a disk that fills up is a tmpfs here: mounting one needs root")
        job = make_job(material, "full", max_failures=2)
        job = dataclasses.replace(
            job, layout=dataclasses.replace(job.layout, models_root=str(disk.folder))
        )
        with pytest.raises(InterruptedError):
            run(job, stop_before=3)
        # Room for metrics and Ray Train's own files; a checkpoint has 200 KB.
        disk.fill(leave_bytes=100_000)
        with pytest.raises(StorageError) as told:
            train_student(job)
        assert all(part in str(told.value) for part in disk.message_parts), told.value
        assert latest_complete(job.folder).name == "step-00000002"
        disk.free()
        assert train_student(job)["steps"] == STEPS[-1]
        assert curve(job) == pytest.approx(curve(reference[0]), rel=TOLERANCE)


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


def test_batches_of_another_size_skip_no_data_and_repeat_none(run, material):
    """Four steps of 8 sequences before the resume and two of 4 after it."""
    with pytest.raises(InterruptedError):
        run(make_job(material, "smaller"), stop_before=5)
    options = {"sequences_per_step": 4, "allow_resume_with": ["training.sequences_per_step"]}
    job = run(make_job(material, "smaller", loader_processes=2, **options))
    assert steps_of(job) == STEPS
    entries = read_dataset(job.layout, job.dataset_digest)
    train = [entry for entry in entries if entry.split == "train"]
    positions = [e.num_positions for e in train]
    order = DataOrder([e.shard for e in train], positions, job.config.seed, job.dataset_digest, 1)
    seen = [train[i].num_tokens for place in range(4 * 8 + 2 * 4) for i in order.batch(place)]
    assert read_json(job.summary_path)["tokens"] == sum(seen)


def test_a_killed_worker_is_replaced_and_training_goes_on_exactly(
    run, cluster, material, monkeypatch, tmp_path
):
    """Rank 1 of 2 kills itself by its id in a drawn step and leaves the lock of an unfinished
    build.
    """
    whole = run(make_job(material, "alive", workers=2))
    job, marker = make_job(material, "dies", workers=2, max_failures=1), tmp_path / "died"
    monkeypatch.setattr("students.launch._worker", dying_worker(marker, cluster))
    train_student(job)
    assert marker.exists() and not cluster.exists()
    assert steps_of(job) == STEPS
    assert curve(job) == curve(whole)
    assert curve(job, "holdout/loss") == curve(whole, "holdout/loss")


def dying_worker(marker, lock):
    done = drawn_step("a worker")

    def worker(config):
        import students.launch

        original = students.launch._worker
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
    whole = run(make_job(material, "fresh", workers=2, zero_stage=2))
    job = make_job(material, "stale", workers=2, zero_stage=2)
    with pytest.raises(InterruptedError):
        run(job, stop_before=5)
    monkeypatch.setattr("students.launch._worker", worker_with_an_old_listing)
    train_student(job)
    assert steps_of(job) == STEPS
    assert curve(job) == curve(whole)


def worker_with_an_old_listing(config):
    import students.checkpoints.checkpoint
    import students.launch

    if ray.train.get_context().get_world_rank() == 1:
        students.checkpoints.checkpoint.latest_complete = lambda folder: None
    students.launch._worker(config)


def test_a_killed_trainer_actor_ends_the_run_and_the_next_goes_on_exactly(
    reference, material, monkeypatch
):
    job = make_job(material, "headless", max_failures=3)
    with monkeypatch.context() as patch:
        patch.setattr("students.launch._worker", killer_of_its_controller())
        with pytest.raises(TrainingError, match="run the same command again to resume"):
            train_student(job)
    done = drawn_step("the controller")
    assert latest_complete(job.folder).name == f"step-{done - done % 2:08d}"
    train_student(job)
    assert steps_of(job) == STEPS
    assert curve(job) == curve(reference[0])


def killer_of_its_controller():
    """In place of a drawn step, by the id of the one that has the same parent."""
    done = drawn_step("the controller")

    def worker(config):
        import students.launch

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
        students.launch._worker(config)

    return worker


def test_an_error_of_the_users_is_not_tried_again(cluster, material):
    job = make_job(
        material, "lacking", caches={"first": material[2]["first"]}, max_failures=-1, steps=3
    )
    with pytest.raises(TrainingError) as error:
        train_student(job)
    assert "second" in str(error.value) and "Traceback" not in str(error.value)


def test_only_locks_without_a_living_builder_are_removed(tmp_path):
    for name in ("dead", "alive"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    (tmp_path / "released").mkdir()
    (tmp_path / "released" / "lock").symlink_to("gone by the time it is looked at")
    with (tmp_path / "alive" / "lock").open():
        assert remove_stale_build_locks(tmp_path) == [tmp_path / "dead" / "lock"]
    assert (tmp_path / "alive" / "lock").exists()
