"""Makes the second teacher and the student of this example from SmolLM2-135M-Instruct.

`mathematician` is the same model, fine-tuned on answers of GSM8K. `student` has some of its layers,
evenly chosen, and its embeddings, which output and input share. Run fetch.py first. A folder that
is there is left alone; one appears only when it is complete.

    .venv/bin/python examples/smollm2/make_models.py
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from fetch import MODELS, NAME, FetchError, exclusive, replaced_when_complete, say, told
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import disable_progress_bar

PROMPTS = Path(__file__).resolve().parent / "prompts"
STUDENT_LAYERS = 24
TUNING_EXAMPLES = 160
IGNORE_INDEX = -100
SECONDS_BETWEEN_LINES = 10


@dataclass(frozen=True)
class Example:
    """One question with its answer: all token ids, and the index at which the answer starts."""

    ids: list[int]
    start: int


def even_layers(count: int, kept: int) -> list[int]:
    """Indices of `kept` of `count` layers at even distances, the first and the last among them."""
    return [round(index * (count - 1) / (kept - 1)) for index in range(kept)]


def load(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A model's folder in the given dtype; whatever it computes in float32 stays float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def save(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Saves a model beside tokenizer, licence and notice of the model that it was made from."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    for name in ("LICENSE", "NOTICE"):
        shutil.copy(source / name, folder)


def make_student(source: Path, folder: Path) -> None:
    """Writes a model of `STUDENT_LAYERS` layers of another, each weight the same bit for bit."""
    model = load(source, torch.bfloat16)
    layers = model.model.layers
    chosen = even_layers(len(layers), STUDENT_LAYERS)
    model.model.layers = torch.nn.ModuleList([layers[index] for index in chosen])
    model.config.num_hidden_layers = len(chosen)
    save(model, source, folder)
    millions = model.num_parameters() / 1e6
    say(f"student: layers {', '.join(map(str, chosen))}; {millions:.0f} M parameters")


def examples(tokenizer: Tokenizer, path: Path) -> list[Example]:
    """Reads prompts with references as chats; GSM8K's `<<2+3=5>>` are left out of the answers."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer = re.sub(r"<<.*?>>", "", row["reference"])
        chat = [*row["messages"], {"role": "assistant", "content": answer}]
        prompt = tokenizer.apply_chat_template(
            row["messages"], tokenize=False, add_generation_prompt=True
        )
        text = tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n")
        assert isinstance(prompt, str) and text.startswith(prompt)
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        found.append(Example(tokenizer(text, add_special_tokens=False)["input_ids"], start))
    return found


def collate(batch: Sequence[Example]) -> dict[str, torch.Tensor]:
    """Pads on the right; `labels` are `IGNORE_INDEX` outside of the answers.

    Returns:
        `input_ids`, `attention_mask` and `labels`, all `[examples, tokens]`.
    """
    longest = max(len(each.ids) for each in batch)
    input_ids = torch.zeros((len(batch), longest), dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    mask = torch.zeros_like(input_ids)
    for row, each in enumerate(batch):
        ids = torch.tensor(each.ids)
        input_ids[row, : len(ids)] = ids
        labels[row, each.start : len(ids)] = ids[each.start :]
        mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def batches(found: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Yields all examples once, in batches of like lengths whose order the seed decides."""
    ordered = sorted(found, key=lambda each: len(each.ids))
    groups = [ordered[first : first + size] for first in range(0, len(ordered), size)]
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    for group in order.tolist():
        yield groups[group]


@torch.no_grad()
def answer_loss(model: PreTrainedModel, found: Sequence[Example]) -> float:
    """Mean of the loss over batches of eight examples, in nats per token of the answers."""
    batches = [collate(found[first : first + 8]) for first in range(0, len(found), 8)]
    losses = [model(**batch).loss.float() for batch in batches]
    return float(torch.stack(losses).mean())


def make_mathematician(source: Path, folder: Path, learning_rate: float, seed: int) -> None:
    """Fine-tunes the model for one pass over the answers to GSM8K's training questions.

    The model computes in bfloat16; AdamW steps on float32 copies of its weights, since most steps
    are smaller than bfloat16 resolves. The learning rate falls linearly to zero.
    """
    model, tokenizer = load(source, torch.bfloat16), AutoTokenizer.from_pretrained(source)
    train = examples(tokenizer, PROMPTS / "gsm8k_train.jsonl")[:TUNING_EXAMPLES]
    holdout = examples(tokenizer, PROMPTS / "gsm8k_holdout.jsonl")
    before = answer_loss(model, holdout)
    weights = list(model.parameters())
    copies = [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(copies, lr=learning_rate, weight_decay=0.0)
    groups = list(batches(train, size=8, seed=seed))
    spoken = time.monotonic()
    for step, batch in enumerate(groups):
        loss = model(**collate(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for weight, copy in zip(weights, copies, strict=True):
            assert weight.grad is not None
            copy.grad, weight.grad = weight.grad.float(), None
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate * (1 - step / len(groups))
        optimizer.step()
        with torch.no_grad():
            for weight, copy in zip(weights, copies, strict=True):
                weight.copy_(copy)
        if time.monotonic() - spoken > SECONDS_BETWEEN_LINES or step + 1 == len(groups):
            spoken = time.monotonic()
            say(f"fine-tuning: step {step + 1}/{len(groups)}, loss {loss.item():.2f}")
    after = answer_loss(model, holdout)
    save(model, source, folder)
    say(f"mathematician: hold-out answers of GSM8K {before:.2f} -> {after:.2f} nats per token")


def make_models(models: Path, learning_rate: float, seed: int) -> None:
    """Makes whatever is missing of both folders.

    Raises:
        FetchError: The real model is not there, or a folder cannot be written.
    """
    source = models / NAME
    if not source.exists():
        raise FetchError(f"{source} is not there; run examples/smollm2/fetch.py first")
    with exclusive(models):
        if not (models / "student").exists():
            with replaced_when_complete(models / "student") as half_made:
                make_student(source, half_made)
        if not (models / "mathematician").exists():
            say("fine-tuning the teacher of mathematics: one to two minutes on two cores")
            with replaced_when_complete(models / "mathematician") as half_made:
                make_mathematician(source, half_made, learning_rate, seed)


def main() -> None:
    """Makes the models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", type=Path, default=MODELS, help="folder to make them in")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="its peak, at the start")
    parser.add_argument("--seed", type=int, default=17, help="decides the order of the batches")
    arguments = parser.parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed warns that it found no other
    disable_progress_bar()
    with told():
        make_models(arguments.models, arguments.learning_rate, arguments.seed)


if __name__ == "__main__":
    main()
