"""The run that commit ead47cf wrote, in a folder of the test's own."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.bookkeeping.stage_records import read_record
from jobs.stages.prepare import prepare
from pipeline.config.load import load_config
from pipeline.config.rounds import layout_of
from pipeline.config.run import Config
from pipeline.layout import Layout
from pipeline.run.preparation import Prepared, read_prepared
from pipeline.run.prepared_run import Run
from pipeline.run.training_spec import TrainingSpec, training_specs
from tests.support.command_line import ROOT

WRITTEN = ROOT / "tests/data/written_by_ead47cf"
PLACE = "/tmp/polystill_old_run"
"""Folder in which the run was made. Its files name it, and it enters the key of its preparation."""
FILES = {
    "prompts.sources.0.path": "train.jsonl",
    "prompts.sources.1.path": "validation.jsonl",
    "prompts.sources.2.path": "holdout.jsonl",
    "teachers.first.model": "first",
    "teachers.second.model": "second",
    "student.model": "student",
}
"""Files that the config names, by their keys."""


@dataclass(frozen=True)
class OldRun:
    """A copy of the old run's folder."""

    folder: Path

    @property
    def root(self) -> Path:
        """Storage root of the run."""
        return self.folder / "output"

    @property
    def layout(self) -> Layout:
        return layout_of(self.config())

    @property
    def path(self) -> str:
        """Path of its config file."""
        return str(self.folder / "config.yaml")

    def config(self, *overrides: str) -> Config:
        """The config in the folder of the copy."""
        return load_config(self.path, list(overrides))

    def in_its_old_place(self) -> list[str]:
        """Overrides with the paths of prompts and models from the time when the run was made.

        The files that the run has written are read from the copy.
        """
        return [f"{key}={PLACE}/{name}" for key, name in FILES.items()]

    def prepared(self) -> Prepared:
        """The preparation as it was written."""
        return read_prepared(self.layout)

    def opened(self, *overrides: str) -> Run:
        """The run under today's config, with the preparation as it was written."""
        config = self.config(*overrides)
        return Run(config, layout_of(config), self.prepared())

    def prepare(self, *overrides: str) -> Run:
        """The run prepared anew, which knows the files of the copy by their times."""
        return prepare(self.config(*overrides))

    def dataset(self) -> str:
        """Digest of what the run trained on."""
        return str(read_record(self.layout, "score").dataset)

    def training(self, *overrides: str) -> TrainingSpec:
        """The training of the student, as today's config asks for it."""
        (spec,) = training_specs(self.opened(*overrides), self.dataset())
        return spec

    def interrupt_training(self) -> None:
        """Leaves the training as it was before its end: a checkpoint of step 4, and metrics."""
        folder = Path(self.training().folder)
        (folder / "training.json").unlink()
        shutil.rmtree(folder / "final")


def copy_old_run(folder: Path) -> OldRun:
    """Copies the run into a folder that does not exist yet."""
    shutil.copytree(WRITTEN, folder)
    return OldRun(folder)


def old_file_states(path: str) -> list[tuple[str, int, int]]:
    """Stands for `storage.file_states`: names, sizes and times of files in the old place."""
    recorded: dict[str, list[Any]] = json.loads((WRITTEN / "file_states.json").read_text())
    return [(name, size, time) for name, size, time in recorded[path]]
