"""Training as a Ray Train run: one worker per GPU or CPU slot, restarted from the last complete
checkpoint.

The driver checks what can be checked before any worker starts, follows the metrics file for its
log, and reads the summary that rank 0 leaves behind. Nothing but the job travels through Ray.
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
from pipeline.fingerprint import differences
from pipeline.run.training_spec import TrainingSpec
from students.checkpoints.checkpoint import check_resume, prepare_resume
from students.deepspeed_options import check_deepspeed_options
from students.disk_space import full_disk_told
from students.progress import FollowedMetrics, describe

logger = logging.getLogger(__name__)

REMOVED_LOCK = "removed %s: the process that was building this DeepSpeed op is dead"


def train_student(job: TrainingSpec) -> dict[str, Any]:
    """Trains a student, or finishes the training that an earlier call began; returns its summary.

    Raises:
        TrainingError: the folder holds another training, or the workers failed more often than
            allowed.
        ConfigError: DeepSpeed refuses its block.
        StorageError: the disk is full; its checkpoints are kept.
    """
    if storage.exists(job.summary_path):
        return _finished(job)
    check_deepspeed_options(job.config.training.deepspeed)
    resumed, training = prepare_resume(job), job.config.training
    logger.info(
        "%s: step %d of %d, workers: %d",
        job.student,
        resumed.state.step if resumed else 0,
        training.steps,
        training.workers,
    )
    for lock in remove_stale_build_locks(_extensions_folder()):
        logger.warning(REMOVED_LOCK, lock)
    scratch = Path(job.folder, "ray_train")
    try:
        with FollowedMetrics(job), full_disk_told(job.folder):
            _trainer(job, scratch).fit()
    except ray.train.ControllerError as error:
        if isinstance(error.controller_failure, DistillationError):
            raise error.controller_failure from error
        raise _interrupted(job, error) from error
    except (ray.train.TrainingFailedError, RayError) as error:
        raise _interrupted(job, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    summary = storage.read_json(job.summary_path)
    logger.info(
        "%s: %d steps, %d tokens in %.0f s, %s -> %s",
        job.student,
        summary["steps"],
        summary["tokens"],
        summary["seconds"],
        describe(summary["final"]),
        job.folder,
    )
    return summary


def check_training(job: TrainingSpec) -> None:
    """Checks, starting nothing, that what lies in a training's folder belongs to it.

    Raises:
        TrainingError: it holds another training, or a checkpoint that does not fit.
        ConfigError: DeepSpeed refuses its block.
    """
    if storage.exists(job.summary_path):
        _finished(job)
    else:
        check_deepspeed_options(job.config.training.deepspeed)
        check_resume(job)


class StopAtOnce(UserCallback):
    """Ends a run at an error that would come again: those for users, which Ray Train would
    otherwise answer with `max_failures` restarts. What a callback raises ends the run.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, DistillationError):
                raise error


def _interrupted(job: TrainingSpec, error: Exception) -> TrainingError:
    return TrainingError(
        f"training {job.student} failed: {error}\nIts checkpoints are kept; run the same command "
        "again to resume."
    )


def _trainer(job: TrainingSpec, scratch: Path) -> TorchTrainer:
    training = job.config.training
    resources = {"CPU": training.resources.num_cpus, **training.resources.custom}
    use_gpu = training.resources.num_gpus > 0
    if use_gpu:
        resources["GPU"] = training.resources.num_gpus
    return TorchTrainer(
        _worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=training.workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=f"{job.student}-{uuid.uuid4().hex[:8]}",
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=training.max_failures),
            callbacks=[StopAtOnce()],
        ),
    )


def remove_stale_build_locks(folder: Path) -> list[Path]:
    """Removes locks of op builds whose builder is dead; each later start would wait for them
    without a word.

    torch's extension builder holds its lock file open for as long as it lives, so on the one host
    that uses the folder a lock that no process has open belongs to nobody. Processes of other users
    cannot be looked into: a lock of another user is left alone.
    """
    own = [path for path in folder.glob("**/lock") if _owner(path) == os.getuid()]
    held = {name for pid in psutil.pids() for name in _open_files(pid)} if own else set()
    stale = [path for path in own if str(path.resolve()) not in held]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def _owner(path: Path) -> int | None:
    """The user's number; None of a file that is gone."""
    try:
        return path.stat().st_uid
    except FileNotFoundError:
        return None


def _extensions_folder() -> Path:
    """Where DeepSpeed's compiled ops lie: the set-up builds them into the environment."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(sys.prefix, "torch_extensions"))


def _open_files(pid: int) -> list[str]:
    names = []
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed in the meantime
                names.append(os.readlink(link))
    except (PermissionError, FileNotFoundError, ProcessLookupError):
        pass  # another user's, or gone
    return names


def _worker(config: dict[str, Any]) -> None:
    """Runs on every worker; DeepSpeed is imported only after its environment is set."""
    import torch

    job: TrainingSpec = config["job"]
    context = ray.train.get_context()
    extensions = _extensions_folder()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    if job.config.training.resources.num_gpus == 0:
        os.environ["DS_ACCELERATOR"] = "cpu"
        cores = len(os.sched_getaffinity(0)) // context.get_local_world_size()
        torch.set_num_threads(max(1, min(cores, round(job.config.training.resources.num_cpus))))
    if context.get_local_rank() == 0:
        for lock in remove_stale_build_locks(extensions):
            print(REMOVED_LOCK % lock, flush=True)
    torch.distributed.barrier()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

    from students.trainer import train

    device = get_device()
    assert isinstance(device, torch.device)  # a list only for workers with several GPUs
    with full_disk_told(job.folder):
        train(job, device)


def _finished(job: TrainingSpec) -> dict[str, Any]:
    summary = storage.read_json(job.summary_path)
    found = differences(summary["identity"], job.identity())
    if found:
        raise TrainingError(
            f"{job.folder} holds a finished training of other settings (old -> new):\n  "
            + "\n  ".join(found)
            + "\nRestore these values, choose another `name` for the run, or remove that folder "
            "to train again."
        )
    logger.info("%s: training is complete -> %s", job.student, job.folder)
    return summary
