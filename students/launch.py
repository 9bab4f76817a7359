"""Training as a Ray Train run: one worker per GPU or CPU slot, restarted from the last complete
checkpoint.

The driver makes all checks that need no worker before any worker starts, follows the metrics file
for its log, and reads the summary that rank 0 leaves behind. Nothing but the `TrainingSpec` travels
through Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import uuid
import warnings
from pathlib import Path
from typing import Any

import psutil
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from pipeline import storage
from pipeline.errors import DistillationError, TrainingError
from pipeline.run.training_spec import TrainingSpec
from students.checkpoints.resume import complete_checkpoints, finished_summary, prepare_resume
from students.deepspeed_options import check_deepspeed_options
from students.disk_space import full_disk_explained
from students.progress import FollowedMetrics, describe_metrics

logger = logging.getLogger(__name__)

REMOVED_LOCK = "removed %s: the process that was building this DeepSpeed op is dead"
"""Log line for each lock that `remove_stale_build_locks` removed."""


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
    resume, training = prepare_resume(spec), spec.config.training
    logger.info(
        "%s: step %d of %d, workers: %d",
        spec.student,
        resume.state.step if resume else 0,
        training.steps,
        training.workers,
    )
    for lock in remove_stale_build_locks(_extensions_folder()):
        logger.warning(REMOVED_LOCK, lock)
    scratch = Path(spec.folder, "ray_train")
    try:
        with FollowedMetrics(spec), full_disk_explained(spec.folder):
            _trainer(spec, scratch).fit()
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, DistillationError):
            raise error.controller_failure from error
        raise _interrupted(spec, error) from error
    except (ray.train.TrainingFailedError, RayError) as error:
        raise _interrupted(spec, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
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


class StopAtOnce(UserCallback):
    """Ends a run at the first error that would come again, and that Ray Train would answer by
    starting the workers `max_failures` times: every error for the user, and before the first step
    every other one that no lost worker and no storage causes. An error that a callback raises ends
    the run.
    """

    def __init__(self, spec: TrainingSpec) -> None:
        self._spec = spec

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, DistillationError):
                raise error
        if storage.exists(self._spec.metrics_path):
            return
        for error in worker_exceptions.values():
            if not isinstance(error, RuntimeError | OSError | RayError):
                raise TrainingError(
                    f"training of {self._spec.student} failed before its first step: "
                    f"{type(error).__name__}: {error}"
                ) from error


def _interrupted(spec: TrainingSpec, error: Exception) -> TrainingError:
    if not complete_checkpoints(spec.folder):
        advice = "it has no checkpoint yet: mend the cause, then run the same command again"
    else:
        advice = "its checkpoints are kept: run the same command again to resume"
    return TrainingError(f"training of {spec.student} failed: {error}\n{advice}")


def _trainer(spec: TrainingSpec, scratch: Path) -> TorchTrainer:
    training = spec.config.training
    resources = {"CPU": training.resources.num_cpus, **training.resources.custom}
    use_gpu = training.resources.num_gpus > 0
    if use_gpu:
        resources["GPU"] = training.resources.num_gpus
    return TorchTrainer(
        _worker,
        train_loop_config={"spec": spec},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=training.workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"{spec.student}-{uuid.uuid4().hex[:8]}",
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=training.max_failures),
            callbacks=[StopAtOnce(spec)],
        ),
    )


def remove_stale_build_locks(folder: Path) -> list[Path]:
    """Removes locks of op builds whose builder is dead, since each later start would silently wait
    for them; returns their paths.

    torch's extension builder holds its lock file open for as long as it lives, so on the one host
    that uses the folder a lock that no process has open belongs to nobody. Open files of other
    users' processes cannot be read: a lock of another user is left alone.
    """
    own = [path for path in folder.glob("**/lock") if _owner(path) == os.getuid()]
    held = {name for pid in psutil.pids() for name in _open_files(pid)} if own else set()
    stale = [path for path in own if str(path.resolve()) not in held]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def _owner(path: Path) -> int | None:
    """Number of the user who owns a file; None if the file is gone."""
    try:
        return path.stat().st_uid
    except FileNotFoundError:
        return None


def _extensions_folder() -> Path:
    """Folder of DeepSpeed's compiled ops: the set-up builds them into the environment."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix, "torch_extensions"))


def _open_files(pid: int) -> list[str]:
    names = []
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed in the meantime
                names.append(os.readlink(link))
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        pass  # the process is another user's, or gone
    return names


def _worker(config: dict[str, Any]) -> None:
    """Trains on one worker; DeepSpeed is imported only after its environment is set."""
    import torch

    spec: TrainingSpec = config["spec"]
    context = ray.train.get_context()
    extensions = _extensions_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    if spec.config.training.resources.num_gpus == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"
        cores = len(os.sched_getaffinity(0)) // context.get_local_world_size()
        torch.set_num_threads(max(1, min(cores, round(spec.config.training.resources.num_cpus))))
    if context.get_local_rank() == 0:
        for lock in remove_stale_build_locks(extensions):
            logger.warning(REMOVED_LOCK, lock)
    torch.distributed.barrier()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

    from students.trainer import train

    device = get_device()
    assert isinstance(device, torch.device)  # a list only for workers with several GPUs
    with full_disk_explained(spec.folder):
        train(spec, device)
