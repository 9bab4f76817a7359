"""A training that an earlier version began goes on from its checkpoint, with DeepSpeed."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.old_run import copy_old_run
from tests.support.trainings import TOLERANCE, WEIGHTS_TOLERANCE, curve, final_weights, steps_of

pytestmark = pytest.mark.timeout(300)
METRICS = ("train/loss", "train/grad_norm", "train/learning_rate")


def test_a_checkpoint_of_an_earlier_version_is_resumed(run, tmp_path: Path) -> None:
    """The two steps after it have the losses, and give the weights, that they had then."""
    old = copy_old_run(tmp_path / "old")
    job = old.training()
    written = {name: curve(job, name) for name in (*METRICS, "holdout/loss")}
    weights = final_weights(job)
    old.interrupt_training()
    run(job)
    (counts,) = run.micro_batches[job.config.name]
    assert len(counts) == 2, "no step is done again"
    assert steps_of(job) == [1, 2, 3, 4, 5, 6]
    for name, values in written.items():
        assert curve(job, name) == pytest.approx(values, rel=TOLERANCE), name
    again = final_weights(job)
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        assert np.abs(again[name] - value).max() < WEIGHTS_TOLERANCE, name
