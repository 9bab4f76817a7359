"""Tokens per second of capture, from the bare engine to the whole score stage.

    python benchmarks/capture.py DATA [--quick] [--json PATH] [--model FOLDER]

One engine scores the same sequences of DATA's `train.jsonl` (GSM8K's `question` and `answer`) in
alternating rounds. Without `--model` it is a small Llama of random weights and 4,096 tokens, made
here with a tokenizer of its own: only time is measured. On a CPU the engine's own softmax and top-k
grow with the vocabulary and hide what lies behind them; on a GPU measure a real teacher.

Ways of capture: `bare` asks for no log-probabilities; `dicts` is what vLLM returns by default;
`flat` and `arrays` are the two ways of `teachers/engine/vllm_teacher.py`, to checked numpy rows;
`stage` is the score stage's work with selection, encoding and Parquet. `siblings` is the stage on
prompts with eight answers each, `siblings shared` the same with prefix sharing; the answers of
`alike` and `alike shared` have their first 64 tokens in common as well.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import print_table, write_json
from pipeline.cache.logprobs import position_bytes
from pipeline.cache.shard import read_shard
from pipeline.config.base import Resources
from pipeline.config.scoring import TopP
from pipeline.fingerprint import digest_json
from pipeline.layout import CacheLayout, Layout
from pipeline.records import SparseLogprobs, TokenSequence
from pipeline.sequences import write_sequences
from teachers.pool.actor import engine_env_vars
from teachers.pool.dispatch import TASKS_IN_FLIGHT
from teachers.protocol import EngineSpec, ScoringRequest
from teachers.tasks.score import CacheOutput, ScoredShard, ScoreTask

if TYPE_CHECKING:
    from teachers.engine.vllm_teacher import VllmTeacher

WIDTHS = (20, 64, 256)
ANSWERS = 8
SIBLINGS_WIDTH = 64
COMMON = 64  # tokens with which answers begin that are alike
EXAMPLES = 4  # worked examples before a question that gets several answers
NUM_SHARDS = 4
TURN_SECONDS = 3.0  # a way is repeated for so long in every round
MASS, MAX_ENTRIES = 0.99, 64


Way = Callable[[int], Awaitable[list[ScoredShard] | None]]


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured."""

    num_sequences: int
    num_prompts: int
    rounds: int
    widths: tuple[int, ...]


FULL = Size(num_sequences=128, num_prompts=8, rounds=5, widths=WIDTHS)
QUICK = Size(num_sequences=32, num_prompts=2, rounds=1, widths=(64,))


