"""A model folder's identity: it changes with whatever changes the model's numbers or answers."""

from pathlib import Path

import pytest

from pipeline.config import TeacherConfig
from pipeline.errors import ConfigError
from pipeline.layout import Layout
from teachers.identity import model_identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json", "modeling.py"):
        (folder / name).write_text("old")
    (folder / "README.md").write_text("old")
    return folder


def identity(folder: Path) -> dict[str, str]:
    return model_identity(TeacherConfig(model=str(folder)), Layout(str(folder.parent), "run"))


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "generation_config.json", "modeling.py"]
)
def test_weights_config_ending_tokens_and_code_count(folder: Path, name: str) -> None:
    before = identity(folder)
    (folder / name).write_text("another")
    assert identity(folder) != before


def test_other_files_do_not_count(folder: Path) -> None:
    before = identity(folder)
    (folder / "README.md").write_text("another")
    assert identity(folder) == before


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        identity(folder)
