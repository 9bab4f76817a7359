"""Identity of a model folder: it changes with all that changes the model's numbers or answers."""

from pathlib import Path

import pytest

from pipeline.config.teachers import TeacherConfig
from pipeline.errors import ConfigError
from pipeline.layout import Layout
from teachers.preflight.identity import check_weights, model_identity


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


def test_weights_that_would_be_unpickled_are_refused(folder: Path) -> None:
    check_weights(str(folder), None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"/model has no safetensors: .*`vllm\.load_format`"):
        check_weights(str(folder), None)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "model.bin"])
def test_weights_of_the_hub_are_asked_for_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def has_file(model: str, asked: str, revision: str | None) -> bool:
        assert (model, revision) == ("owner/model", "main")
        return asked == name

    monkeypatch.setattr("teachers.preflight.identity.has_file", has_file)
    if name.startswith("model.safetensors"):
        return check_weights("owner/model", "main")
    with pytest.raises(ConfigError, match="owner/model has no safetensors"):
        check_weights("owner/model", "main")
