"""Trainings of a tiny student on hand-made sequences and caches: specs, workers and results."""

import os
from pathlib import Path

import numpy as np
import ray
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, PreTrainedTokenizerFast

from pipeline.config.losses import CrossEntropy
from pipeline.config.run import Config
from pipeline.fingerprint import sequence_id
from pipeline.layout import Layout
from pipeline.records import SparseLogprobs, TokenSequence
from pipeline.run.training_spec import TrainingSpec
from students.progress import read_metrics

VOCABULARY, DOMAINS, TEACHERS = 64, ("sums", "words"), ("first", "second")
LONGEST = 13
STEPS = [1, 2, 3, 4, 5, 6]
TOLERANCE, WEIGHTS_TOLERANCE = 1e-4, 1e-4
"""Sums in another order, through six steps of Adam: losses were seen 3e-7 apart and weights, of a
largest size of 1, 3e-5.
"""


@ray.remote(num_cpus=0)
class Worker:
    """A process of a group that trains one student after another."""

    def __init__(self, rank, world_size, meeting_place):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=world_size
        )

    def train(self, spec, stop_before):
        """Trains, and returns the number of micro-batches of every step; raises `InterruptedError`
        in place of the step after `stop_before` steps.
        """
        import students.trainer

        original, num_micro_batches = students.trainer.train_step, []

        def train_step(engine, batch, *args):
            if engine.deepspeed.global_steps == stop_before:
                raise InterruptedError
            num_micro_batches.append(len(batch.micro_batches))
            return original(engine, batch, *args)

        students.trainer.train_step = train_step
        try:
            students.trainer.train(spec, torch.device("cpu"))
        finally:
            students.trainer.train_step = original
        return num_micro_batches


def write_student(folder, tied):
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
    )
    config.save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")),
        bos_token="w0",
        eos_token="w1",
        pad_token="w1",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    tokenizer.save_pretrained(folder)


def hand_made_sequence(generator, domain):
    """A sequence of few of the words, so that a loss falls within a handful of steps."""
    length = int(generator.integers(6, LONGEST + 1))
    input_ids = generator.integers(2, 12, length).astype(np.int32)
    middle = length // 2
    spans = ((2, middle), (middle + 1, length))
    return TokenSequence(
        sequence_id(input_ids, spans, "tokenizer"),
        input_ids,
        spans,
        f"p{generator.integers(1e9)}",
        domain,
        ("first",),
        "stop",
    )


def hand_made_row(generator, sequence, k=5):
    num_positions = sequence.num_positions
    logits = generator.normal(size=(num_positions, VOCABULARY))
    logits[np.arange(num_positions), sequence.gold_ids] += 6
    dense = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    ids = np.argsort(-dense, axis=1)[:, :k]
    kept = np.take_along_axis(dense, ids, axis=1)
    gold = dense[np.arange(num_positions), sequence.gold_ids]
    half = np.float16
    return SparseLogprobs(
        sequence.sequence_id,
        np.full(num_positions, k, np.uint8),
        ids.ravel().astype(np.uint32),
        kept.ravel().astype(half),
        np.zeros(0, np.uint8),
        gold.astype(half),
        (1 - np.exp(kept).sum(1)).astype(half),
        (-(np.exp(dense) * dense).sum(1)).astype(half),
    )


def make_spec(
    material,
    name,
    student="student",
    caches=None,
    workers=1,
    zero_stage=0,
    student_options=None,
    **training,
):
    root, dataset_digest, all_caches = material
    zero = {"stage": zero_stage, "stage3_param_persistence_threshold": 0}
    config = Config.model_validate(
        {
            "name": name,
            "seed": 3,
            "storage": {"root": str(root)},
            "prompts": {"sources": [{"path": "unused.jsonl"}]},
            "teachers": {teacher: {"model": "unused"} for teacher in [*TEACHERS, "idle"]},
            "synthesis": {"recipes": [{"type": "dataset"}]},
            "scoring": {"num_logprobs": 5, "selection": {"type": "top_k", "max_entries": 5}},
            "combine": {
                "method": "mixture",
                "weights": {
                    "type": "by_domain",
                    "domains": {"sums": {"first": 1.0}, "words": {"first": 0.25, "second": 0.75}},
                },
            },
            "student": {
                "model": str(root / "student"),
                "initialization": "random",
                **(student_options or {}),
            },
            "training": {
                "losses": [
                    {"type": "forward_kl", "weight": 1.0},
                    {"type": "cross_entropy", "weight": 0.5},
                ],
                "steps": 6,
                "sequences_per_step": 8,
                "tokens_per_micro_batch": 40,
                "learning_rate": 0.02,
                "warmup_steps": 2,
                "log_every_steps": 1,
                "evaluate_every_steps": 3,
                "checkpoint_every_steps": 2,
                "max_failures": 0,
                "loader_processes": 0,
                "weight_decay": 0.1,
                "workers": workers,
                "deepspeed": {"zero_optimization": zero} if zero_stage else {},
                **training,
            },
            "evaluation": {"sampling": {}},
        }
    )
    losses = (
        config.training.losses
        if student == "student"
        else [CrossEntropy(type="cross_entropy", weight=1.0)]
    )
    fingerprints = dict.fromkeys(TEACHERS, "0" * 32)
    return TrainingSpec(
        config,
        Layout(str(root), name),
        dataset_digest,
        student,
        tuple(losses),
        all_caches if caches is None else caches,
        fingerprints,
    )


def curve(spec, name="train/loss"):
    return {line["step"]: line[name] for line in read_metrics(spec.metrics_path) if name in line}


def final_weights(spec):
    return load_file(Path(spec.folder, "final", "weights.safetensors"))


def steps_of(spec):
    return [line["step"] for line in read_metrics(spec.metrics_path)]
