"""Training as a Ray Train run: one worker per GPU or CPU slot, restarted from the last complete
checkpoint.

The driver makes all checks that need no worker before any worker starts, follows the metrics file
for its log, and reads the summary that rank 0 leaves behind. Nothing but the `TrainingSpec` travels
through Ray.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from pipeline import storage
from pipeline.errors import DistillationError, TrainingError
from pipeline.messages import resources_in_words
from pipeline.run.shared_storage import (
    Mark,
    check_folder_here,
    check_marks,
    marks_of,
    node_name,
)
from pipeline.run.training_spec import TrainingSpec
from students.checkpoints.attempts import begin_attempt
from students.checkpoints.resume import check_resume, finished_summary, prepare_resume
from students.deepspeed_options import check_deepspeed_options
from students.disk_space import full_disk_explained
from students.launching.build_locks import (
    copy_ops,
    ops_folder,
    remove_copy,
    remove_stale_build_locks,
)
from students.launching.failures import Failures, advice
from students.launching.network import OwnInterfaces
from students.launching.notices import (
    Notices,
    give_notice,
    remove_scratch,
    scratch_folder,
)
from students.launching.preemption import notices_heeded
from students.progress import FollowedTraining, describe_metrics
from students.surroundings import Surroundings

logger = logging.getLogger(__name__)


def train_student(spec: TrainingSpec) -> dict[str, Any]:
    """Trains a student, or finishes the training that an earlier call began; returns its summary.

    Raises:
        TrainingError: the folder holds another training, or the workers failed more often than
            allowed.
        ConfigError: DeepSpeed refuses the block `training.deepspeed`.
        StorageError: the disk is full; the training's checkpoints are kept.
    """
    if storage.exists(spec.summary_path):
        summary = finished_summary(spec)
        logger.info("%s: training is complete -> %s", spec.student, spec.folder)
        return summary
    check_deepspeed_options(spec.config.training.deepspeed)
    check_resume(spec)
    # before the checkpoint is chosen: an older training must make and remove none from now on
    begin_attempt(spec.folder, node_name(ray.util.get_node_ip_address()))
    resume, training = prepare_resume(spec), spec.config.training
    needs = _needs(spec)
    logger.info(
        "%s: step %d of %d, workers: %d",
        spec.student,
        resume.state.step if resume else 0,
        training.steps,
        training.workers,
    )
    remove_scratch(spec.folder, spec.student)  # of a driver that was killed
    notices = Notices(spec.folder, needs, lambda: _free(spec))
    try:
        with FollowedTraining(spec, notices.lines), full_disk_explained(spec.folder):
            _trainer(spec, needs).fit()
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, DistillationError):
            raise error.controller_failure from error
        raise _interrupted(spec, error) from error
    except (ray.train.TrainingFailedError, RayError) as error:
        raise _interrupted(spec, error) from error
    finally:
        remove_scratch(spec.folder, spec.student)
    summary = storage.read_json(spec.summary_path)
    logger.info(
        "%s: %d steps, %d tokens in %.0f s, %s -> %s",
        spec.student,
        summary["steps"],
        summary["tokens"],
        summary["seconds"],
        describe_metrics(summary["final"]),
        spec.folder,
    )
    return summary


def _interrupted(spec: TrainingSpec, error: Exception) -> TrainingError:
    return TrainingError(f"training of {spec.student} failed: {error}\n{advice(spec.folder)}")


def _trainer(spec: TrainingSpec, needs: str) -> TorchTrainer:
    training, resources = spec.config.training, _resources(spec)
    use_gpu = training.resources.num_gpus > 0
    return TorchTrainer(
        _worker,
        train_loop_config={
            "spec": spec,
            "marks": marks_of(spec.layout),
            "group": uuid.uuid4().hex,
        },
        torch_config=OwnInterfaces(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=training.workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"{spec.student}-{uuid.uuid4().hex[:8]}",
            storage_path=str(scratch_folder(spec.folder)),
            failure_config=FailureConfig(max_failures=-1),  # `Failures` counts them
            callbacks=[Failures(spec, needs)],
        ),
    )


def _resources(spec: TrainingSpec) -> dict[str, float]:
    """Resources of one worker, by Ray's names."""
    training = spec.config.training.resources
    resources = {"CPU": training.num_cpus, **training.custom}
    return resources | ({"GPU": training.num_gpus} if training.num_gpus > 0 else {})


def _needs(spec: TrainingSpec) -> str:
    """The workers of a training and their resources, for messages."""
    workers = spec.config.training.workers
    each = resources_in_words(_resources(spec))
    return f"{workers} workers of {each} each" if workers > 1 else f"1 worker of {each}"


def _free(spec: TrainingSpec) -> str:
    """Free resources of the cluster, of the kinds that a training needs."""
    free = ray.available_resources()
    return resources_in_words({name: free.get(name, 0.0) for name in _resources(spec)})


def _worker(config: dict[str, Any]) -> None:
    """Trains on one worker; DeepSpeed is imported only after its environment is set."""
    import torch

    spec: TrainingSpec = config["spec"]
    context = ray.train.get_context()
    address = ray.util.get_node_ip_address()
    _check_node(spec, config["marks"], address)
    ops = ops_folder(config["group"])
    os.environ["TORCH_EXTENSIONS_DIR"] = str(ops)
    # ninja of another version takes the compiled ops for outdated, and compiles them anew
    environment = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([environment, os.environ.get("PATH", os.defpath)])
    if spec.config.training.resources.num_gpus == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"
        cores = len(os.sched_getaffinity(0)) // context.get_local_world_size()
        torch.set_num_threads(max(1, min(cores, round(spec.config.training.resources.num_cpus))))
    if context.get_local_rank() == 0:
        copy_ops(ops)
        for lock in remove_stale_build_locks(ops):
            _say(spec, f"found {lock} and removed it: the process that built this op is dead")
    nodes = [""] * context.get_world_size()
    torch.distributed.all_gather_object(nodes, node_name(address))
    if context.get_world_rank() == 0:
        give_notice(spec.folder, f"runs on {', '.join(dict.fromkeys(nodes))}", waits=False)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

    from students.trainer import train

    device = get_device()
    assert isinstance(device, torch.device)  # a list only for workers with several GPUs
    try:
        with full_disk_explained(spec.folder), notices_heeded() as leaving:
            train(spec, device, Surroundings(nodes, leaving, partial(_say, spec)))
    finally:
        if context.get_local_rank() == 0:
            remove_copy(ops)


def _say(spec: TrainingSpec, text: str) -> None:
    give_notice(spec.folder, text, waits=False)


def _check_node(spec: TrainingSpec, marks: Sequence[Mark], address: str) -> None:
    """Checks that this node sees what the training reads and writes.

    Raises:
        StorageError: it does not; the message names the node and the folder.
    """
    check_marks(marks, address)
    student = spec.config.student
    for folder in (student.model, student.initial_weights):
        if folder is not None:
            check_folder_here(folder, address)
