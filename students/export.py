"""Export of a finished training as a Hugging Face folder that loads anywhere, checked against the
trained weights.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from pipeline import storage
from pipeline.config.load import is_folder
from pipeline.config.run import Config
from pipeline.config.teachers import EndpointTeacherConfig, TeacherConfig
from pipeline.errors import TrainingError
from pipeline.run.training_spec import TrainingSpec
from pipeline.sequences import read_sequences
from students.architecture.dtypes import DTYPES, as_loaded
from students.architecture.initial_weights import fit_weights
from students.disk_space import full_disk_explained
from students.reference import gold_logprobs

TOKENIZER_FILES = [
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
]
PROBE_TOLERANCE = {"float32": 2e-3, "bfloat16": 0.15}
"""Largest difference in nats between a log-probability in training and in the exported model. The
two forwards differ in packing and, at bfloat16, in rounding: a logit near 20 moves by up to 0.06.
"""
LIBRARIES = ("torch", "transformers", "deepspeed", "ray")
"""Libraries whose versions stand in the model card."""


def export_student(spec: TrainingSpec, folder: str) -> dict[str, Any]:
    """Writes weights, tokenizer, chat template, generation config and model card; loads them back
    and compares.

    Raises:
        TrainingError: training is not complete, its weights do not fit the model, or the exported
            model computes other log-probabilities than the trained one.
        StorageError: the disk is full.
    """
    if not storage.exists(spec.summary_path):
        raise TrainingError(
            f"{spec.folder} holds no finished training to export: run the train stage first"
        )
    target = Path(folder)
    with full_disk_explained(folder):
        model = _write(spec, target)
    difference = probe_difference(spec, target)
    tolerance = PROBE_TOLERANCE[spec.config.student.dtype]
    if not difference <= tolerance:
        raise TrainingError(
            f"the exported model in {target} differs from the trained model by {difference:.3g} "
            f"nats on a token (tolerance {tolerance}): do not use it; remove the folder, and if a "
            "new export differs as well, train again"
        )
    weights = sorted(target.glob("*.safetensors"))
    for path in weights:
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    return {
        "folder": str(target),
        "files": sorted(path.name for path in target.iterdir() if path.is_file()),
        "num_parameters": model.num_parameters(),
        "num_bytes": sum(path.stat().st_size for path in weights),
        "dtype": spec.config.student.dtype,
        "largest_difference_nats": difference,
        "tolerance_nats": tolerance,
    }


def _write(spec: TrainingSpec, target: Path) -> PreTrainedModel:
    target.mkdir(parents=True, exist_ok=True)
    source = model_folder(spec)
    model = trained_model(spec, source)
    tokenizer = AutoTokenizer.from_pretrained(
        source, trust_remote_code=spec.config.student.trust_remote_code
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(target)
    copy_tokenizer(source, target)
    (target / "README.md").write_text(model_card(spec))
    return model


def model_folder(spec: TrainingSpec) -> str:
    """A local folder with the student's config and tokenizer files."""
    student = spec.config.student
    if is_folder(student.model):
        return student.model
    return snapshot_download(
        student.model,
        revision=student.revision,
        allow_patterns=["config.json", "*.py", *TOKENIZER_FILES],
    )


def trained_model(spec: TrainingSpec, source: str) -> PreTrainedModel:
    """The student with its trained weights, in its own dtype.

    Raises:
        TrainingError: weights are missing or superfluous, or have another shape.
    """
    trust = spec.config.student.trust_remote_code
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust, dtype=torch.float32)
    weights = Path(spec.layout.final_weights(spec.student))
    fit_weights(model, load_file(weights), str(weights))
    return as_loaded(model, DTYPES[spec.config.student.dtype]).eval()


def copy_tokenizer(source: str, target: Path) -> None:
    """Copies tokenizer and chat template unchanged."""
    for path in sorted(
        {path for pattern in TOKENIZER_FILES for path in Path(source).glob(pattern)}
    ):
        if path.is_file() and not path.name.endswith(".safetensors"):
            shutil.copyfile(path, target / path.name)


def probe_difference(spec: TrainingSpec, folder: Path) -> float:
    """Largest difference in nats between the exported model's gold log-probabilities and those that
    the training measured at its end.
    """
    probe = storage.read_json(spec.layout.probe(spec.student))
    trained = probe["gold_logprobs"]
    sequences = [
        sequence
        for shard in probe["shards"]
        for sequence in read_sequences(storage.join(spec.layout.root, shard))
        if sequence.sequence_id in trained
    ]
    exported = gold_logprobs(folder, sequences, spec.config.student.trust_remote_code, "cpu")
    differences = [np.subtract(exported[name], trained[name]) for name in trained]
    return float(np.abs(np.concatenate(differences)).max())


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
        "initial_weights": config.student.initial_weights,
        "dataset": spec.dataset_digest,
        "steps": summary["steps"],
        "final": summary["final"],
        "versions": {library: version(library) for library in LIBRARIES},
        "identity": summary["identity"],
        "changes": summary["changes"],
    }
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
    return f"{name} ({teacher.model})"


def _origin(teacher: TeacherConfig | EndpointTeacherConfig) -> dict[str, str | None]:
    """The model behind a teacher."""
    if isinstance(teacher, EndpointTeacherConfig):
        return {"endpoint_model": teacher.endpoint.model, "identity": teacher.model_identity}
    return {"model": teacher.model, "revision": teacher.revision}
