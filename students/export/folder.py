"""Export of a finished training as a Hugging Face folder that loads anywhere, checked against the
trained weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

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
from pipeline.templating import prelude
from students.architecture.build import load_model
from students.architecture.dtypes import DTYPES
from students.architecture.initial_weights import refuse_misfits
from students.disk_space import full_disk_explained
from students.export.card import model_card
from students.export.generation import (
    GENERATION_CONFIG,
    generation_settings,
    set_end_tokens,
    write_generation_settings,
)
from students.export.proof import prove

TOKENIZER_FILES = [
    "tokenizer*",
    "*.model",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
]


def export_student(spec: TrainingSpec, folder: str) -> dict[str, Any]:
    """Writes weights, tokenizer, chat template, generation config and model card; loads them back
    and proves that they are the trained student.

    Memory holds the model once, in its own dtype.

    Raises:
        TrainingError: training is not complete, its weights do not fit the model, or the exported
            model is not the trained one.
        StorageError: the disk is full.
    """
    if not storage.exists(spec.summary_path):
        raise TrainingError(
            f"{spec.folder} holds no finished training to export: run the train stage first"
        )
    target, student = Path(folder), spec.config.student
    with full_disk_explained(folder):
        _write(spec, target)
    weights = sorted(target.glob("*.safetensors"))
    for path in weights:
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    device = "cuda" if spec.config.evaluation.resources.num_gpus else "cpu"
    model = load_model(target, student.trust_remote_code, device)
    agreement = prove(spec, model, target)
    return {
        "folder": str(target),
        "files": sorted(path.name for path in target.iterdir() if path.is_file()),
        "num_parameters": model.num_parameters(),
        "num_bytes": sum(path.stat().st_size for path in weights),
        "dtype": student.dtype,
        "agreement": agreement.model_dump(),
    }


def _write(spec: TrainingSpec, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    refuse_links(target)
    source = model_folder(spec)
    model = trained_model(spec, source)
    tokenizer = AutoTokenizer.from_pretrained(
        source,
        trust_remote_code=spec.config.student.trust_remote_code,
        mistral_format=False,  # as in `teachers/tokenizing.py`
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


def refuse_links(target: Path) -> None:
    """Refuses a folder in which a file would be written through a link.

    Raises:
        TrainingError: the folder holds a link.
    """
    for path in sorted(target.iterdir()):
        if path.is_symlink():
            raise TrainingError(
                f"{path} is a link, and the export would be written through it: remove the link"
            )


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
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    path = Path(spec.layout.final_weights(spec.student))
    weights = load_file(path)  # mapped into memory: each tensor is read where it is cast
    refuse_misfits(skeleton, weights, str(path))
    dtype = DTYPES[spec.config.student.dtype]
    return type(skeleton).from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def copy_tokenizer(source: str, target: Path) -> None:
    """Copies tokenizer and chat template unchanged."""
    for path in sorted(
        {path for pattern in TOKENIZER_FILES for path in Path(source).glob(pattern)}
    ):
        if path.is_file() and not path.name.endswith(".safetensors"):
            shutil.copyfile(path, target / path.name)


def set_tokenizer_options(student: StudentConfig, target: Path) -> None:
    """Puts the end-of-sequence token and the chat template that the config names into a copy of the
    student's tokenizer files, with the template's arguments as its defaults.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = target / name
        if path.is_file() and student.eos_token is not None:
            values = json.loads(path.read_text())
            path.write_text(json.dumps(values | {"eos_token": student.eos_token}, indent=2) + "\n")
    arguments = prelude(student.template_arguments)  # the day is that of the use
    if student.chat_template is None and not arguments:
        return
    if student.chat_template is None:
        own = AutoTokenizer.from_pretrained(target, trust_remote_code=student.trust_remote_code)
        template = own.get_chat_template().encode()
    else:
        template = storage.read_bytes(student.chat_template)
    path = target / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values.pop("chat_template", None)
    path.write_text(json.dumps(values, indent=2) + "\n")
    (target / "chat_template.jinja").write_bytes(arguments.encode() + template)
