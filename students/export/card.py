"""The model card of an exported student: where its data, its teachers and its numbers come from."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from pipeline import storage
from pipeline.config.load import is_folder
from pipeline.config.run import Config
from pipeline.config.teachers import EndpointTeacherConfig, TeacherConfig
from pipeline.run.training_spec import TrainingSpec

_PATH = re.compile(r"(?<![\w:/.~-])(?:~|file:/)?/(?:[^\s'\"/]+/)+([^\s'\"/]*)")
"""An absolute path within a text, with its last part; no URL of another kind."""
_PUNCTUATION = re.compile(r"[!-,:-@\[-`{-~]|(?<=www)\.")
"""Characters with a meaning in Markdown or HTML, those of most names left out."""
LIBRARIES = ("torch", "transformers", "deepspeed", "ray")
"""Libraries whose versions stand in the model card."""


def model_card(spec: TrainingSpec) -> str:
    """The text of README.md, with a YAML header: the full origin of the model."""
    config, summary = spec.config, storage.read_json(spec.summary_path)
    header = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "polystill"],
    }
    if (base := _base_model(config)) is not None:
        header["base_model"] = base
    provenance = {
        "run": config.name,
        "student": spec.student,
        "teachers": {
            name: _origin(teacher) | {"cache": spec.cache_fingerprints.get(name)}
            for name, teacher in config.teachers.items()
        },
        "round": config.round,
        "initial_weights": _published(config.student.initial_weights),
        # only what the config sets
        **config.student.model_dump(mode="json", include={"template_arguments", "template_date"}),
        "dataset": spec.dataset_digest,
        "steps": summary["steps"],
        "final": summary["final"],
        "versions": {library: version(library) for library in LIBRARIES},
        "identity": summary["identity"],
        "changes": summary["changes"],
    }
    provenance = _without_folders(provenance)
    teachers = ", ".join(map(_named, config.teachers, config.teachers.values()))
    origin = f"distilled from {teachers}"
    if spec.student == "twin":
        origin = (
            "trained by cross-entropy alone on the data of the student that was distilled from "
            f"{teachers},"
        )
    # programs read the provenance as well: one YAML block
    return (
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n# {config.name}\n\n"
        f"A causal language model {origin} with polystill.\n\n"
        f"## Provenance\n\n```yaml\n{yaml.safe_dump(provenance, sort_keys=False)}```\n"
    )


def _base_model(config: Config) -> str | None:
    """Hub id of the model that the student was fine-tuned from, which is what the Hub calls
    `base_model`; None if it is unknown or there is none.

    Rounds after the first start from a student of this run; other initial weights have an origin
    that is not known here.
    """
    student = config.student
    is_known = student.initial_weights is None or config.round > 1
    is_tuned = student.initialization == "pretrained" and is_known
    return student.model if is_tuned and not is_folder(student.model) else None


def _named(name: str, teacher: TeacherConfig | EndpointTeacherConfig) -> str:
    """A teacher's name, with its hub id if it has one."""
    if isinstance(teacher, EndpointTeacherConfig) or is_folder(teacher.model):
        return name
    return f"{name} ({_literally(teacher.model)})"


def _origin(teacher: TeacherConfig | EndpointTeacherConfig) -> dict[str, str | None]:
    """The model behind a teacher."""
    if isinstance(teacher, EndpointTeacherConfig):
        return {"endpoint_model": teacher.endpoint.model, "identity": teacher.model_identity}
    return {"model": _published(teacher.model), "revision": teacher.revision}


def _published(model: str | None) -> str | None:
    """A hub id as it is, and a folder by its name: its place says who uses which machine."""
    return Path(model).name if model is not None and is_folder(model) else model


def _without_folders(value: Any) -> Any:
    """A JSON value whose texts name files and folders by their own names alone."""
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    return _PATH.sub(r"\1", value) if isinstance(value, str) else value


def _literally(name: str) -> str:
    """A name as Markdown shows it, whatever it spells."""
    return _PUNCTUATION.sub(r"\\\g<0>", " ".join(name.split()))
