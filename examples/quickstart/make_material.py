"""Makes what the quick start needs: tokenizer, prompts, two teachers and the student's folder.

Each teacher is a Llama of about one million parameters, trained from nothing on its own domain
only. One command with a fixed seed makes all of it on a CPU in minutes:

    python examples/quickstart/make_material.py
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tasks import DOMAINS, Split, Task, split_domain, write_tasks
from tokenizers import Tokenizer, decoders, models
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IGNORE_INDEX = -100
MAX_LENGTH = 64
MAX_ANSWER_TOKENS = 8
PAD, EOS, UNK = "<|pad|>", "<|eos|>", "<|unk|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz +-=*/.,:;?!()<>'\"_#%&"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|eos|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Training:
    """How a teacher is trained; `batch_size` counts sequences."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float = 0.1


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the character-level tokenizer, shared by the teachers and the student."""
    tokens = [PAD, EOS, UNK, *ROLES, *CHARACTERS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNK))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=list(ROLES),
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def llama_config(
    tokenizer: PreTrainedTokenizerFast, *, hidden: int, intermediate: int, layers: int
) -> LlamaConfig:
    """Describes a small Llama; heads are 32 wide, the smallest that vLLM's CPU attention takes."""
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
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        architectures=["LlamaForCausalLM"],
    )


def teacher_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Returns the architecture of both teachers: about 1.06 million parameters."""
    return llama_config(tokenizer, hidden=128, intermediate=512, layers=4)


def student_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Returns the student's architecture: under a third of a teacher's parameters."""
    config = llama_config(tokenizer, hidden=96, intermediate=256, layers=3)
    config.dtype = "float32"
    return config


def render_prompt(tokenizer: PreTrainedTokenizerFast, task: Task) -> str:
    """Renders a task's prompt up to where the answer starts."""
    messages = [{"role": "user", "content": task.prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def encode(
    tokenizer: PreTrainedTokenizerFast, tasks: Sequence[Task]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes prompts with their answers, padded on the right.

    Returns:
        `(input_ids, labels)`, both `[tasks, tokens]`; labels are `IGNORE_INDEX`
        outside the answer and its end-of-sequence token.
    """
    rows, labels = [], []
    for task in tasks:
        prompt = tokenizer.encode(render_prompt(tokenizer, task), add_special_tokens=False)
        answer = tokenizer.encode(task.reference + EOS, add_special_tokens=False)
        rows.append(prompt + answer)
        labels.append([IGNORE_INDEX] * len(prompt) + answer)
    longest = max(map(len, rows))
    assert longest <= MAX_LENGTH
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
    padded = [row + [IGNORE_INDEX] * (longest - len(row)) for row in labels]
    return input_ids, torch.tensor(padded)


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tasks: Sequence[Task]
) -> float:
    """Returns the share of tasks whose greedy answer, with its end of sequence, is right."""
    was_training = model.training
    model.eval()
    rendered = [render_prompt(tokenizer, task) for task in tasks]
    inputs = tokenizer(
        rendered,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        return_token_type_ids=False,
    )
    generated = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_ANSWER_TOKENS)
    answers = tokenizer.batch_decode(generated[:, inputs["input_ids"].shape[1] :])
    model.train(was_training)
    right = [
        answer.startswith(task.reference + EOS) for answer, task in zip(answers, tasks, strict=True)
    ]
    return sum(right) / len(right)


def learning_rate_factor(step: int, training: Training) -> float:
    """Linear warm-up, then a cosine to zero at the last step."""
    if step < training.warmup_steps:
        return (step + 1) / training.warmup_steps
    done = (step - training.warmup_steps) / max(1, training.steps - training.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def train_teacher(
    tokenizer: PreTrainedTokenizerFast, tasks: Sequence[Task], training: Training, seed: int
) -> LlamaForCausalLM:
    """Trains one specialist from nothing on the answers to its own domain's tasks."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(teacher_config(tokenizer)).train()
    input_ids, labels = encode(tokenizer, tasks)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=training.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=training.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, training)
    )
    order = torch.empty(0, dtype=torch.long)
    started = time.monotonic()
    for step in range(1, training.steps + 1):
        if len(order) < training.batch_size:
            order = torch.cat([order, torch.randperm(len(tasks))])
        batch, order = order[: training.batch_size], order[training.batch_size :]
        loss = model(input_ids=input_ids[batch], labels=labels[batch]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0 or step == training.steps:
            seconds = time.monotonic() - started
            print(
                f"  step {step}/{training.steps} loss {loss.item():.4f} {seconds:.0f} s", flush=True
            )
    return model.eval()


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


def save_teacher(
    model: LlamaForCausalLM, folder: Path, tokenizer: PreTrainedTokenizerFast
) -> LlamaForCausalLM:
    """Saves a teacher in bfloat16 and returns it as a reader of the folder sees it, in float32."""
    model.to(torch.bfloat16).save_pretrained(folder)
    write_folder_basics(folder, model.config, tokenizer)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def make_teachers(
    output: Path,
    tokenizer: PreTrainedTokenizerFast,
    splits: dict[str, Split],
    training: Training,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Trains, saves and measures a teacher for each domain.

    Returns:
        For each teacher its parameter count, its training seconds and its exact match on each
        domain's hold-out, measured on the saved folder.
    """
    figures: dict[str, dict[str, float]] = {}
    for domain in DOMAINS:
        print(f"teacher {domain}: {len(splits[domain].pool)} prompts", flush=True)
        started = time.monotonic()
        model = train_teacher(tokenizer, splits[domain].pool, training, seed)
        seconds = time.monotonic() - started
        saved = save_teacher(model, output / "teachers" / domain, tokenizer)
        figures[domain] = {"parameters": saved.num_parameters(), "seconds": round(seconds)}
        for other in DOMAINS:
            figures[domain][other] = exact_match(saved, tokenizer, splits[other].holdout)
        print(f"teacher {domain}: {figures[domain]}")
    return figures


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make the quick start's tokenizer, prompts, teachers and student folder.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="folder to write into"
    )
    parser.add_argument("--seed", type=int, default=17, help="decides prompts and weights")
    parser.add_argument("--training-prompts", type=int, default=200, help="for each domain")
    parser.add_argument("--holdout-prompts", type=int, default=180, help="for each domain")
    parser.add_argument("--steps", type=int, default=600, help="training steps of a teacher")
    parser.add_argument("--batch-size", type=int, default=128, help="sequences in a step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the schedule")
    parser.add_argument("--warmup-steps", type=int, default=50, help="linear warm-up")
    parser.add_argument(
        "--threads", type=int, default=1, help="more change last bits, and stall on a busy machine"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    splits = {
        domain: split_domain(
            domain, arguments.seed, arguments.training_prompts, arguments.holdout_prompts
        )
        for domain in DOMAINS
    }
    training = [task for domain in DOMAINS for task in splits[domain].training]
    holdout = [task for domain in DOMAINS for task in splits[domain].holdout]
    write_tasks(training, output / "prompts.jsonl", with_references=False)
    write_tasks(holdout, output / "holdout.jsonl", with_references=True)
    write_folder_basics(output / "student", student_config(tokenizer), tokenizer)
    schedule = Training(
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        warmup_steps=arguments.warmup_steps,
    )
    figures = make_teachers(output, tokenizer, splits, schedule, arguments.seed)
    with torch.device("meta"):
        student = LlamaForCausalLM(student_config(tokenizer))
    print(json.dumps({"teachers": figures, "student_parameters": student.num_parameters()}))


if __name__ == "__main__":
    main()
