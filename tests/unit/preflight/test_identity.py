"""Identity of a model folder: it changes with all that changes the model's numbers or answers."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.config.student import StudentConfig
from pipeline.config.teachers import TeacherConfig
from pipeline.errors import ConfigError, CorruptFileError
from pipeline.layout import Layout
from teachers.preflight.identity import model_identity, student_identity
from teachers.preflight.weights import check_weights


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json", "modeling.py"):
        (folder / name).write_text("old")
    (folder / "README.md").write_text("old")
    return folder


def identity(folder: Path, **options: Any) -> dict[str, str]:
    teacher = TeacherConfig(model=str(folder), **options)
    return model_identity(teacher, Layout(str(folder.parent), "run"))


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


def in_place(path: Path) -> None:
    path.write_text("new")


def by_another(path: Path) -> None:
    (path.parent / "other").write_text("new")
    (path.parent / "other").rename(path)


@pytest.mark.parametrize("change", [in_place, by_another])
def test_a_change_that_keeps_size_and_time_counts(
    folder: Path, change: Callable[[Path], None]
) -> None:
    before, weights = identity(folder), folder / "model.safetensors"
    state = weights.stat()
    change(weights)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert identity(folder) != before


def test_a_file_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(folder)
    monkeypatch.setattr("teachers.preflight.identity._hash_file", None)
    assert identity(folder) == before


def test_hashes_of_an_earlier_version_are_kept_and_files_are_read_once_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = (folder / "model.safetensors").stat()
    earlier = {f"{folder}/model.safetensors:{state.st_size}:{state.st_mtime_ns}": "0" * 32}
    path = folder.parent / "weight_hashes.json"
    path.write_text(json.dumps(earlier))
    before = identity(folder)
    assert earlier.items() <= json.loads(path.read_text()).items()
    monkeypatch.setattr("teachers.preflight.identity._hash_file", None)
    assert identity(folder) == before


@pytest.mark.parametrize("content", ["[]", "null", "5", '{"a": 5}', '{"a": ["b"]}'])
def test_hashes_that_are_none_are_refused(folder: Path, content: str) -> None:
    (folder.parent / "weight_hashes.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"weight_hashes\.json does not hold .*; remove it"):
        identity(folder)


def test_code_below_a_trusted_folder_counts(folder: Path) -> None:
    before = identity(folder, trust_remote_code=True)
    assert before == identity(folder), "code at the top counts in any case"
    code = folder / "layers/attention.py"
    code.parent.mkdir()
    code.write_text("old")
    old = identity(folder, trust_remote_code=True)
    code.write_text("newer")
    assert (
        len(
            {before["weights"], old["weights"], identity(folder, trust_remote_code=True)["weights"]}
        )
        == 3
    )
    assert identity(folder) == before, "it is not run"
    code.rename(folder / "layers/other.py")
    assert identity(folder, trust_remote_code=True) != old


@pytest.mark.parametrize("hidden", [".git", "__pycache__", ".cache/huggingface"])
def test_hidden_folders_and_circles_of_links_are_left_out(folder: Path, hidden: str) -> None:
    before = identity(folder, trust_remote_code=True)
    (folder / hidden).mkdir(parents=True)
    (folder / hidden / "a.py").write_text("x")
    (folder / "again").symlink_to(".")
    assert identity(folder, trust_remote_code=True) == before


def test_code_behind_a_link_counts(folder: Path) -> None:
    before = identity(folder, trust_remote_code=True)
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.py").write_text("x")
    (folder / "layers").symlink_to(elsewhere)
    assert identity(folder, trust_remote_code=True) != before


def test_a_checkpoint_that_is_broken_is_refused(folder: Path) -> None:
    (folder / "COMPLETE").touch()
    student: dict[str, Any] = {"model": str(folder), "initialization": "random"}
    start = StudentConfig(**student, initial_weights=str(folder))
    for content in ("{}", "[]", '{"step": "x"}', '{"step": 1, "identity": []}'):
        (folder / "state.json").write_text(content)
        with pytest.raises(CorruptFileError, match=r"state\.json is not what a training writes"):
            student_identity(start, Layout(str(folder.parent), "run"))


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="holds no weights"):
        identity(folder)


def test_weights_that_would_be_unpickled_are_refused(folder: Path) -> None:
    save_file({"weight": np.zeros(2)}, folder / "model.safetensors")
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

    monkeypatch.setattr("teachers.preflight.weights.has_file", has_file)
    if name.startswith("model.safetensors"):
        return check_weights("owner/model", "main")
    with pytest.raises(ConfigError, match="owner/model has no safetensors"):
        check_weights("owner/model", "main")
