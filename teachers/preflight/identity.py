"""Identity of a model: the resolved hub revision, or the hash of a local folder's weights.

Hashes of weight files are stored under the storage root by the state of the file, so that a large
model is read once.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from pipeline import storage
from pipeline.config.load import is_folder
from pipeline.config.student import StudentConfig
from pipeline.config.teachers import EndpointTeacherConfig, TeacherConfig
from pipeline.errors import ConfigError, CorruptFileError
from pipeline.fingerprint import digest_json
from pipeline.layout import Layout
from pipeline.run.training_spec import is_complete_checkpoint
from teachers.preflight.model_layers import text_config
from teachers.rope import uses_long_factors

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
    if model.trust_remote_code:
        decisive += _code_below(folder)
    return {"weights": digest_json(_file_hashes(decisive, layout, folder))} | _rope(model)


def _code_below(folder: Path) -> list[Path]:
    """Python files in the folders of a model, which its code may import; hidden ones are none."""
    found, seen = [], {folder.resolve()}
    for place, names, files in os.walk(folder, followlinks=True):
        below = [name for name in sorted(names) if not name.startswith((".", "__pycache__"))]
        names[:] = [name for name in below if Path(place, name).resolve() not in seen]
        seen |= {Path(place, name).resolve() for name in names}
        if Path(place) != folder:
            found += [Path(place, name) for name in files if name.endswith(CODE_SUFFIX)]
    return sorted(path for path in found if path.is_file())


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
    folder = Path(student.model)
    return {"config": digest_json(_file_hashes([folder / "config.json"], layout, folder))}


def _weights_identity(folder: str, layout: Layout) -> dict[str, str]:
    """Part of the student's identity for weights from a complete checkpoint or a model folder."""
    if not is_complete_checkpoint(folder):
        if not any(Path(folder).glob("*.safetensors")):
            raise ConfigError(
                f"student.initial_weights: {folder} is neither a complete checkpoint "
                "(…/checkpoints/step-<n>) nor a model folder with safetensors: check the path"
            )
        files = [Path(folder, "config.json"), *sorted(Path(folder).glob("*.safetensors"))]
        return {"initial_weights": digest_json(_file_hashes(files, layout, Path(folder)))}
    path = storage.join(folder, "state.json")
    state = storage.read_json(path)
    try:
        step, dataset = int(state["step"]), str(state["identity"]["dataset_digest"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFileError(
            f"{path} is not what a training writes: choose another checkpoint"
        ) from error
    zero = Path(folder, "zero")
    files = sorted(zero.glob("*_states.pt"))
    return {
        "initial_weights": digest_json(_file_hashes(files, layout, zero)),
        "initial_step": str(step),
        "initial_dataset": dataset,
    }


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


def _file_hashes(files: list[Path], layout: Layout, folder: Path) -> dict[str, str]:
    """Hashes of files by their paths below a folder, read again only where a file has changed."""
    remembered = _remembered(layout)
    keys = {path: _state(path) for path in files}
    unknown = [path for path in files if keys[path] not in remembered]
    if unknown:
        with ThreadPoolExecutor(4) as pool:
            hashes = zip(
                (keys[path] for path in unknown), pool.map(_hash_file, unknown), strict=True
            )
            remembered |= dict(hashes)
        storage.write_json(layout.weight_hashes, remembered)
    return {path.relative_to(folder).as_posix(): remembered[keys[path]] for path in files}


def _remembered(layout: Layout) -> dict[str, str]:
    if not storage.exists(layout.weight_hashes):
        return {}
    remedy = "remove it, and weights are read and hashed again"
    return storage.read_json(layout.weight_hashes, dict[str, str], remedy)


def _state(path: Path) -> str:
    """Text that changes with a file.

    Size and modification time alone can stay the same, as with `cp -p`, `rsync -a`, or archives
    whose files have one date. A file has another inode if it was replaced, and another time of
    change if it was written.
    """
    state = path.stat()
    return f"{path}:{state.st_size}:{state.st_mtime_ns}:{state.st_ino}:{state.st_ctime_ns}"


def _hash_file(path: Path) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as stream:
            while block := stream.read(READ_BYTES):
                hasher.update(block)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}: mend the file, or give this user the right "
            "to read it"
        ) from error
    return hasher.hexdigest()
