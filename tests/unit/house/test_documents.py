"""The documents: commands parse, configs load, links lead somewhere, tables are complete, and the
field reference is what the models say.
"""

import functools
import importlib.util
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
from pipeline.config.combine import Weights
from pipeline.config.filters import Filter
from pipeline.config.load import load_config
from pipeline.config.losses import Loss
from pipeline.config.run import Config
from pipeline.config.scoring import Selection
from pipeline.config.synthesis import Answer, Recipe, authors_of
from tests.support.command_line import ROOT
from tests.support.documents import (
    DOCS,
    PAGES,
    STAND_INS,
    blocks,
    commands,
    commands_of,
    of_kind,
    prose,
    text_of,
    with_stand_ins,
)

README = ROOT / "README.md"
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
README_LINES = 200
FOLDERS = "jobs|pipeline|teachers|students|tests|examples|benchmarks|requirements|docs|.ci"


def scripts() -> dict[str, set[str]]:
    """By script, or module run as one, the options that commands give it."""
    options: dict[str, set[str]] = {}
    for command in of_kind(".venv/bin/python "):
        _, script, *arguments = with_stand_ins(command)
        if script == "-m":
            script, *arguments = arguments
            script = f"-m {script}"
        given = {each.partition("=")[0] for each in arguments if each.startswith("-")}
        options.setdefault(script, set()).update(given)
    return options


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} (.*)$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found[plain] = found.get(plain, 0) + 1
    return {
        slug if number == 0 else f"{slug}-{number}"
        for slug, count in found.items()
        for number in range(count)
    }


@functools.cache
def generator(name: str) -> Any:
    """A script of `docs/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = text_of(README)
    assert len(text.splitlines()) <= README_LINES
    for page in [*DOCS, ROOT / "CONTRIBUTING.md"]:
        assert f"]({page.relative_to(ROOT)})" in text, f"README.md has no link to {page.name}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists() and there.is_relative_to(ROOT), f"{page.name}: {target}"
        if anchor:
            assert anchor in slugs(there), f"{page.name}: {target} names no heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_a_page_has_one_title_and_lists_its_own_chapters(page: Path) -> None:
    text = prose(page)
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1
    listed = [line for line in text.splitlines() if line.count(" · ") > 1]
    for line in listed:
        chapters = re.findall(r"^## (.*)$", text.partition(line)[2], re.MULTILINE)
        assert re.findall(r"\[(.*?)\]\(#", line) == chapters


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_a_page_names_exist(page: Path) -> None:
    names = re.findall(rf"`((?:{FOLDERS})/[\w./-]+)`", text_of(page))
    names += re.findall(r"`([\w-]+\.(?:yaml|toml))`", text_of(page))
    for name in names:
        places = (ROOT / name, page.parent / name)
        assert name == "config.yaml" or any(place.exists() for place in places), name


@pytest.mark.parametrize("name", ["make_configuration", "make_architectures"])
def test_a_page_that_is_made_is_what_its_source_says(name: str) -> None:
    module = generator(name)
    shown = module.PAGE.read_text()
    assert shown == module.page(shown), (
        f"{module.PAGE.name} is not what its source says; write it anew with `{module.COMMAND}`"
    )


def test_the_field_reference_names_every_section_and_field() -> None:
    shown = text_of(ROOT / "docs/configuration.md")
    sections = [name for name, field in Config.model_fields.items() if f"## `{name}`" in shown]
    plain = ["name", "seed", "rounds", "round"]
    assert sections == [name for name in Config.model_fields if name not in plain]
    assert "| `head_mass` | number > 0 and ≤ 1 | required | " in shown
    assert "| `selection` | one of [`scoring.selection`](#scoringselection) | required |" in shown
    assert "| `betas` | list of 2 numbers ≥ 0 and < 1 | `[0.9, 0.95]` |" in shown
    assert "| `dtype` | `float32` or `bfloat16` | `float32` |" in shown


def test_every_command_is_of_a_kind_that_is_tested_below() -> None:
    kinds = ("make ", "polystill ", ".venv/bin/", "ray ", "export ")
    assert [command for command in commands() if not command.startswith(kinds)] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_code_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    languages = re.findall(r"^```(.*)\n(?:.*\n)*?^```$", text_of(page), re.MULTILINE)
    assert set(languages) <= {"", "bash", "yaml", "python"}
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")


def test_the_config_of_the_readme_loads(tmp_path: Path) -> None:
    (block,) = blocks(README, "yaml")
    path = tmp_path / "config.yaml"
    path.write_text(block)
    config = load_config(path)
    assert config.storage.root == str(tmp_path / "output")
    (recipe,) = config.synthesis.recipes
    assert isinstance(recipe, Answer)
    assert authors_of(recipe, config.teachers) == list(config.teachers)


@pytest.mark.parametrize("page", DOCS, ids=[page.name for page in DOCS])
def test_parts_of_configs_load(page: Path) -> None:
    """Beside the quickstart's sections; `large` is a teacher of docs/teachers.md."""
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block)
        teachers = {"large": {"model": "org/model"}} | values.pop("teachers", {})
        overrides = [f"teachers.{name}={json.dumps(each)}" for name, each in teachers.items()]
        overrides += ["scoring.num_logprobs=20"] if "scoring" not in values else []
        for section, fields in values.items():
            overrides += [f"{section}.{key}={json.dumps(each)}" for key, each in fields.items()]
        assert load_config(STAND_INS["CONFIG"], overrides).teachers.keys() >= teachers.keys()