@dataclasses.dataclass
class Bench:
    """One engine and what it scores."""

    teacher: VllmTeacher
    folder: Path
    alone: list[TokenSequence]
    siblings: list[TokenSequence]
    alike: list[TokenSequence]
    written: dict[str, list[tuple[str, tuple[str, ...]]]] = dataclasses.field(default_factory=dict)

    async def bare(self, width: int) -> None:
        """The forward pass alone."""
        del width
        await self._generate(detokenize=False)

    async def dicts(self, width: int) -> None:
        """vLLM's dictionaries, each entry with its text, not yet turned into numbers."""
        await self._generate(prompt_logprobs=width)

    async def flat(self, width: int) -> None:
        """vLLM's `flat_logprobs`, as numpy rows."""
        chosen, self.teacher.capture.mode = self.teacher.capture.mode, "flat"
        await self.arrays(width)
        self.teacher.capture.mode = chosen

    async def arrays(self, width: int) -> None:
        """The engine's own arrays, as numpy rows."""
        self._set(width, share_prefixes=False)
        await asyncio.gather(
            *(
                self.teacher.score(ScoringRequest(s.input_ids.tolist(), s.loss_spans[0][0]))
                for s in self.alone
            )
        )

    async def stage(self, width: int) -> list[ScoredShard]:
        """Arrays, selection, encoding and Parquet."""
        return await self._score(self.alone, width, share_prefixes=False)

    async def apart(self, sequences: list[TokenSequence], width: int) -> list[ScoredShard]:
        """The stage on eight answers a prompt."""
        return await self._score(sequences, width, share_prefixes=False)

    async def shared(self, sequences: list[TokenSequence], width: int) -> list[ScoredShard]:
        """The same; a prompt is computed once."""
        await self.teacher.engine.llm.reset_prefix_cache()
        return await self._score(sequences, width, share_prefixes=True)

    def gold_difference(self, shards: list[ScoredShard], others: list[ScoredShard]) -> float:
        """Mean difference, in nats, of the gold tokens' log-probabilities with prefix sharing from
        those without, at `SIBLINGS_WIDTH`.
        """
        differences = []
        for shared, apart in zip(shards, others, strict=True):
            rows = zip(self._rows(shared, True), self._rows(apart, False), strict=True)
            differences += [
                np.abs(a.gold_logprobs.astype(np.float64) - b.gold_logprobs.astype(np.float64))
                for a, b in rows
            ]
        return float(np.concatenate(differences).mean())

    def _rows(self, shard: ScoredShard, share_prefixes: bool) -> list[SparseLogprobs]:
        cache, _ = self._cache(SIBLINGS_WIDTH, share_prefixes)
        return read_shard(cache.shard(shard.entries["teacher"].digest))

    def _shards(self, sequences: list[TokenSequence]) -> list[tuple[str, tuple[str, ...]]]:
        """The files of the sequences, with their ids; written when they are first asked for."""
        key = sequences[0].sequence_id
        if key not in self.written:
            layout, size = Layout(str(self.folder), "benchmark"), -(-len(sequences) // NUM_SHARDS)
            groups = [sequences[i : i + size] for i in range(0, len(sequences), size)]
            self.written[key] = [
                (
                    f"{layout.root}/{write_sequences(layout, 'gsm8k', group)}",
                    tuple(each.sequence_id for each in group),
                )
                for group in groups
            ]
        return self.written[key]

    def _cache(self, width: int, share_prefixes: bool) -> tuple[CacheLayout, str]:
        fingerprint = digest_json([width, share_prefixes])
        return Layout(str(self.folder), "benchmark").cache("teacher", fingerprint), fingerprint

    def _set(self, width: int, share_prefixes: bool) -> None:
        capture = self.teacher.capture
        capture.width, capture.shares_prefixes = width, share_prefixes

    async def _generate(self, **parameters: Any) -> None:
        from vllm import SamplingParams

        fixed = SamplingParams(
            max_tokens=1, temperature=0, skip_reading_prefix_cache=True, **parameters
        )
        finish = self.teacher.engine.finish
        await asyncio.gather(*(finish(s.input_ids.tolist(), fixed) for s in self.alone))

    async def _score(
        self, sequences: list[TokenSequence], width: int, share_prefixes: bool
    ) -> list[ScoredShard]:
        """As a pool does: several shards, some of them in flight at once."""
        self._set(width, share_prefixes)
        selection = TopP(type="top_p", mass=MASS, max_entries=min(width, MAX_ENTRIES))
        cache, fingerprint = self._cache(width, share_prefixes)
        size = position_bytes(selection.max_entries)
        output = CacheOutput("teacher", cache, fingerprint, selection, size)
        tasks = [ScoreTask(uri, ids, (output,)) for uri, ids in self._shards(sequences)]
        slots = asyncio.Semaphore(TASKS_IN_FLIGHT)

        async def run(task: ScoreTask) -> ScoredShard:
            async with slots:
                return await task.run(self.teacher)

        return list(await asyncio.gather(*(run(task) for task in tasks)))


async def measure(bench: Bench, size: Size) -> list[dict[str, Any]]:
    """Rounds in which every way has its turn, each round in another order."""
    ways: list[tuple[str, int | None, Way, Sequence[TokenSequence]]]
    ways = [("bare", None, bench.bare, bench.alone)]
    for width in size.widths:
        for name in ("dicts", "flat", "arrays", "stage"):
            ways.append((name, width, getattr(bench, name), bench.alone))
    for name, sequences in (("siblings", bench.siblings), ("alike", bench.alike)):
        ways.append((name, SIBLINGS_WIDTH, partial(bench.apart, sequences), sequences))
        ways.append((f"{name} shared", SIBLINGS_WIDTH, partial(bench.shared, sequences), sequences))
    rates: list[list[float]] = [[] for _ in ways]
    shards: list[list[ScoredShard]] = [[] for _ in ways]
    for turn in range(size.rounds):
        order = list(range(len(ways)))
        random.Random(turn).shuffle(order)
        for i in order:
            _, width, way, sequences = ways[i]
            started, turns = time.perf_counter(), 0
            while (seconds := time.perf_counter() - started) < TURN_SECONDS:
                shards[i] = await way(width or 0) or []
                turns += 1
            rates[i].append(turns * sum(len(each.input_ids) for each in sequences) / seconds)
        print(f"round {turn + 1} of {size.rounds}", flush=True)
    written = {name: found for (name, *_), found in zip(ways, shards, strict=True)}
    return [
        {
            "way": name,
            "k": width,
            "sequences": len(sequences),
            "tokens": sum(len(each.input_ids) for each in sequences),
            "answer_tokens": sum(each.num_positions for each in sequences),
            "cached_tokens": sum(shard.num_cached_tokens for shard in last),
            "rescored": sum(shard.num_rescored for shard in last),
            "gold_difference_nats": (
                bench.gold_difference(last, written[name.removesuffix(" shared")])
                if name.endswith(" shared")
                else None
            ),
            "tokens_per_second": statistics.median(found),
            "lowest": min(found),
            "highest": max(found),
        }
        for (name, width, _, sequences), found, last in zip(ways, rates, shards, strict=True)
    ]


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The promised ratios, of medians."""
    rate = {(row["way"], row["k"]): row["tokens_per_second"] for row in rows}
    return {
        "arrays_over_dicts_k64": rate["arrays", 64] / rate["dicts", 64],
        "stage_over_arrays_k64": rate["stage", 64] / rate["arrays", 64],
        "prefix_sharing_8": rate["siblings shared", 64] / rate["siblings", 64],
        "prefix_sharing_8_alike": rate["alike shared", 64] / rate["alike", 64],
        "arrays_over_bare_k64": rate["arrays", 64] / rate["bare", None],
        "stage_over_bare_k64": rate["stage", 64] / rate["bare", None],
    }


def make_model(folder: Path, texts: Sequence[str], vocabulary: int) -> None:
    """A random Llama, small enough that the forward pass does not hide what is measured."""
    core = ByteLevelBPETokenizer()
    core.train_from_iterator(
        texts, vocab_size=vocabulary, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.2,  # peaked distributions, as those of a trained model
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def sequences_of(
    rows: list[dict[str, str]], tokenizer: Any, size: Size
) -> tuple[list[TokenSequence], list[TokenSequence], list[TokenSequence]]:
    """One answer to each prompt, eight answers to each of some longer prompts, and eight that begin
    alike to the same prompts.

    The longer prompts begin with worked examples, other ones for each, so that nothing but the
    answers of one prompt share a prefix.
    """
    draw = random.Random(0)
    texts = [(f"Question: {row['question']}\nAnswer: ", row["answer"]) for row in rows]

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    def sequence(prompt: list[int], answer: list[int], prompt_id: str) -> TokenSequence:
        return _sequence(prompt, [*answer, tokenizer.eos_token_id], prompt_id)

    alone = [
        sequence(ids_of(prompt), ids_of(answer), f"alone-{i}")
        for i, (prompt, answer) in enumerate(draw.sample(texts, size.num_sequences))
    ]
    siblings, alike = [], []
    for i in range(size.num_prompts):
        *examples, (question, _) = draw.sample(texts, EXAMPLES + 1)
        prompt = ids_of("\n\n".join(a + b for a, b in examples) + "\n\n" + question)
        answers = [ids_of(answer) for _, answer in draw.sample(texts, ANSWERS)]
        common = [token for answer in answers for token in answer][:COMMON]
        siblings += [sequence(prompt, answer, f"siblings-{i}") for answer in answers]
        alike += [sequence(prompt, common + answer, f"alike-{i}") for answer in answers]
    return alone, siblings, alike


def _sequence(prompt: list[int], answer: list[int], prompt_id: str) -> TokenSequence:
    ids = prompt + answer
    return TokenSequence(
        sequence_id=digest_json([prompt_id, ids]),
        input_ids=np.array(ids, np.int32),
        loss_spans=((len(prompt), len(ids)),),
        prompt_id=prompt_id,
        domain="gsm8k",
        authors=("dataset",),
        finish_reason="dataset",
    )


def set_engine_environment() -> None:
    """Gives this process what an actor has on this machine; vLLM reads it when it is imported."""
    here = Resources(num_gpus=torch.cuda.device_count())
    os.environ.update(engine_env_vars(here, {}, os.environ))


async def run(data: Path, model: str | None, size: Size, vocabulary: int) -> list[dict[str, Any]]:
    """Makes the material, starts the engine and measures."""
    set_engine_environment()
    from teachers.engine.vllm_teacher import VllmTeacher

    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if model is None:
            model = str(folder / "model")
            make_model(
                folder / "model", [f"{r['question']}\n{r['answer']}" for r in rows], vocabulary
            )
        texts = sequences_of(rows, AutoTokenizer.from_pretrained(model), size)
        spec = EngineSpec(
            model=model,
            min_model_len=max(len(each.input_ids) for some in texts for each in some) + 1,
            # the dictionaries' texts need the tokenizer; the other ways do without it
            vllm={"enforce_eager": True, "skip_tokenizer_init": False},
            num_logprobs=max(WIDTHS),
            share_prefixes=True,
        )
        teacher = await VllmTeacher.start(spec)
        print(json.dumps(teacher.metadata()), flush=True)
        bench = Bench(teacher, folder, *texts)
        try:
            await bench.stage(64)  # the first calls allocate
            return await measure(bench, size)
        finally:
            teacher.shutdown()


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with train.jsonl")
    parser.add_argument(
        "--quick", action="store_true", help="k = 64 alone, less text, fewer rounds"
    )
    parser.add_argument("--json", type=Path, help="where to write rows and ratios")
    parser.add_argument("--model", help="a model folder instead of the small random one")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the random model")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    rows = asyncio.run(run(options.data, options.model, size, options.vocabulary))
    print_table(rows)
    found = ratios(rows)
    for name, ratio in found.items():
        print(f"{name}: {ratio:.3g}")
    if options.json:
        write_json(options.json, rows, found)


if __name__ == "__main__":
    main()
