"""Makes the two random teachers, the student's folder and the prompts of the old run."""

import json
import shutil
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE, QUICKSTART = Path(__file__).resolve().parent, Path(sys.argv[1])
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def llama(hidden: int, **others: object) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=64,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        dtype="float32",
        **others,
    )


for seed, name in enumerate(("first", "second")):
    torch.manual_seed(seed)
    LlamaForCausalLM(llama(8, max_position_embeddings=1024)).save_pretrained(HERE / name)
llama(8, max_position_embeddings=64).save_pretrained(HERE / "student")
for name in ("first", "second", "student"):
    for file in TOKENIZER:
        shutil.copy(QUICKSTART / "student" / file, HERE / name / file)
rows = [json.loads(line) for line in (QUICKSTART / "prompts.jsonl").read_text().splitlines()]
by_domain = {
    domain: [row for row in rows if row["domain"] == domain] for domain in ("arithmetic", "words")
}
start = 0
for split, count in (("train", 5), ("validation", 2), ("holdout", 2)):
    chosen = [row for group in by_domain.values() for row in group[start : start + count]]
    text = "".join(json.dumps(row) + "\n" for row in chosen)
    (HERE / f"{split}.jsonl").write_text(text)
    start += count
