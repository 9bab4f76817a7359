"""README.md: every command parses, names what exists, and its overrides load."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from jobs.__main__ import main, parse
from pipeline.config.filters import Filter
from pipeline.config.load import load_config
from pipeline.config.synthesis import Recipe

ROOT = Path(__file__).resolve().parents[3]
README = (ROOT / "README.md").read_text()
STAND_INS = {
    "CONFIG": str(ROOT / "examples/quickstart/config.yaml"),
    "DATA": str(ROOT / "tests/data/gsm8k"),
    "FOLDER": "/tmp/folder",
    "HEAD": "localhost",
    "PATH": str(ROOT / "examples/quickstart/student"),
    "SUBMISSION_ID": "run-score-abc-a1",
}


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = [
        line.split("  #")[0].split("\t#")[0].strip()
        for block in blocks
        for line in block.splitlines()
    ]
    return [re.sub(r" # .*$", "", line).strip() for line in lines if line]


def with_stand_ins(command: str) -> list[str]:
    for word, real in STAND_INS.items():
        command = re.sub(rf"\b{word}\b", real, command)
    return shlex.split(command)


def of_kind(start: str) -> list[str]:
    found = [command for command in commands() if command.startswith(start)]
    assert found, f"README.md has no command that starts with {start!r}"
    return found


def test_every_command_is_of_a_kind_that_is_tested_below() -> None:
    kinds = ("make ", "polystill ", ".venv/bin/python ", "ray ", "export ")
    assert [command for command in commands() if not command.startswith(kinds)] == []


def test_examples_for_open_weights_have_the_recommended_settings() -> None:
    part = README.partition("### Where to start")[2]
    recommended = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", part, flags=re.DOTALL)[0])
    assert set(recommended) == {"scoring", "combine", "training"}
    for name in ("single_node", "multi_node"):
        shown = yaml.safe_load((ROOT / f"examples/open_weights/{name}.yaml").read_text())
        assert shown["scoring"] == recommended["scoring"]
        assert shown["training"]["losses"] == recommended["training"]["losses"]
    assert shown["combine"] == recommended["combine"], "who knows what is not said there"
    overrides = [f"{key}={json.dumps(value)}" for key, value in recommended.items()]
    config = load_config(STAND_INS["CONFIG"], [o for o in overrides if "losses" not in o])
    assert config.model_dump(mode="json")["combine"]["method"] == "route"


def test_ray_knows_its_commands_and_the_exports_are_those_of_cluster_yaml() -> None:
    cluster = (ROOT / "cluster.yaml").read_text()
    for command in of_kind("ray "):
        _, name, *arguments = shlex.split(command)
        ray = [sys.executable, "-m", "ray.scripts.scripts", name, "--help"]
        shown = subprocess.run(ray, capture_output=True, text=True, check=True).stdout
        assert all(option in shown for option in arguments if option.startswith("-"))
    for command in of_kind("export "):
        assert command.removeprefix("export ").partition("=")[0] + "=" in cluster
    order = [command.split()[0] for command in commands()]
    head = commands().index("ray start --head")
    assert order[head - 1 : head + 2] == ["export", "ray", "polystill"]


@pytest.mark.parametrize("command", of_kind("make "))
def test_make_targets_exist_and_ci_runs_them(command: str) -> None:
    subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, check=True, capture_output=True)
    assert command in (ROOT / ".ci/run").read_text().splitlines()


@pytest.mark.parametrize("command", of_kind("polystill "))
def test_polystill_commands_parse_and_their_configs_load(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    options = parse(with_stand_ins(command)[1:])
    if "config" in options:
        assert load_config(options.config, options.overrides).name


def test_the_dry_run_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [command for command in of_kind("polystill run") if "--dry-run" in command]
    assert main(with_stand_ins(command)[1:]) == 0
    printed = capsys.readouterr().out
    assert "# plan" in printed and "# resources" in printed and "teachers:" in printed


@pytest.mark.parametrize("command", of_kind(".venv/bin/python "))
def test_scripts_exist_and_take_the_options(command: str) -> None:
    _, script, *arguments = with_stand_ins(command)
    shown = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, text=True, check=True
    ).stdout
    for option in [argument for argument in arguments if argument.startswith("--")]:
        assert option in shown


@pytest.mark.parametrize(
    ("section", "union"), [("Recipes", Recipe), ("Filters", Filter)], ids=["recipes", "filters"]
)
def test_every_recipe_and_filter_stands_in_its_table(section: str, union: Any) -> None:
    (text,) = re.findall(rf"^## {section}\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    kinds = get_args(get_args(union)[0])
    types = [get_args(kind.model_fields["type"].annotation)[0] for kind in kinds]
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == types


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"`((?:jobs|tests|examples|benchmarks|requirements)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name
