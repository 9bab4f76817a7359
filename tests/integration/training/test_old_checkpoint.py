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
    spec = old.training()
    written = {name: curve(spec, name) for name in (*METRICS, "holdout/loss")}
    weights = final_weights(spec)
    old.interrupt_training()
    run(spec)
    (counts,) = run.micro_batches[spec.config.name]
    assert len(counts) == 2, "no step is done again"
    assert steps_of(spec) == [1, 2, 3, 4, 5, 6]
    for name, values in written.items():
        assert curve(spec, name) == pytest.approx(values, rel=TOLERANCE), name
    again = final_weights(spec)
    assert again.keys() == weights.keys()
    for name, value in weights.items():
        assert np.abs(again[name] - value).max() < WEIGHTS_TOLERANCE, name
