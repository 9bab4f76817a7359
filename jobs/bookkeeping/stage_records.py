"""Stage records, which the stages of a run leave behind, and the keys that say what they are about.

A stage is complete if its record has the key of the run as it is now.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import storage
from pipeline.config.combine import LearnedWeights
from pipeline.config.run import Config
from pipeline.config.synthesis import STUDENT
from pipeline.config.teachers import TeacherConfig
from pipeline.errors import CorruptFileError
from pipeline.fingerprint import digest_json, exact_json
from pipeline.layout import Layout
from pipeline.run.prepared_run import Run
from pipeline.run.training_spec import training_specs


class StageRecord(BaseModel):
    """The record of one stage, as it stands in `runs/<name>/stages/<stage>.json`.

    Only the fields that a stage has set are written. A record of an earlier version may lack some
    of them, and keeps those that this version does not know.

    Attributes:
        seconds: how long the stage took, in all its attempts of the same key.
        started: start of the last attempt, in seconds since 1970.
        unended: attempts that did not end.
        key: hash of everything that decides the outcome of the stage.
        dataset: digest of the dataset that synthesize or score has written.
        counts: numbers of answers that each step has kept and dropped, by its label (synthesize).
        filters: numbers of sequences that each filter has seen and dropped (synthesize, score).
        engines: descriptions of the engines, by teacher (score).
        quarantined: number of quarantined sequences, by cache name (score).
        figures: summary of each student (train and export).
        worker_seconds: seconds of all training workers together, in all starts (train).
        engine_seconds: seconds of all engines, by model.
        summary: the stage's last line, for people.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    seconds: float = 0.0
    started: float = 0.0
    unended: int = 0
    key: str = ""
    dataset: str | None = None
    counts: dict[str, dict[str, int]] = {}
    filters: list[dict[str, Any]] = []
    engines: dict[str, list[dict[str, Any]]] = {}
    quarantined: dict[str, int] = {}
    figures: dict[str, dict[str, Any]] = {}
    worker_seconds: float = 0.0
    engine_seconds: dict[str, float] = {}
    summary: str = "no record"


def read_record(layout: Layout, stage: str) -> StageRecord:
    """The record of a stage; one without a key if the stage has never finished.

    Raises:
        CorruptFileError: the file is no stage record.
    """
    path = layout.stage_record(stage)
    stored = storage.read_json(path, dict[str, Any]) if storage.exists(path) else {}
    try:
        return StageRecord.model_validate(stored)
    except ValidationError as error:
        raise CorruptFileError(
            f"{path} is no record of the stage {stage}: {error.errors()[0]['msg']}; remove the "
            "file and let the stage run again"
        ) from error


def write_record(layout: Layout, stage: str, record: StageRecord) -> None:
    """Writes the record of a stage."""
    storage.write_json(layout.stage_record(stage), record.model_dump(exclude_unset=True))


def with_earlier_attempts(record: StageRecord, earlier: StageRecord) -> StageRecord:
    """The record of a stage with the time that earlier attempts with the same key took."""
    engine_seconds = Counter(earlier.engine_seconds)
    engine_seconds.update(record.engine_seconds)
    added = {
        "seconds": record.seconds + earlier.seconds,
        "unended": record.unended + earlier.unended,
        "engine_seconds": dict(engine_seconds),
    }
    return record.model_copy(update=added)


def unended_attempts(layout: Layout, stage: str) -> int:
    """Number of times that a stage was begun since its last record was written."""
    path = layout.unended_attempts(stage)
    return storage.read_json(path, int) if storage.exists(path) else 0


def synthesis_key(run: Run) -> str:
    """Hash of everything that decides the dataset: prompts, recipes, models and filters."""
    prepared = run.prepared
    recipes = [recipe.model_dump(mode="json") for recipe in run.config.synthesis.recipes]
    filters = prepared.filters_before_scoring
    return digest_json([prepared.prompts_digest, recipes, prepared.synthesis_digests, filters])


def synthesized_dataset(run: Run) -> str | None:
    """Digest of the run's dataset; None until synthesize has finished for these inputs."""
    return _dataset(run, read_record(run.layout, "synthesize"), synthesis_key(run))


def score_key(run: Run) -> str:
    """Hash of everything that decides which sequences are scored, by whom, and trained on."""
    weights = run.config.combine.model_dump(mode="json")
    identities, filters = run.prepared.cache_identities, run.prepared.filters_after_scoring
    return digest_json([synthesized_dataset(run), identities, weights, filters])


def scored_dataset(run: Run) -> str | None:
    """Digest of the dataset that is trained on, which lacks sequences that nobody could score.

    None until score has finished for these inputs, and also if the weights that it learned are
    lost.
    """
    learns = isinstance(run.config.combine.weights, LearnedWeights)
    if learns and not storage.exists(run.layout.learned_weights):
        return None
    return _dataset(run, read_record(run.layout, "score"), score_key(run))


def _dataset(run: Run, record: StageRecord, key: str) -> str | None:
    """Digest of the dataset that a record names, if the record is valid and the dataset exists."""
    if record.key != key or record.dataset is None:
        return None
    return record.dataset if storage.exists(run.layout.dataset(record.dataset)) else None


def stage_key(run: Run, stage: str) -> str:
    """Hash of everything that decides train, export or evaluate."""
    dataset = scored_dataset(run)
    assert dataset is not None, "scoring is complete before any stage that needs its dataset"
    parts: list[Any] = [spec.identity() for spec in training_specs(run, dataset)]
    if stage == "evaluate":
        config, prepared = run.config, run.prepared
        parts += [synthesis_key(run), prepared.cache_identities, prepared.filters_after_scoring]
        parts += [prepared.checker_identity, _served(config)]
        costs = {name: teacher.cost_per_hour for name, teacher in config.teachers.items()}
        parts += [config.evaluation.model_dump(mode="json"), costs, config.student.cost_per_hour]
        parts += [config.training.cost_per_hour, config.synthesis.max_sequence_tokens]
        # The report compares with the mixture, whatever the losses are.
        parts.append(run.combine().model_dump(mode="json"))
        parts.append({name: cache.generation for name, cache in run.cache_layouts().items()})
    return digest_json([stage, *parts])


def _served(config: Config) -> dict[str, Any]:
    """Options under which each model is served, which decide its speed and memory in the report."""
    return {STUDENT: exact_json(config.student.vllm)} | {
        name: exact_json(teacher.vllm)
        if isinstance(teacher, TeacherConfig)
        else [teacher.endpoint.url, teacher.endpoint.max_concurrency]
        for name, teacher in config.teachers.items()
    }
