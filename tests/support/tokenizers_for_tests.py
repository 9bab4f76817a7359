"""Small character tokenizers, made in the test."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
