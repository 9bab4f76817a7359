"""Small tokenizers of characters, bytes and subwords, made in the test."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SPECIAL = ["<pad>", "<eos>", "<user>", "<assistant>"]
CHARACTERS = list("abcdefghijklmnopqrstuvwxyz0123456789 +-=:#.?")


def save_tokenizer(
    folder: Path,
    tokens: list[str] | None = None,
    template: str | None = CHAT_TEMPLATE,
    eos: str = "<eos>",
) -> PreTrainedTokenizerFast:
    """Writes a tokenizer with one id per character into a folder."""
    tokens = tokens or SPECIAL + CHARACTERS
    core = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<pad>")
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token=eos,
        additional_special_tokens=SPECIAL[2:],
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_byte_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Writes a tokenizer with one id per byte, whose decoded text is the text that it was given."""
    tokens = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(tokens)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[2:],
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<user>' }}{% endif %}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


WORDS = [
    "Question: What is the capital of France? Answer: Paris",
    "The answer is 42.",
    "user assistant system model think INST",
    "Paris is it, 42",
]


def byte_level(adds_space: bool = False) -> tuple[Tokenizer, list[str]]:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have it, and its first tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=adds_space)
    core.decoder = decoders.ByteLevel()
    return core, sorted(pre_tokenizers.ByteLevel.alphabet())


def metaspace(scheme: str = "first") -> tuple[Tokenizer, list[str]]:
    """BPE that puts a space before a text, as Llama 2, Mistral and Gemma have it.

    Args:
        scheme: scheme of `Metaspace`, or `normalizer` for the older form of these tokenizers.
    """
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    if scheme == "normalizer":
        begin, spaces = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
        core.normalizer = normalizers.Sequence([begin, spaces])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return core, []


def save_subwords(
    folder: Path,
    template: str | None,
    kind: Callable[[], tuple[Tokenizer, list[str]]] = byte_level,
    special: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos: str = "<|im_end|>",
    bos: str | None = None,
    adds: Sequence[str] = (),
    plain: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Writes a tokenizer of subwords into a folder and loads it.

    Args:
        special: special tokens.
        adds: of `bos` and `eos`, those that the tokenizer puts around plain text.
        plain: added tokens that are no special ones.
    """
    core, alphabet = kind()
    bytes_ = [] if alphabet else [f"<0x{i:02X}>" for i in range(256)]
    first = ["<unk>", *special, *bytes_]
    core.train_from_iterator(
        WORDS * 3,
        trainers.BpeTrainer(
            vocab_size=len(first) + len(alphabet) + 150,
            special_tokens=first,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    settings = json.loads(core.to_str())
    is_byte = set(bytes_).__contains__  # bytes are ordinary entries of a vocabulary
    settings["added_tokens"] = [t for t in settings["added_tokens"] if not is_byte(t["content"])]
    core = Tokenizer.from_str(json.dumps(settings))
    if adds:
        single = [*(["<bos>"] if bos in adds else []), "$A", *(["<end>"] if eos in adds else [])]
        names = {"<bos>": str(bos), "<end>": eos}
        core.post_processor = processors.TemplateProcessing(
            single=[names.get(part, part) for part in single],
            special_tokens=[(token, core.token_to_id(token)) for token in adds],
        )
    named = {} if bos is None else {"bos_token": bos}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=eos,
        unk_token="<unk>",
        additional_special_tokens=[token for token in special if token not in (eos, bos)],
        **named,
    )
    tokenizer.add_tokens(list(plain))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
