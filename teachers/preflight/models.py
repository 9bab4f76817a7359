"""Preflight of all models of a run: their folders, configs, weights, tokenizers, ends of answers.

Every check reads files alone. A message begins with the model's key in the config.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import PreTrainedTokenizerBase

from pipeline.config.base import ModelFiles
from pipeline.config.load import is_folder
from pipeline.config.run import Config
from pipeline.config.teachers import TeacherConfig
from pipeline.errors import ConfigError
from pipeline.messages import foreign
from pipeline.run.training_spec import is_complete_checkpoint
from teachers.preflight.folder import MOST_TOKENS, check_folder, read_object
from teachers.preflight.model_layers import text_config
from teachers.preflight.weights import check_weights
from teachers.reading import reading
from teachers.rendering import template_of
from teachers.tokenizing import load_tokenizer

GENERATION_CONFIG = "generation_config.json"
MOST = {
    "vocab_size": MOST_TOKENS,
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 16,
}
"""Largest sizes of a model."""
NEEDED = ("vocab_size",)
"""Sizes that every language model has."""


@dataclass(frozen=True)
class _Model:
    """A model that the config names.

    Attributes:
        key: place in the config.
        files: folder or hub id.
        loads_weights: whether its own weights are loaded, in the usual way.
        by_transformers: whether transformers loads them and no engine.
    """

    key: str
    files: ModelFiles
    loads_weights: bool
    by_transformers: bool = False


def check_models(config: Config) -> None:
    """Checks everything about the models of a run that can be read from each one's files.

    Raises:
        ConfigError: a model's files are missing, broken, or not those of a language model.
    """
    for model in _models(config):
        with named(model.key):
            check_model(model.files, model.loads_weights, model.by_transformers)
    weights = config.student.initial_weights
    if weights is not None and not is_complete_checkpoint(weights):
        with named("student.initial_weights"):
            _check_initial_weights(weights)


def check_model(
    files: ModelFiles, loads_weights: bool = False, by_transformers: bool = False
) -> None:
    """Checks the files of one model: of its folder, or of what the hub's cache has of it.

    Args:
        loads_weights: check its weights as well.
        by_transformers: whether transformers loads the weights and no engine.

    Raises:
        ConfigError: the folder or hub id does not exist, or its files are broken.
    """
    if is_folder(files.model):
        check_folder(files.model)
    text = text_config(files)
    with reading("config.json", files.model):
        _check_sizes(text, files.model)
    if (copy := _local_copy(files)) is not None:
        check_folder(str(copy))
        check_ends(copy, text.vocab_size)
    if loads_weights:
        check_weights(files.model, files.revision, text.vocab_size, by_transformers=by_transformers)
    tokenizer = load_tokenizer(files)
    with reading("tokenizer.json", files.model):
        if not tokenizer.get_vocab():
            raise ValueError("its vocabulary is empty")
        if not isinstance(template_of(tokenizer), str | None):
            raise ValueError("its chat template is no text")
        ids: Any = tokenizer("The answer is 42.\n")["input_ids"]
        tokenizer.decode(ids, skip_special_tokens=True)
    if copy is not None:
        _check_added_tokens(copy / "tokenizer.json", tokenizer)


def check_ends(folder: Path, rows: int) -> None:
    """Checks the tokens that end an answer in the generation config of a folder, if it has one.

    Args:
        rows: tokens in the model's vocabulary.

    Raises:
        ConfigError: they are no token ids.
    """
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return
    found = read_object(path).get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    wrong = [e for e in ends if not isinstance(e, int) or isinstance(e, bool) or not 0 <= e < rows]
    if wrong:
        raise ConfigError(
            f"{path}: eos_token_id {str(wrong[0])[:100]!r} is no id of the model's {rows} tokens: "
            "give the id, or a list of ids, of the tokens that end an answer"
        )


@contextmanager
def named(key: str) -> Iterator[None]:
    """Puts a key of the config before the message of every error that concerns it.

    Raises:
        ConfigError: in place of one without the key.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


def _models(config: Config) -> Iterator[_Model]:
    for name, teacher in config.teachers.items():
        if isinstance(teacher, TeacherConfig):
            # an engine's `load_format` decides which files it reads
            yield _Model(f"teachers.{name}.model", teacher.files, "load_format" not in teacher.vllm)
        elif teacher.files is not None:
            yield _Model(f"teachers.{name}.endpoint.tokenizer", teacher.files, False)
    student = config.student
    own = student.initialization == "pretrained" and student.initial_weights is None
    yield _Model("student.model", student.files, own, by_transformers=True)


def _check_sizes(text: Any, model: str) -> None:
    names = text.architectures
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise ConfigError(
            f"the config of {model} has architectures {foreign(names, 100)!r}, which are no list "
            "of class names: mend its config.json"
        )
    for name, most in MOST.items():
        size = getattr(text, name, None)
        if size is None and name not in NEEDED:
            continue
        if size is None:
            raise ConfigError(
                f"the config of {model}, of the type {text.model_type!r}, has no {name}: "
                "choose a language model"
            )
        for each in size if isinstance(size, list) else [size]:  # a list has one for each layer
            if not isinstance(each, int) or isinstance(each, bool) or not 1 <= each <= most:
                raise ConfigError(
                    f"the config of {model} has {name} {str(each)[:100]!r}, which is no size from "
                    f"1 to {most}: mend its config.json"
                )


def _check_added_tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that added tokens have the ids that their file gives them: an id that another token
    has is given up for a new one, without a word.
    """
    if not path.exists():
        return
    for token in read_object(path)["added_tokens"]:
        used = tokenizer.convert_tokens_to_ids(token["content"])
        if used != token["id"]:
            raise ConfigError(
                f"{path} adds the token {foreign(token['content'], 80)!r} with the id "
                f"{token['id']}, and it gets {used}, since the file contradicts itself: give it an "
                "id that no other token has"
            )


def _local_copy(files: ModelFiles) -> Path | None:
    """Folder with the files of a model on this machine; None if there is none."""
    if is_folder(files.model):
        return Path(files.model)
    try:
        return Path(snapshot_download(files.model, revision=files.revision, local_files_only=True))
    except (OSError, ValueError):
        return None


def _check_initial_weights(folder: str) -> None:
    path = Path(folder)
    if not path.is_dir() or not any(path.glob("*.safetensors*")):
        raise ConfigError(
            f"{folder} is neither a complete checkpoint (…/checkpoints/step-<n>) nor a model "
            "folder with safetensors: check the path"
        )
    check_folder(folder)
    check_weights(folder, None, by_transformers=True)
