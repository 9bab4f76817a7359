"""Small character tokenizers, made in the test."""

from pathlib import Path

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
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
