"""The generation config of an exported student: end tokens and sampling defaults, for every engine
that serves it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

GENERATION_CONFIG = "generation_config.json"
METADATA = ("_from_model_config", "_commit_hash", "_original_object_hash", "transformers_version")
"""Keys that transformers writes about the file itself."""


def generation_settings(
    source: str, tokenizer: PreTrainedTokenizerBase, end_of_answer: int | None
) -> dict[str, Any]:
    """The content of the export's `generation_config.json`: that of the student's own file, whose
    end tokens are joined by those that end the answers it was trained on.

    The file is passed on as data. transformers would refuse to write many published ones, such as
    `temperature` beside `do_sample: false`, and drop what it does not know.

    Args:
        source: folder with the student's files; the file may be missing.
        end_of_answer: token that ends an answer in the training's sequences, if known.
    """
    path = Path(source, GENERATION_CONFIG)
    own = json.loads(path.read_text()) if path.is_file() else {}
    eos_token_id = tokenizer.eos_token_id
    assert isinstance(eos_token_id, int), "the preparation refuses a tokenizer without one"
    special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    settings = {name: id for name, id in special.items() if id is not None}
    settings |= {name: value for name, value in own.items() if name not in METADATA}
    ends = dict.fromkeys([*_ids(own.get("eos_token_id")), eos_token_id, *_ids(end_of_answer)])
    settings["eos_token_id"] = one_or_list(ends)
    return settings | {"transformers_version": transformers.__version__}


def set_end_tokens(config: PreTrainedConfig, end_tokens: int | list[int] | None) -> None:
    """Gives a model's config the end tokens of its generation config: some engines read one file,
    some the other.
    """
    vars(config.get_text_config())["eos_token_id"] = end_tokens
    if "eos_token_id" in vars(config):
        vars(config)["eos_token_id"] = end_tokens


def write_generation_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes `generation_config.json`."""
    text = json.dumps(settings, indent=2, sort_keys=True)
    (folder / GENERATION_CONFIG).write_text(text + "\n")


def one_or_list(ids: Iterable[int]) -> int | list[int] | None:
    """Token ids as these files write them: one alone, several as a list."""
    found = list(ids)
    return found if len(found) > 1 else next(iter(found), None)


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else value
