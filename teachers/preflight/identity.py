"""Identity of a model: the resolved hub revision, or the hash of a local folder's weights.

Hashes of weight files are stored under the storage root by size and modification time, so that a
large model is read once.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoConfig
from transformers.utils.hub import has_file

from pipeline import storage
from pipeline.config.base import ModelFiles
from pipeline.config.load import is_folder
from pipeline.config.student import StudentConfig
from pipeline.config.teachers import EndpointTeacherConfig, TeacherConfig
from pipeline.errors import ConfigError
from pipeline.fingerprint import digest_json
from pipeline.layout import Layout
from pipeline.run.training_spec import is_complete_checkpoint
from teachers.preflight.model_layers import text_config
from teachers.rope import uses_long_factors

SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
# `generation_config.json` names the tokens that end an answer; a model's own code counts as well.
OTHER_FILES = ("config.json", "generation_config.json")
CODE_SUFFIX = ".py"
READ_BYTES = 1 << 24


def model_identity(
    model: TeacherConfig | EndpointTeacherConfig | StudentConfig, layout: Layout
) -> dict[str, str]:
    """Identity of a model, which names the caches of its rows.

    A hub model has `{"hub": id, "revision": commit}`, a folder `{"weights": hash}`, an endpoint
    `{"endpoint": label, "api": kind}`. The label is `model_identity`, or else the name of the
    served model. `{"rope": "long"}` is added for a teacher that is served with the long factors of
    LongRoPE.

    Raises:
        ConfigError: the folder is missing or holds no model, or the hub cannot be reached.
    """
    if isinstance(model, EndpointTeacherConfig):
        name = model.model_identity or model.endpoint.model
        return {"endpoint": name, "api": model.endpoint.api}
    if not is_folder(model.model):
        return {"hub": model.model, "revision": _hub_commit(model)} | _rope(model)
    folder = Path(model.model)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{model.model} is not a model folder, since it has no config.json: check the path"
        )
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not any(path.suffix in WEIGHT_SUFFIXES for path in files):
        raise ConfigError(
            f"{model.model} holds no weights ({', '.join(WEIGHT_SUFFIXES)}): check the path"
        )
    decisive = [
        path
        for path in files
        if path.suffix in (*WEIGHT_SUFFIXES, CODE_SUFFIX) or path.name in OTHER_FILES
    ]
    return {"weights": digest_json(_file_hashes(decisive, layout))} | _rope(model)


def _rope(model: TeacherConfig | StudentConfig) -> dict[str, str]:
    """Part of a teacher's identity for the long factors of LongRoPE."""
    if not isinstance(model, TeacherConfig) or model.max_model_len is None:
        return {}
    return {"rope": "long"} if uses_long_factors(model.vllm, text_config(model.files)) else {}


def student_identity(student: StudentConfig, layout: Layout) -> dict[str, str]:
    """Identity of the student's start: `model_identity`, or the hash of its config for a random
    start. Weights of an earlier training are added as further keys.

    Raises:
        ConfigError: the model or the weights are missing.
    """
    if student.initial_weights is not None:
        random = student.model_copy(update={"initial_weights": None, "initialization": "random"})
        return student_identity(random, layout) | _weights_identity(student.initial_weights, layout)
    if student.initialization == "pretrained" or not is_folder(student.model):
        return model_identity(student, layout)
    return {"config": digest_json(_file_hashes([Path(student.model, "config.json")], layout))}


def _weights_identity(folder: str, layout: Layout) -> dict[str, str]:
    """Part of the student's identity for weights from a complete checkpoint or a model folder."""
    if not is_complete_checkpoint(folder):
        if not any(Path(folder).glob("*.safetensors")):
            raise ConfigError(
                f"student.initial_weights: {folder} is neither a complete checkpoint "
                "(…/checkpoints/step-<n>) nor a model folder with safetensors: check the path"
            )
        files = [Path(folder, "config.json"), *sorted(Path(folder).glob("*.safetensors"))]
        return {"initial_weights": digest_json(_file_hashes(files, layout))}
    state = storage.read_json(storage.join(folder, "state.json"))
    files = sorted(Path(folder, "zero").glob("*_states.pt"))
    return {
        "initial_weights": digest_json(_file_hashes(files, layout)),
        "initial_step": str(state["step"]),
        "initial_dataset": state["identity"]["dataset_digest"],
    }


def check_model(model: ModelFiles) -> None:
    """Checks that transformers can load the model's config.

    Raises:
        ConfigError: the folder or hub id does not exist, or its config cannot be read.
    """
    if is_folder(model.model) and not Path(model.model).is_dir():
        raise ConfigError(f"the model folder {model.model} does not exist: check the path")
    try:
        AutoConfig.from_pretrained(
            model.model, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the model config of {model.model}: {error}") from error


def check_weights(model: str, revision: str | None) -> None:
    """Checks that a folder or a hub model has its weights as safetensors, since other formats are
    pickles, which run any code put into them.

    Args:
        model: folder or hub id.
        revision: hub revision.

    Raises:
        ConfigError: the model has no safetensors.
    """
    if is_folder(model):
        has_safetensors = any(Path(model).glob("*.safetensors"))
    else:
        has_safetensors = any(has_file(model, name, revision=revision) for name in SAFETENSORS)
    if not has_safetensors:
        raise ConfigError(
            f"{model} has no safetensors: its weights would be unpickled, which can run any code; "
            "choose a revision that has safetensors, convert the model with `save_pretrained` if "
            "you trust it, or, for a teacher, name the format in `vllm.load_format`"
        )


def _hub_commit(model: TeacherConfig | StudentConfig) -> str:
    try:
        snapshot = snapshot_download(
            model.model, revision=model.revision, allow_patterns=["config.json"]
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise ConfigError(
            f"cannot resolve the hub model {model.model!r} (revision {model.revision!r}): {error}"
        ) from error
    return Path(snapshot).name


def _file_hashes(files: list[Path], layout: Layout) -> dict[str, str]:
    remembered = (
        storage.read_json(layout.weight_hashes) if storage.exists(layout.weight_hashes) else {}
    )
    keys = {path: f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for path in files}
    unknown = [path for path in files if keys[path] not in remembered]
    if unknown:
        with ThreadPoolExecutor(4) as pool:
            remembered |= dict(
                zip((keys[path] for path in unknown), pool.map(_hash_file, unknown), strict=True)
            )
        storage.write_json(layout.weight_hashes, remembered)
    return {path.name: remembered[keys[path]] for path in files}


def _hash_file(path: Path) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while block := stream.read(READ_BYTES):
            hasher.update(block)
    return hasher.hexdigest()
