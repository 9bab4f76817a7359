"""Model folders whose small files are broken, and some that are odd and sound."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.config.base import ModelFiles
from teachers.preflight.models import check_model
from teachers.preflight.vocabulary import end_token_ids
from tests.support.hostile import Case, check_answer
from tests.support.model_folders import (
    LFS_POINTER,
    SOUND,
    Change,
    all_of,
    copy_of_sound,
    file,
    json_file,
    replaced,
    setting,
    without,
)

pytestmark = pytest.mark.timeout(30)

TEXT = (SOUND / "config.json").read_text()
TOKENIZER = json.loads((SOUND / "tokenizer.json").read_text())
VOCABULARY = TOKENIZER["model"]["vocab"]
ADDED = TOKENIZER["added_tokens"]
LFS = ("is a pointer of git-LFS", "run `git lfs pull` in ")
POINTER_OF_ANNEX = "/annex/objects/SHA256E-s712--4d7a214614ab.json\n"
PAGE = "<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


def config(**values: Any) -> Change:
    return setting("config.json", **values)


def tokenizer(**values: Any) -> Change:
    return json_file("tokenizer.json", TOKENIZER | values)


def vocabulary(**values: Any) -> Change:
    return tokenizer(model=TOKENIZER["model"] | {"vocab": VOCABULARY | values})


def options(**values: Any) -> Change:
    return setting("tokenizer_config.json", **values)


def template(value: Any) -> Change:
    return all_of(without("chat_template.jinja"), options(chat_template=value))


def ends(value: Any) -> Change:
    return setting("generation_config.json", eos_token_id=value)


def in_place_of(name: str, make: Any) -> Change:
    """Puts something else where a file is."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


