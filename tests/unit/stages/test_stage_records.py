"""Stage records and preparations: the text of their files stays what earlier versions wrote."""

import json
from pathlib import Path

import pytest

from jobs.bookkeeping.plan import STAGE_NAMES
from jobs.bookkeeping.stage_records import (
    StageRecord,
    read_record,
    with_earlier_attempts,
    write_record,
)
from pipeline import storage
from pipeline.layout import Layout
from pipeline.run.preparation import read_prepared, save_prepared
from tests.support.old_run import copy_old_run


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_record_of_an_earlier_version_is_written_back_byte_for_byte(
    stage: str, tmp_path: Path
) -> None:
    layout = copy_old_run(tmp_path / "old").layout
    before = storage.read_bytes(layout.stage_record(stage))
    record = read_record(layout, stage)
    write_record(layout, stage, record)
    assert storage.read_bytes(layout.stage_record(stage)) == before
    assert record.key == json.loads(before)["key"] and record.seconds > 0


def test_a_preparation_of_an_earlier_version_is_written_back_byte_for_byte(tmp_path: Path) -> None:
    layout = copy_old_run(tmp_path / "old").layout
    before = storage.read_bytes(layout.prepared)
    save_prepared(layout, read_prepared(layout))
    assert storage.read_bytes(layout.prepared) == before


def test_keys_that_are_missing_or_unknown_are_read(tmp_path: Path) -> None:
    layout = Layout(str(tmp_path), "run")
    assert read_record(layout, "score") == StageRecord()
    storage.write_json(layout.stage_record("score"), {"key": "k", "of_a_later_version": [1]})
    record = read_record(layout, "score")
    assert (record.key, record.dataset, record.filters) == ("k", None, [])
    write_record(layout, "score", record.model_copy(update={"key": ""}))
    assert storage.read_json(layout.stage_record("score")) == {
        "key": "",
        "of_a_later_version": [1],
    }


def test_earlier_attempts_are_added_up() -> None:
    earlier = StageRecord(key="k", seconds=2.0, unended=1, engine_seconds={"words": 3.0})
    record = StageRecord(key="k", seconds=5.0, engine_seconds={"words": 1.0, "student": 4.0})
    both = with_earlier_attempts(record, earlier)
    assert (both.seconds, both.unended) == (7.0, 1)
    assert both.engine_seconds == {"words": 4.0, "student": 4.0}
