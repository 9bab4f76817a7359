"""Placement: room for all stages is checked before the first one starts."""

from functools import partial
from pathlib import Path

import pytest

from jobs import distill
from jobs.cluster.placement import cautions, check_local_head
from jobs.dry_run import dry_run_text
from pipeline.config.load import load_config
from pipeline.errors import ClusterError, ConfigError

QUICKSTART = Path(__file__).resolve().parents[3] / "examples/quickstart/config.yaml"


def test_a_local_head_too_small_for_a_later_stage_is_not_started(tmp_path: Path) -> None:
    more = ["training.workers=3", "training.resources.num_cpus=2"]
    config = load_config(QUICKSTART, [f"storage.root={tmp_path}", *more])
    for refused in (dry_run_text, partial(distill.run, address=None)):
        with pytest.raises(ClusterError, match=r"cannot hold the student: 3 x 2 CPU needed"):
            refused(config)
    fits = load_config(QUICKSTART, [f"storage.root={tmp_path}", *more, "cluster.local_num_cpus=6"])
    assert "student: 3 x 2 CPU" in dry_run_text(fits)
    # Ray counts GPUs when its head starts, unless the config gives their number.
    gpus = [*more, "cluster.local_num_cpus=6", "training.resources.num_gpus=1"]
    dry_run_text(load_config(QUICKSTART, [f"storage.root={tmp_path}", *gpus]))
    gpus.append("cluster.local_num_gpus=2")
    with pytest.raises(ClusterError, match="cannot hold the student"):
        dry_run_text(load_config(QUICKSTART, [f"storage.root={tmp_path}", *gpus]))


def test_a_local_head_need_not_hold_finished_stages(tmp_path: Path) -> None:
    """Teachers have run on large machines, and the student is trained on a small one afterwards."""
    large = "teachers.words.resources.num_cpus=64"
    config = load_config(QUICKSTART, [f"storage.root={tmp_path}", large])
    check_local_head(config, {"train", "export"})
    for stage in ("synthesize", "score", "evaluate"):
        with pytest.raises(ClusterError, match="cannot hold an engine of 'words'"):
            check_local_head(config, {stage, "train"})


def test_what_present_nodes_cannot_hold_is_a_caution() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 3.0}}]
    config = load_config(QUICKSTART, ["training.workers=3", "training.resources.num_cpus=2"])
    (caution,) = cautions(config, nodes)
    assert caution.startswith("the cluster cannot hold the student: 3 x 2 CPU needed, nodes have 3")
    assert cautions(load_config(QUICKSTART), nodes) == []
    grows = load_config(QUICKSTART, ["training.workers=9", "cluster.autoscaling=true"])
    assert cautions(grows, nodes) == []


def test_a_path_that_a_cluster_cannot_see_is_refused_by_a_dry_run(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, [f"storage.root={tmp_path}"])
    with pytest.raises(ConfigError, match=r"storage\.shared_roots"):
        dry_run_text(config, "http://127.0.0.1:1")
