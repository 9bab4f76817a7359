"""Trains two small teachers on GSM8K-format files, so that GSM8K configs run without a download.

The rows are cut in two by the length of their answers: `concise` learns from the shorter half,
`detailed` from the longer one. Both are Llama models trained from nothing for a few minutes: good
enough to be distilled and to differ, not to solve problems. The student's folder holds its config
and the shared tokenizer, and no weights.

    python examples/gsm8k/make_teachers.py --data FOLDER --output FOLDER --seconds-per-teacher 180
"""

import argparse
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

log = logging.getLogger("gsm8k_teachers")

IGNORE_INDEX = -100
PAD, EOS = "<|pad|>", "<|eos|>"
TEACHERS = ("concise", "detailed")
MAX_LENGTH = 512
MAX_BATCH_TOKENS = 2048
WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class Row:
    """One question with its worked answer, as GSM8K has them."""

    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def response(self) -> str:
        return f" {self.answer}"

    @property
    def text(self) -> str:
        return self.prompt + self.response


def read_rows(path: Path) -> list[Row]:
    """Reads JSON lines with the fields `question` and `answer`.

    Raises:
        ValueError: A line is no JSON object with both fields; the message names file and line.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            fields = json.loads(line)
            rows.append(Row(question=fields["question"], answer=fields["answer"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: each line needs a JSON object with `question` and `answer`"
            ) from error
    return rows


def build_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer; every digit is a token of its own.

    Args:
        vocabulary_size: Most entries; a small text gives fewer.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def llama_config(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int, intermediate: int, layers: int
) -> LlamaConfig:
    """Describes a Llama with heads 32 wide, the smallest that vLLM's CPU attention takes."""
    eos_token_id, pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    assert isinstance(eos_token_id, int) and isinstance(pad_token_id, int)
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        architectures=["LlamaForCausalLM"],
    )


def teacher_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Returns the architecture of both teachers."""
    return llama_config(tokenizer, hidden=256, intermediate=704, layers=4)


def student_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Returns the student's architecture: at most a quarter of a teacher, embeddings included."""
    config = llama_config(tokenizer, hidden=96, intermediate=256, layers=3)
    config.dtype = "float32"
    return config


def halves_by_answer_length(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Cuts the rows at the median answer length, one half for each teacher."""
    ordered = sorted(rows, key=lambda row: len(row.answer))
    middle = len(ordered) // 2
    return dict(zip(TEACHERS, (ordered[:middle], ordered[middle:]), strict=True))


def encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[Row]) -> list[tuple[list[int], int]]:
    """Encodes rows to token ids and the index at which the answer starts.

    Rows longer than `MAX_LENGTH` are left out and counted in the log.
    """
    encoded = []
    for row in rows:
        prompt = tokenizer.encode(row.prompt, add_special_tokens=False)
        response = tokenizer.encode(row.response + EOS, add_special_tokens=False)
        if len(prompt) + len(response) <= MAX_LENGTH:
            encoded.append((prompt + response, len(prompt)))
    if len(encoded) < len(rows):
        log.info("%d of %d rows exceed %d tokens", len(rows) - len(encoded), len(rows), MAX_LENGTH)
    return encoded


def collate(
    sequences: Sequence[tuple[list[int], int]], pad_token_id: int, *, answers_only: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads sequences on the right.

    Returns:
        `(input_ids, labels)`, both `[sequences, tokens]`.
    """
    longest = max(len(ids) for ids, _ in sequences)
    input_ids = torch.full((len(sequences), longest), pad_token_id)
    labels = torch.full((len(sequences), longest), IGNORE_INDEX)
    for index, (ids, start) in enumerate(sequences):
        input_ids[index, : len(ids)] = torch.tensor(ids)
        first = start if answers_only else 0
        labels[index, first : len(ids)] = torch.tensor(ids[first:])
    return input_ids, labels


def batches(
    sequences: Sequence[tuple[list[int], int]], generator: torch.Generator
) -> Iterator[list[tuple[list[int], int]]]:
    """Yields batches of similar lengths for ever, each at most `MAX_BATCH_TOKENS` with padding."""
    while True:
        jitter = torch.rand(len(sequences), generator=generator).tolist()
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i][0]) + 20 * jitter[i])
        groups: list[list[tuple[list[int], int]]] = [[]]
        for index in order:
            ids, start = sequences[index]
            # Lengths may fall by the jitter, so the padded size is bounded by the longest yet.
            longest = max([len(ids), *(len(other) for other, _ in groups[-1])])
            if groups[-1] and longest * (len(groups[-1]) + 1) > MAX_BATCH_TOKENS:
                groups.append([])
            groups[-1].append((ids, start))
        for group in torch.randperm(len(groups), generator=generator).tolist():
            yield groups[group]


