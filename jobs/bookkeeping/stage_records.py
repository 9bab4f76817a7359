"""What the stages of a run have left: their records, and the keys that say what these are about."""

from __future__ import annotations

from typing import Any

from pipeline import storage
from pipeline.combine.learned import learned_weights, with_learned
from pipeline.config.combine import LearnedWeights
from pipeline.config.run import Config
from pipeline.config.synthesis import STUDENT
from pipeline.config.teachers import TeacherConfig
from pipeline.fingerprint import digest_json
from pipeline.layout import Layout
from pipeline.run.preparation import Prepared
from pipeline.run.training_spec import training_specs


def read_record(layout: Layout, stage: str) -> dict[str, Any]:
    """The record of a stage; empty when it has never finished."""
    path = layout.stage_record(stage)
    return storage.read_json(path) if storage.exists(path) else {}


def unended_attempts(layout: Layout, stage: str) -> int:
    """How often a stage was begun since its last record was written."""
    path = layout.unended_attempts(stage)
    return storage.read_json(path) if storage.exists(path) else 0


def synthesis_key(config: Config, prepared: Prepared) -> str:
    """Hash of what decides the dataset: prompts, who answers which of them how, filters."""
    recipes = [recipe.model_dump(mode="json") for recipe in config.synthesis.recipes]
    filters = prepared.filters_before_scoring
    return digest_json([prepared.prompts, recipes, prepared.synthesis_digests, filters])


def dataset_of(config: Config, layout: Layout, prepared: Prepared) -> str | None:
    """The digest of the run's dataset; None until synthesize has finished for these recipes."""
    record = read_record(layout, "synthesize")
    if record.get("key") != synthesis_key(config, prepared) or not storage.exists(
        layout.dataset(record["dataset"])
    ):
        return None
    return record["dataset"]


def score_key(config: Config, layout: Layout, prepared: Prepared) -> str:
    """Hash of what decides which sequences are scored, by whom, and which are trained on."""
    weights, filters = config.combine.model_dump(mode="json"), prepared.filters_after_scoring
    dataset = dataset_of(config, layout, prepared)
    return digest_json([dataset, prepared.scoring_recipes, weights, filters])


def scored_dataset(config: Config, layout: Layout, prepared: Prepared) -> str | None:
    """The digest of what is trained on: the dataset without sequences that nobody could score.

    None before score has finished for this dataset and these recipes, and where the weights that it
    learned are lost.
    """
    learns = isinstance(config.combine.weights, LearnedWeights)
    if learns and not storage.exists(layout.learned_weights):
        return None
    record = read_record(layout, "score")
    if record.get("key") != score_key(config, layout, prepared) or not storage.exists(
        layout.dataset(record["dataset"])
    ):
        return None
    return record["dataset"]


def stage_key(config: Config, layout: Layout, prepared: Prepared, stage: str) -> str:
    """Hash of what decides train, export or evaluate; a record of the same key is valid."""
    digest = scored_dataset(config, layout, prepared)
    assert digest is not None, "scoring is complete before any stage that needs its dataset"
    jobs = training_specs(config, layout, prepared, digest)
    parts: list[Any] = [job.identity() for job in jobs]
    if stage == "evaluate":
        parts += [synthesis_key(config, prepared), prepared.scoring_recipes]
        parts += [prepared.filters_after_scoring, prepared.checker, _served(config)]
        costs = {name: teacher.cost_per_hour for name, teacher in config.teachers.items()}
        parts += [config.evaluation.model_dump(mode="json"), costs, config.student.cost_per_hour]
        parts += [config.training.cost_per_hour, config.synthesis.max_sequence_tokens]
        # The report compares with the mixture, whatever the losses are.
        combine = with_learned(config.combine, learned_weights(config.combine, layout))
        parts.append(combine.model_dump(mode="json"))
        parts.append({name: c.generation for name, c in prepared.caches(layout).items()})
    return digest_json([stage, *parts])


def _served(config: Config) -> dict[str, Any]:
    """How each model is served, which decides the speed and memory that the report states."""
    return {STUDENT: config.student.vllm} | {
        name: teacher.vllm
        if isinstance(teacher, TeacherConfig)
        else [teacher.endpoint.url, teacher.endpoint.max_concurrency]
        for name, teacher in config.teachers.items()
    }
