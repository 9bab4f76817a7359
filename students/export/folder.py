"""Export of a finished training as a Hugging Face folder that loads anywhere, checked against the
trained weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from pipeline.config.student import StudentConfig
from pipeline.errors import TrainingError
from pipeline.run.training_spec import TrainingSpec
from pipeline.sequences import read_sequences
from students.architecture.dtypes import DTYPES, as_loaded
from students.architecture.initial_weights import fit_weights
from students.disk_space import full_disk_explained
from students.export.card import model_card
from students.export.generation import (
    GENERATION_CONFIG,
    generation_settings,
    set_end_tokens,
    write_generation_settings,
)
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
    if spec.config.student.eos_token is not None:
        tokenizer.eos_token = spec.config.student.eos_token
    settings = generation_settings(source, tokenizer, spec.end_of_answer)
    set_end_tokens(model.config, settings["eos_token_id"])
    model.generation_config = GenerationConfig()
    model.save_pretrained(target)
    write_generation_settings(target, settings)
    copy_tokenizer(source, target)
    set_tokenizer_options(spec.config.student, target)
    (target / "README.md").write_text(model_card(spec))
    return model


def model_folder(spec: TrainingSpec) -> str:
    """A local folder with the student's config, generation config and tokenizer files."""
    student = spec.config.student
    if is_folder(student.model):
        return student.model
    return snapshot_download(
        student.model,
        revision=student.revision,
        allow_patterns=["config.json", GENERATION_CONFIG, "*.py", *TOKENIZER_FILES],
    )


def trained_model(spec: TrainingSpec, source: str) -> PreTrainedModel:
    """The student with its trained weights, in its own dtype.

    Raises:
        TrainingError: weights are missing or superfluous, or have another shape.
    """
    trust = spec.config.student.trust_remote_code
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust)
    # the trained weights are not quantised, whatever the student's own files were
    vars(config).pop("quantization_config", None)
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


def set_tokenizer_options(student: StudentConfig, target: Path) -> None:
    """Puts the end-of-sequence token and the chat template that the config names into a copy of the
    student's tokenizer files.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = target / name
        if path.is_file() and student.eos_token is not None:
            values = json.loads(path.read_text())
            path.write_text(json.dumps(values | {"eos_token": student.eos_token}, indent=2) + "\n")
    if student.chat_template is not None:
        path = target / "tokenizer_config.json"
        values = json.loads(path.read_text())
        values.pop("chat_template", None)
        path.write_text(json.dumps(values, indent=2) + "\n")
        template = storage.read_bytes(student.chat_template)
        (target / "chat_template.jinja").write_bytes(template)


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