def train(
    model: LlamaForCausalLM,
    sequences: Sequence[tuple[list[int], int]],
    seconds: float,
    learning_rate: float,
    seed: int,
) -> int:
    """Trains on whole texts until the time is spent; the learning rate follows the clock.

    Returns:
        The number of steps taken.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    pad_token_id = model.config.pad_token_id
    assert pad_token_id is not None
    model.train()
    started = reported = time.monotonic()
    for step, group in enumerate(batches(sequences, torch.Generator().manual_seed(seed))):
        done = (time.monotonic() - started) / seconds
        if done >= 1:
            return step
        factor = min(1.0, (done + 0.002) / WARMUP_SHARE) * 0.5 * (1 + math.cos(math.pi * done))
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate * factor
        input_ids, labels = collate(group, pad_token_id, answers_only=False)
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if time.monotonic() - reported > 10:
            reported = time.monotonic()
            log.info("step %d loss %.3f, %.0f s", step, loss.item(), reported - started)
    raise AssertionError("batches never end")


@torch.no_grad()
def answer_loss(model: LlamaForCausalLM, sequences: Sequence[tuple[list[int], int]]) -> float:
    """Returns the mean negative log-likelihood of an answer token, in nats."""
    pad_token_id = model.config.pad_token_id
    assert pad_token_id is not None
    model.eval()
    total, count = 0.0, 0
    for first in range(0, len(sequences), 8):
        input_ids, labels = collate(sequences[first : first + 8], pad_token_id, answers_only=True)
        tokens = int((labels != IGNORE_INDEX).sum())
        total += model(input_ids=input_ids, labels=labels).loss.item() * tokens
        count += tokens
    return total / count


def write_folder_basics(
    folder: Path, config: LlamaConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Writes what a model folder holds beside its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train two small teachers on GSM8K-format files, and write a student's folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with train.jsonl and test.jsonl"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for teachers/ and student/"
    )
    parser.add_argument(
        "--seconds-per-teacher", type=float, default=180.0, help="training time of each"
    )
    parser.add_argument("--vocabulary-size", type=int, default=4096, help="most BPE entries")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the schedule")
    parser.add_argument("--seed", type=int, default=17, help="decides weights and order")
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="torch's threads; 1 is much the fastest on cores that others keep busy",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    train_rows = read_rows(arguments.data / "train.jsonl")
    tokenizer = build_tokenizer((row.text for row in train_rows), arguments.vocabulary_size)
    test_halves = {
        name: encode(tokenizer, rows[:100])
        for name, rows in halves_by_answer_length(read_rows(arguments.data / "test.jsonl")).items()
    }
    write_folder_basics(arguments.output / "student", student_config(tokenizer), tokenizer)
    for name, rows in halves_by_answer_length(train_rows).items():
        torch.manual_seed(arguments.seed)
        model = LlamaForCausalLM(teacher_config(tokenizer))
        steps = train(
            model,
            encode(tokenizer, rows),
            arguments.seconds_per_teacher,
            arguments.learning_rate,
            arguments.seed,
        )
        losses = {half: answer_loss(model, test) for half, test in test_halves.items()}
        folder = arguments.output / "teachers" / name
        model.bfloat16().save_pretrained(folder)
        write_folder_basics(folder, model.config, tokenizer)
        log.info(
            "%s: %d rows, %d steps, %d parameters, answer loss on the test halves: %s",
            folder,
            len(rows),
            steps,
            model.num_parameters(),
            ", ".join(f"{half} {loss:.3f}" for half, loss in losses.items()),
        )


if __name__ == "__main__":
    main()