def test_examples_for_open_weights_have_the_recommended_settings() -> None:
    part = text_of(ROOT / "docs/measurements.md").partition("## Where to start")[2]
    recommended = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", part, flags=re.DOTALL)[0])
    assert set(recommended) == {"scoring", "combine", "training"}
    for name in ("single_node", "multi_node"):
        shown = yaml.safe_load((ROOT / f"examples/open_weights/{name}.yaml").read_text())
        assert shown["scoring"] == recommended["scoring"]
        assert shown["training"]["losses"] == recommended["training"]["losses"]
    assert shown["combine"] == recommended["combine"], "who knows what is not said there"
    real = yaml.safe_load((ROOT / "examples/smollm2/config.yaml").read_text())
    assert real["scoring"] == recommended["scoring"]
    assert real["training"]["losses"] == recommended["training"]["losses"]
    overrides = [f"{key}={json.dumps(value)}" for key, value in recommended.items()]
    config = load_config(STAND_INS["CONFIG"], [o for o in overrides if "losses" not in o])
    assert config.model_dump(mode="json")["combine"]["method"] == "route"


@functools.cache
def ray_help(name: str) -> str:
    ray = [sys.executable, "-m", "ray.scripts.scripts", name, "--help"]
    return subprocess.run(ray, capture_output=True, text=True, check=True).stdout


def test_ray_knows_its_commands_and_the_exports_are_those_of_cluster_yaml() -> None:
    cluster = (ROOT / "cluster.yaml").read_text()
    for command in of_kind("ray "):
        _, name, *arguments = shlex.split(command)
        options = [word.partition("=")[0] for word in arguments if word.startswith("-")]
        assert [option for option in options if option not in ray_help(name)] == []
    for command in of_kind("export "):
        assert command.removeprefix("export ").partition("=")[0] + "=" in cluster


def test_no_recipe_starts_ray_without_the_token_or_this_python() -> None:
    starting = [block for page in PAGES for block in blocks(page, "bash") if "ray start" in block]
    assert len(starting) == 2
    for block in starting:
        before = block.partition("\nray start")[0]
        assert "\nexport RAY_AUTH_MODE=token " in f"\n{before}"
        assert '\nexport PATH="$PWD/.venv/bin:$PATH" ' in f"\n{before}"


@pytest.mark.parametrize("command", of_kind("make "))
def test_make_targets_exist(command: str) -> None:
    subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, check=True, capture_output=True)


def test_ci_runs_the_make_commands_of_the_readme_and_the_linter() -> None:
    ci = (ROOT / ".ci/run").read_text().splitlines()
    made = [command for command in commands_of(README) if command.startswith("make ")]
    assert sorted(made) == ["make quickstart", "make real", "make test"]
    assert {"make lint", *made} <= set(ci)


def test_make_help_lists_every_target_in_lines_of_a_terminal() -> None:
    # Below another `make`, such as `make test`, the folders would be printed as well.
    command = ["make", "--no-print-directory", "help"]
    made = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    lines = made.stdout.splitlines()
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {line.split()[0] for line in lines if not line.startswith(" ")} == set(targets.split())
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("command", of_kind("polystill "))
def test_polystill_commands_parse_and_their_configs_load(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    options = parse(with_stand_ins(command)[1:])
    if "config" in options:
        assert load_config(options.config, options.overrides).name


def test_the_dry_runs_of_the_documents_run(capsys: pytest.CaptureFixture[str]) -> None:
    short, long = sorted(command for command in of_kind("polystill run") if "--dry-run" in command)
    assert main(with_stand_ins(short)[1:]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# plan") and "# resources" in printed
    assert main(with_stand_ins(long)[1:]) == 0
    config, _, plan = capsys.readouterr().out.partition("# plan")
    assert "# plan" + plan == printed
    assert yaml.safe_load(config)["evaluation"]["max_prompts_per_domain"] is None


@pytest.mark.parametrize("script", scripts())
def test_scripts_exist_and_take_the_options(script: str) -> None:
    if not script.startswith("-m "):
        assert (ROOT / script).is_file()
    run = script.split() if script.startswith("-m ") else [ROOT / script]
    shown = subprocess.run(
        [sys.executable, *run, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert [option for option in sorted(scripts()[script]) if option not in shown] == []


def test_tools_of_the_environment_exist() -> None:
    for command in of_kind(".venv/bin/"):
        tool = command.split()[0].removeprefix(".venv/bin/")
        assert (Path(sys.executable).parent / tool).exists(), command


def test_paths_in_pytest_commands_exist() -> None:
    for command in of_kind(".venv/bin/python -m pytest"):
        for word in shlex.split(command)[3:]:
            if word.startswith("tests/"):
                assert (ROOT / word.partition("::")[0]).exists(), command


TABLES = [
    ("docs/synthesis.md", "Recipes", Recipe),
    ("docs/synthesis.md", "Filters", Filter),
    ("docs/cache.md", "Selections", Selection),
    ("docs/losses.md", "Weights", Weights),
    ("docs/losses.md", "Losses", Loss),
]


@pytest.mark.parametrize(("page", "chapter", "union"), TABLES, ids=[each[1] for each in TABLES])
def test_everything_with_a_type_stands_in_its_table(page: str, chapter: str, union: Any) -> None:
    """Those of a chapter in the order of the config; losses go on in the chapter after it."""
    (text,) = re.findall(
        rf"^## {chapter}\n(.*?)^## ", text_of(ROOT / page) + "\n## ", re.DOTALL | re.MULTILINE
    )
    if chapter == "Losses":
        text = text_of(ROOT / page).partition("\n## Losses\n")[2].partition("## How losses")[0]
    kinds = get_args(get_args(union)[0])
    types = [get_args(kind.model_fields["type"].annotation)[0] for kind in kinds]
    shown = re.findall(r"^\| `(\w+)`(?: \||,)", text, re.MULTILINE)
    assert list(dict.fromkeys(shown)) == types
