"""Preflight of losses on hidden states: do the models have the layers, in sizes that fit?"""

from __future__ import annotations

from typing import Any

from pipeline.config.base import ModelFiles
from pipeline.config.losses import HiddenState, HiddenStatesLoss
from pipeline.config.run import Config
from pipeline.errors import ConfigError
from teachers.reading import model_config, reading


def check_layers(config: Config) -> None:
    """Checks that the hidden states of every loss exist, and that their sizes fit.

    Raises:
        ConfigError: a model has no such layer, the projection of the stored hidden states does not
            reduce their dimensions, or the sizes of teacher and student differ without a learned
            projection.
    """
    student = text_config(config.student.files)
    for loss in config.training.losses:
        if not isinstance(loss, HiddenStatesLoss):
            continue
        files = config.teachers[loss.teacher].files
        assert files is not None, "the config refuses losses on hidden states of an endpoint"
        teacher = text_config(files)
        for name, model, layers in (
            (f"teacher {loss.teacher!r}", teacher, loss.layers.keys()),
            ("the student", student, loss.layers.values()),
        ):
            if max(layers) > model.num_hidden_layers:
                raise ConfigError(
                    f"training.losses: {loss.name} names layer {max(layers)}, but {name} has "
                    f"{model.num_hidden_layers} layers: name a lower one; layer 0 is the embeddings"
                )
        dimensions = config.scoring.features.dimensions
        if dimensions is not None and dimensions >= teacher.hidden_size:
            raise ConfigError(
                f"scoring.features.dimensions ({dimensions}) is not below the hidden size of "
                f"teacher {loss.teacher!r} ({teacher.hidden_size}): lower it or leave it out"
            )
        stored = dimensions or teacher.hidden_size
        plain = isinstance(loss, HiddenState) and loss.projection == "none"
        if plain and stored != student.hidden_size:
            raise ConfigError(
                f"training.losses: {loss.name} without projection compares {stored} stored "
                f"dimensions with the student's {student.hidden_size}: set `projection: learned`"
            )


def hidden_sizes(config: Config) -> dict[str, int]:
    """Hidden sizes of the teachers whose hidden states a loss needs, by name."""
    files = {name: config.teachers[name].files for name in config.training.teacher_layers}
    return {name: text_config(f).hidden_size for name, f in files.items() if f is not None}


def text_config(model: ModelFiles) -> Any:
    """Config of a language model from transformers, or of the text part of a multimodal model.

    Raises:
        ConfigError: it cannot be read.
    """
    loaded = model_config(model)
    with reading("config.json", model.model):
        return loaded.get_text_config()
