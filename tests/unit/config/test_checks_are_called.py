"""Every check of several sections is called when a config is loaded."""

import ast
from pathlib import Path

import pytest

from pipeline.config import checks
from pipeline.config.load import load_config
from pipeline.errors import ConfigError
from tests.support.command_line import QUICKSTART, ROOT


def test_the_config_calls_every_check() -> None:
    defined = {name for name in vars(checks) if name.startswith("check_")}
    tree = ast.parse((ROOT / "pipeline/config/run.py").read_text())
    called = {
        node.func.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert len(defined) >= 10 and defined <= called


def test_draws_are_refused_when_a_config_with_them_is_loaded() -> None:
    drawn = "scoring.selection={type: sampled, num_draws: 8}"
    with pytest.raises(ConfigError, match=r"'sampled'.*'reverse_kl'"):
        load_config(
            Path(QUICKSTART) / "config.yaml",
            [drawn, "training.losses=[{type: reverse_kl, weight: 1, min_tail: 0.0001}]"],
        )
