"""A driver in a process of its own, which trains a pickled spec on a cluster and writes its log to
stdout: `python -m tests.support.training_driver SPEC GCS_ADDRESS` in the root of the repository.

Each step takes `STEP_SECONDS` at least, so that a test can do something between two of them.
"""

import logging
import pickle
import sys
import time
from pathlib import Path

import ray

from students.launching import launch
from tests.support.command_line import ROOT

STEP_SECONDS = 0.05


def slow_worker(config):
    from students.launching.launch import _worker

    def train_step(*arguments):
        time.sleep(STEP_SECONDS)
        return step(*arguments)

    import students.trainer

    step = students.trainer.train_step
    students.trainer.train_step = train_step
    _worker(config)


if __name__ == "__main__":
    from tests.support import training_driver

    logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(asctime)s %(message)s")
    logging.getLogger("students").setLevel(logging.INFO)
    spec = pickle.loads(Path(sys.argv[1]).read_bytes())
    variables = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    ray.init(address=sys.argv[2], log_to_driver=False, runtime_env={"env_vars": variables})
    launch._worker = training_driver.slow_worker
    launch.train_student(spec)
