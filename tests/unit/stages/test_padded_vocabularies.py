"""Teachers whose embedding matrix has more rows than the tokenizer has ids."""

import json
import shutil
from pathlib import Path

import pytest

from jobs.stages.prepare import prepare
from jobs.stages.score import _output
from pipeline.config.load import load_config
from pipeline.run.prepared_run import Run
from teachers.tokenizing import load_tokenizer, vocabulary_size
from tests.support.command_line import QUICKSTART


def prepared(tmp_path: Path, rows: int) -> Run:
    """A prepared run with a teacher whose config names a number of rows."""
    model = tmp_path / f"words{rows}"
    shutil.copytree(QUICKSTART / "teachers/words", model)
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(values | {"vocab_size": rows}))
    overrides = [f"storage.root={tmp_path}/root", f"teachers.words.model={model}"]
    return prepare(load_config(QUICKSTART / "config.yaml", overrides))


def test_what_lies_beyond_the_tokenizer_is_said_and_never_stored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    files = load_config(QUICKSTART / "config.yaml").student.files
    size = vocabulary_size(load_tokenizer(files))
    for rows, known in ((size, None), (size + 64, size)):
        run = prepared(tmp_path, rows)
        (cache, *_) = run.cache_layouts().values()
        assert run.prepared.vocabulary_size == known
        assert _output(run, "words", cache).vocabulary == known
        said = f"has {size} ids, and models have rows for more (words: {rows})"
        assert (said in caplog.text) == (known is not None)