SOUND_ONES = [
    Case("as it was written", lambda folder: None),
    Case("a key twice with one value", replaced("config.json", "64", '64,\n"vocab_size": 64')),
    Case("a config with unknown keys", config(whatever=[1], _name_or_path="/home/someone")),
    Case("a config without architectures", without("config.json", "architectures")),
    Case("code that is not needed", config(auto_map={"AutoConfig": "evil.Config"})),
    Case("a number of JSON that is infinite", config(time_step_limit=[0.0, float("inf")])),
    Case("no generation config", without("generation_config.json")),
    Case("an empty generation config", json_file("generation_config.json", {})),
    Case("no end in the generation config", ends(None)),
    Case("an empty list of ends", ends([])),
    Case("no tokenizer config", without("tokenizer_config.json")),
    Case("an unknown class of tokenizers", options(tokenizer_class="Nope")),
    Case("a folder with folders", lambda folder: (folder / "onnx.json").mkdir()),
    Case(
        "files as links out of the folder, as the hub's cache has them",
        lambda folder: [
            (path.rename(folder.parent / path.name), path.symlink_to(f"../{path.name}"))
            for path in sorted(folder.iterdir())
        ],
    ),
]
CONFIGS = [
    Case("gone", without("config.json"), ("not a model folder", "no config.json")),
    Case(
        "an adapter's",
        all_of(without("config.json"), json_file("adapter_config.json", {"peft_type": "LORA"})),
        ("no config.json", "merge the adapter into its base model"),
    ),
    Case("empty", file("config.json", ""), ("config.json is not valid JSON: the file is empty",)),
    Case("cut", file("config.json", TEXT[:200]), ("config.json is not valid JSON", "line 11")),
    Case("a list", json_file("config.json", [1]), ("config.json holds an array",)),
    Case("null", json_file("config.json", None), ("config.json holds null",)),
    Case("a string", json_file("config.json", "x"), ("config.json holds a string",)),
    Case("a number", json_file("config.json", 5), ("config.json holds a number",)),
    Case("no type of model", json_file("config.json", {}), ("config.json", "model_type")),
    Case("invalid UTF-8", file("config.json", b'{"a": "\xff"}'), ("config.json is not UTF-8",)),
    Case("UTF-16", file("config.json", TEXT.encode("utf-16")), ("config.json is not UTF-8",)),
    Case("a mark of bytes", file("config.json", f"\ufeff{TEXT}"), ("config.json", "UTF-8 BOM")),
    Case("lists in lists", file("config.json", "[" * 10**5), ("config.json is nested too deep",)),
    Case(
        "objects in objects",
        file("config.json", '{"a":' * 50000 + "1" + "}" * 50000),
        ("config.json is nested too deep",),
    ),
    Case(
        "a key with two values",
        replaced("config.json", '"vocab_size": 64', '"vocab_size": 64, "vocab_size": 128'),
        ("config.json gives the key 'vocab_size' two values",),
    ),
    Case(
        "a key with two values further in",
        replaced("config.json", '"rope_theta"', '"rope_type": "linear", "rope_theta"'),
        ("config.json gives the key 'rope_type' two values",),
    ),
    Case(
        "5000 digits",
        replaced("config.json", '"vocab_size": 64', f'"vocab_size": {"6" * 5000}'),
        ("config.json is not valid JSON", "5000 digits"),
    ),
    Case("a pointer of git-LFS", file("config.json", LFS_POINTER), ("config.json", *LFS)),
    Case("a pointer of git-annex", file("config.json", POINTER_OF_ANNEX), ("`git annex get .`",)),
    Case("a page of HTML", file("config.json", PAGE), ("config.json is a page of HTML",)),
    Case("an unknown type of model", config(model_type="nope"), ("config.json", "`nope`")),
    Case("a type that is a list", config(model_type=["llama"]), ("config.json", "TypeError")),
    Case("a model of images", json_file("config.json", {"model_type": "vit"}), ("no vocab_size",)),
    Case("a text as vocabulary", config(vocab_size="x"), ("config.json", "'vocab_size'", "'x'")),
    Case("a fraction as vocabulary", config(vocab_size=64.0), ("'vocab_size'", "64.0")),
    Case("a truth value as vocabulary", config(vocab_size=True), ("'vocab_size'", "True")),
    Case("a list as vocabulary", config(vocab_size=[64]), ("'vocab_size'", "[64]")),
    Case("no number as vocabulary", config(vocab_size=float("nan")), ("'vocab_size'", "nan")),
    Case("a negative vocabulary", config(vocab_size=-1), ("vocab_size '-1'",)),
    Case("no vocabulary", config(vocab_size=0), ("vocab_size '0'",)),
    Case("10^12 tokens", config(vocab_size=10**12), ("vocab_size '1000000000000'", "16777216")),
    Case("no hidden size", config(hidden_size=None), ("config.json", "'hidden_size'", "None")),
    Case("10^9 as hidden size", config(hidden_size=10**9), ("hidden_size '1000000000'",)),
    Case("10^9 layers", config(num_hidden_layers=10**9), ("num_hidden_layers '1000000000'",)),
    Case("no layers", config(num_hidden_layers=0), ("num_hidden_layers '0'",)),
    Case("no heads", config(num_attention_heads=0), ("config.json", "ZeroDivisionError")),
    Case("10^12 as width", config(intermediate_size=10**12), ("intermediate_size",)),
    Case("a list of rotary settings", config(rope_parameters=[1]), ("'rope_parameters'", "[1]")),
    Case("an unknown dtype", config(dtype="float99"), ("config.json", "float99")),
    Case("a list of quantisation", config(quantization_config=[1]), ("config.json", "'list'")),
    Case("a list of labels", config(id2label=[1]), ("config.json", "'list'")),
    Case("a text as architectures", config(architectures="Llama"), ("architectures 'Llama'",)),
    Case("numbers as architectures", config(architectures=[1]), ("architectures",)),
    Case("a text as text part", config(model_type="llava", text_config="x"), ("'text_config'",)),
]
TOKENIZERS = [
    Case("gone", without("tokenizer.json"), ("cannot use the tokenizer.json of ",)),
    Case("empty", file("tokenizer.json", ""), ("tokenizer.json is not valid JSON", "is empty")),
    Case("cut", file("tokenizer.json", json.dumps(TOKENIZER)[:-9]), ("is not valid JSON",)),
    Case(
        "a pointer of git-LFS", file("tokenizer.json", LFS_POINTER), ("tokenizer.json is a", *LFS)
    ),
    Case("a list", json_file("tokenizer.json", []), ("tokenizer.json holds an array",)),
    Case("an empty object", json_file("tokenizer.json", {}), ("tokenizer.json", "no `model`")),
    Case("nested", file("tokenizer.json", "[" * 10**5), ("tokenizer.json is nested too deep",)),
    Case("no model", tokenizer(model=None), ("tokenizer.json", "no `model`")),
    Case("a text as model", tokenizer(model="x"), ("tokenizer.json", "no `model`")),
    Case("an unknown model", tokenizer(model={"type": "x"}), ("tokenizer.json", "ModelUntagged")),
    Case("another version", tokenizer(version="9"), ("Unknown tokenizer version '9'",)),
    Case(
        "a list as vocabulary",
        tokenizer(model=TOKENIZER["model"] | {"vocab": [1]}),
        ("tokenizer.json", "expected a map"),
    ),
    Case(
        "an empty vocabulary",
        tokenizer(model=TOKENIZER["model"] | {"vocab": {}}, added_tokens=[]),
        ("tokenizer.json", "not found in the vocabulary"),
    ),
    Case("a text as id", vocabulary(zz="x"), ("tokenizer.json", "'zz' has the id 'x'")),
    Case("a negative id", vocabulary(zz=-1), ("'zz' has the id '-1'",)),
    Case("the id 2^31", vocabulary(zz=2**31), ("'zz' has the id '2147483648'", "16777215")),
    Case("the id 2^70", vocabulary(zz=2**70), ("'zz' has the id",)),
    Case("added tokens as object", tokenizer(added_tokens={}), ("no `model` with its `added_t",)),
    Case("added tokens as texts", tokenizer(added_tokens=["x"]), ("added token 'x' has no id",)),
    Case("an added token without id", tokenizer(added_tokens=[{"content": "x"}]), ("no id",)),
    Case(
        "an added token with the id of another",
        tokenizer(added_tokens=[*ADDED, ADDED[0] | {"content": "<new>", "id": 9}]),
        ("tokenizer.json adds the token '<new>' with the id 9, and it gets 64",),
    ),
    Case(
        "an added token far behind the others",
        tokenizer(added_tokens=[*ADDED, ADDED[0] | {"content": "<new>", "id": 10**6}]),
        ("'<new>' with the id 1000000, and it gets 64",),
    ),
    Case("an unknown normalizer", tokenizer(normalizer={"type": "x"}), ("NormalizerUntagged",)),
    Case("a list as processor", tokenizer(post_processor=[]), ("PostProcessorWrapper",)),
    Case("a number as decoder", tokenizer(decoder=5), ("tokenizer.json", "Decoder")),
    Case("a text as truncation", tokenizer(truncation="x"), ("TruncationParams",)),
    Case(
        "a broken pattern",
        tokenizer(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(("},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        ("tokenizer.json", "unmatched parenthesis"),
    ),
    Case(
        "a processor that names no token",
        tokenizer(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        ("tokenizer.json", "no entry found for key"),
    ),
]
OPTIONS = [
    Case("a list", json_file("tokenizer_config.json", []), ("tokenizer_config.json holds an ar",)),
    Case("git-LFS", file("tokenizer_config.json", LFS_POINTER), ("tokenizer_config.json is", *LFS)),
    Case("a number as end", options(eos_token=5), ("eos_token", "int")),
    Case("a list as end", options(eos_token=["a"]), ("eos_token", "list")),
    Case("an object as end", options(eos_token={"content": 5}), ("eos_token", "dict")),
    Case("a number as class", options(tokenizer_class=5), ("AttributeError",)),
    Case("a text as length", options(model_max_length="x"), ("TypeError",)),
    Case("a number of tokens", options(extra_special_tokens=5), ("extra_special_tokens",)),
    Case("numbers as tokens", options(extra_special_tokens=[1]), ("tokenizer.json", "TypeError")),
    Case("a list of added tokens", options(added_tokens_decoder=[1]), ("added_tokens_decoder",)),
    Case("a name as id", options(added_tokens_decoder={"x": {"content": "a"}}), ("the id 'x'",)),
    Case("a text as token", options(added_tokens_decoder={"1": "a"}), ("added_tokens_decoder",)),
    Case(
        "its own code",
        options(tokenizer_class="B", auto_map={"AutoTokenizer": ["a.B", None]}),
        ("custom code",),
    ),
    Case("a number as template", template(5), ("tokenizer.json", "its chat template is no text")),
    Case("a list of numbers as template", template([1]), ("tokenizer.json", "TypeError")),
    Case("a template without text", template([{"name": "a"}]), ("KeyError: 'template'",)),
    Case(
        "special tokens as list", json_file("special_tokens_map.json", []), ("map.json holds an",)
    ),
    Case("special tokens cut", file("special_tokens_map.json", "{"), ("map.json is not valid",)),
    Case(
        "a special number", json_file("special_tokens_map.json", {"eos_token": 5}), ("eos_token",)
    ),
    Case("added tokens as list", json_file("added_tokens.json", []), ("added_tokens.json holds",)),
    Case("an id that is text", json_file("added_tokens.json", {"a": "x"}), ("the id 'x'",)),
    Case(
        "a vocabulary that is a list", json_file("vocab.json", []), ("vocab.json holds an array",)
    ),
    Case(
        "a template that is binary", file("chat_template.jinja", b"\xff"), ("jinja is not UTF-8",)
    ),
    Case("a template of git-LFS", file("chat_template.jinja", LFS_POINTER), ("jinja is a", *LFS)),
    Case(
        "a vocabulary of git-LFS", file("tokenizer.model", LFS_POINTER), ("tokenizer.model", *LFS)
    ),
]
ENDS = [
    Case("cut", file("generation_config.json", "{"), ("generation_config.json is not valid",)),
    Case("a list", json_file("generation_config.json", []), ("generation_config.json holds an",)),
    Case("git-LFS", file("generation_config.json", LFS_POINTER), ("generation_config.json", *LFS)),
    Case("a text", ends("x"), ("generation_config.json: eos_token_id 'x' is no id",)),
    Case("a token's text", ends("<|eos|>"), ("eos_token_id '<|eos|>' is no id",)),
    Case("behind the vocabulary", ends(64), ("eos_token_id '64' is no id of the model's 64",)),
    Case("negative", ends(-1), ("eos_token_id '-1' is no id",)),
    Case("a fraction", ends(1.0), ("eos_token_id '1.0' is no id",)),
    Case("a truth value", ends(True), ("eos_token_id 'True' is no id",)),
    Case("a list with a text", ends([1, "x"]), ("eos_token_id 'x' is no id",)),
    Case("a list in a list", ends([[1]]), ("eos_token_id '[1]' is no id",)),
    Case("an object", ends({"id": 1}), ("eos_token_id",)),
]
PLACES = [
    Case("a config that is a folder", in_place_of("config.json", Path.mkdir), ("is a folder",)),
    Case("a config that is a pipe", in_place_of("config.json", os.mkfifo), ("is a pipe",)),
    Case(
        "a config from a device",
        in_place_of("config.json", lambda p: p.symlink_to("/dev/zero")),
        ("is a pipe, a socket or a device",),
    ),
    Case("a tokenizer that is a pipe", in_place_of("tokenizer.json", os.mkfifo), ("is a pipe",)),
    Case("weights that are a pipe", in_place_of("model.safetensors", os.mkfifo), ("is a pipe",)),
    Case("weights that are a folder", in_place_of("model.safetensors", Path.mkdir), ("a folder",)),
    Case(
        "a template that is a folder", in_place_of("chat_template.jinja", Path.mkdir), ("folder",)
    ),
    Case("ends that are a pipe", in_place_of("generation_config.json", os.mkfifo), ("is a pipe",)),
    Case(
        "a link to nothing",
        in_place_of("config.json", lambda path: path.symlink_to("../../blobs/gone")),
        ("config.json is a link to a file that does not exist",),
    ),
    Case(
        "a link to itself",
        in_place_of("tokenizer.json", lambda path: path.symlink_to(path.name)),
        ("tokenizer.json is a link",),
    ),
    Case(
        "weights that are a link to nothing",
        in_place_of("model.safetensors", lambda path: path.symlink_to("../../blobs/gone")),
        ("model.safetensors is a link to a file that does not exist",),
    ),
]


def check(folder: Path) -> list[int]:
    """Ends of answers of the model in a folder, if all else about it is right."""
    files = ModelFiles(str(folder))
    check_model(files, loads_weights=True)
    return end_token_ids(files)


@pytest.mark.parametrize(
    "case", [*CONFIGS, *TOKENIZERS, *OPTIONS, *ENDS, *PLACES, *SOUND_ONES], ids=str
)
def test_a_model_folder_is_answered(case: Case, tmp_path: Path) -> None:
    folder = copy_of_sound(tmp_path / "model")
    case.given(folder)
    found = check_answer(case, lambda: check(folder))
    assert case.refusal or found == [1]


def test_ends_of_the_generation_config_count(tmp_path: Path) -> None:
    folder = copy_of_sound(tmp_path / "model")
    ends([1, 7])(folder)
    assert check(folder) == [1, 7]
