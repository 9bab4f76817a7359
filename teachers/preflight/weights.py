"""Preflight of weights: safetensors whose headers say that they are whole, and are the model's.

A header costs a few kilobytes to read, so that this takes no longer for a large model. The numbers
themselves are read when they are hashed and loaded.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import has_file

from pipeline.config.load import is_folder
from pipeline.errors import ConfigError
from pipeline.messages import foreign
from teachers.preflight.folder import check_file, read_object

SINGLE = "model.safetensors"
SAFETENSORS = (SINGLE, "model.safetensors.index.json")
"""Files by which transformers finds the weights."""
INDICES = ("model.safetensors.index.json", "consolidated.safetensors.index.json")
SHOWN = 3
"""Most names that a message lists."""
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,9})-of-(?P<count>\d{1,9})\.safetensors")
MOST_FILES = 10_000
_FILE_NAME = re.compile(r"[^/\0]{1,200}\.safetensors")
_UNPICKLED = (
    "its weights would be unpickled, which can run any code; choose a revision that has "
    "safetensors, convert the model with `save_pretrained` if you trust it, or, for a teacher, "
    "name the format in `vllm.load_format`"
)

Shapes = dict[str, tuple[int, ...]]


def check_weights(
    model: str, revision: str | None, rows: int | None = None, *, by_transformers: bool = False
) -> None:
    """Checks that a folder or a hub model has whole weights as safetensors, since other formats are
    pickles, which run any code put into them.

    The files of a hub model are looked at where the hub cannot be asked for what is missing.

    Args:
        model: folder or hub id.
        revision: hub revision.
        rows: tokens in the vocabulary of the model's config; None if weights may be of any model.
        by_transformers: whether transformers loads the weights and no engine.

    Raises:
        ConfigError: the model has no safetensors, or their files are broken or incomplete.
    """
    if is_folder(model):
        _check_files(Path(model), model, rows, by_transformers)
        return
    if not constants.HF_HUB_OFFLINE:
        if not any(has_file(model, name, revision=revision) for name in SAFETENSORS):
            raise ConfigError(f"{model} has no safetensors: {_UNPICKLED}")
        return
    try:
        folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
        _check_files(folder, f"the hub cache's copy of {model}", rows, by_transformers)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{model} is not complete in the hub cache, and HF_HUB_OFFLINE forbids to fetch it: "
            f"{foreign(error)}; fetch it with `hf download {model}` where the hub can be reached"
        ) from error


def stored_shapes(model: str, revision: str | None) -> Shapes:
    """Shapes of the tensors by name that transformers finds for a model on this machine; none if
    the model is not complete here.
    """
    try:
        folder = (
            Path(model)
            if is_folder(model)
            else Path(snapshot_download(model, revision=revision, local_files_only=True))
        )
        return _check_files(folder, model, None, by_transformers=True)
    except (OSError, ValueError):
        return {}


def tensors_of(path: Path) -> Shapes:
    """Shapes of the tensors in a safetensors file, by name; only its header is read.

    Raises:
        ConfigError: the file is not whole, or is of another kind.
    """
    size = check_file(path)
    try:
        with safe_open(path, "numpy") as stream:
            return {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = foreign(error).removeprefix("Error while deserializing header: ")
        raise ConfigError(
            f"{path} ({size} bytes) is no whole file of safetensors: {reason}: fetch or write the "
            "file again, since a copy may have been cut"
        ) from error


def _check_files(folder: Path, model: str, rows: int | None, by_transformers: bool) -> Shapes:
    """Checks the weights in a folder that are loaded; returns the shapes of their tensors.

    Args:
        model: name of the model for messages.
    """
    files = {path.name for path in folder.glob("*.safetensors")}
    indices = [name for name in INDICES if (folder / name).exists()]
    if not files and not indices:
        raise ConfigError(f"{model} has no safetensors: {_UNPICKLED}")
    if by_transformers:
        indices = [] if SINGLE in files else indices[:1]
        if not indices and SINGLE not in files:
            raise ConfigError(
                f"{model} has safetensors ({_shown(files)}) and neither "
                f"{' nor '.join(SAFETENSORS)}, by which transformers finds weights: write them "
                "again with `save_pretrained`"
            )
        files &= {SINGLE}
    elif indices:  # an engine takes what the index names, or else all there is
        files = {name for name in files if name.startswith("consolidated")}
    else:
        _check_numbers(model, files)
    found: Shapes = {}
    for name in indices:
        found |= _tensors_of_index(folder / name)
    for name in sorted(files):
        found |= tensors_of(folder / name)
    if not found:
        raise ConfigError(f"{model}: its safetensors hold no tensors: fetch or write them again")
    widest = max(max(shape, default=0) if 0 not in shape else 0 for shape in found.values())
    if rows is not None and widest < rows:
        raise ConfigError(
            f"{model}: its safetensors are not the weights of its config.json, since no tensor has "
            f"a row for each of the {rows} tokens of the vocabulary, and those of an adapter have "
            "not: put the model's own weights there as safetensors"
        )
    return found


def _check_numbers(model: str, files: set[str]) -> None:
    """Refuses some of several numbered files, whose index is missing as well.

    Raises:
        ConfigError: a file between the first and the last is not there.
    """
    numbered = [match for name in files if (match := _NUMBERED.fullmatch(name))]
    for whole in {(match["stem"], match["count"]) for match in numbered}:
        have = {int(match["number"]) for match in numbered if match.group("stem", "count") == whole}
        wanted = set(range(1, min(int(whole[1]), MOST_FILES) + 1))
        if missing := sorted(wanted - have):
            raise ConfigError(
                f"{model} has {len(have)} of {int(whole[1])} files {whole[0]}-…, and number "
                f"{missing[0]} is missing, as is their index: fetch the model again"
            )


def _tensors_of_index(path: Path) -> Shapes:
    """Shapes of the tensors that an index names.

    Raises:
        ConfigError: the index has another form, or a file lacks what the index says of it.
    """
    named = read_object(path).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ConfigError(
            f"{path} has no weight_map, from the names of tensors to those of files: write the "
            "weights again with `save_pretrained`, or fetch the file again"
        )
    folder = path.parent
    for shard in named.values():
        if not isinstance(shard, str) or not _FILE_NAME.fullmatch(shard):
            raise ConfigError(
                f"{path} names the file {foreign(shard, 100)!r}, and all weights have to be "
                f"safetensors of {folder} itself: put them there, and name them without a folder"
            )
    files = sorted(set(named.values()))
    if missing := [name for name in files if not _is_there(folder / name)]:
        raise ConfigError(
            f"{path} names {len(files)} files with weights, and {len(missing)} of them "
            f"{'is' if len(missing) == 1 else 'are'} missing ({_shown(missing)}): fetch them, or "
            "remove the index if it belongs to other weights"
        )
    of_file = {name: tensors_of(folder / name) for name in files}
    absent = [name for name, shard in named.items() if name not in of_file[shard]]
    if absent:
        shard = named[absent[0]]
        raise ConfigError(
            f"{path} names tensors that are not in their files: {shard} lacks {_shown(absent)}: "
            "fetch the index and the files again, from one revision"
        )
    return {name: of_file[shard][name] for name, shard in named.items()}


def _is_there(path: Path) -> bool:
    """Whether a name is taken; `check_file` says what by."""
    return path.exists() or path.is_symlink()


def _shown(names: list[str] | set[str]) -> str:
    listed = [foreign(name, 100) for name in sorted(names)[:SHOWN]]
    return ", ".join(listed) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
