"""Generated tokens per second: the whole synthesize stage beside the bare engine.

    python benchmarks/synthesis.py DATA [--quick] [--json PATH] [--model FOLDER]

One engine answers the same prompts (GSM8K's questions of DATA's `train.jsonl` and `test.jsonl`)
with the same sampling and seeds, in alternating rounds:

- `engine`: vLLM alone, all prompts at once, token ids in and out;
- `stage`: what a run's synthesize stage does: it reads the prompts, plans, keeps several shards in
  flight, makes sequences of the answers, writes shards and records, builds the dataset, and runs
  filters on it. The engine is in this process, where a run has it in a Ray actor; every round has
  a storage of its own. `share_asking` is the part of its time in which answers are written.

Without `--model` the engine is a small Llama of random weights, whose answers end by chance (at one
of every 64 tokens), so that most are short and a few are many times longer.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import AutoTokenizer

from benchmarks.capture import make_model, set_engine_environment
from benchmarks.common import print_table, write_json
from jobs.bookkeeping.stage_records import StageRecord
from jobs.stages import synthesize
from jobs.stages.prepare import prepare
from pipeline.config.run import Config
from pipeline.run.prepared_run import Run
from teachers.pool.contracts import PoolReport
from teachers.pool.dispatch import Dispatcher
from teachers.pool.pool import TeacherWork
from teachers.protocol import EngineSpec
from teachers.tasks.answer import AnswerTask
from teachers.tasks.items import prompt_seed
from teachers.tokenizing import prompt_ids, student_tokenizer

if TYPE_CHECKING:
    from teachers.engine.vllm_teacher import VllmTeacher

TEACHER = "teacher"
ENDS_ONE_IN = 64  # tokens at which an answer of the random model ends
TEMPLATE = "Question: {text}\nAnswer:"
FILTERS = [
    {"type": "repetition", "ngram": 4, "max_share": 0.9},
    {"type": "exact_duplicate", "of": "both"},
    {"type": "near_duplicate", "of": "both", "min_similarity": 0.8, "shingle": 9},
    {"type": "contamination", "ngram": 13},
]


@dataclass(frozen=True)
class Size:
    """How much is generated.

    Attributes:
        prompts: for training; a tenth as many are of the hold-out.
        shard: prompts of a unit of work.
        max_num_seqs: answers that the engine writes at once.
    """

    prompts: int
    shard: int
    max_num_seqs: int
    max_tokens: int
    rounds: int


FULL = Size(prompts=768, shard=128, max_num_seqs=64, max_tokens=512, rounds=5)
QUICK = Size(prompts=128, shard=32, max_num_seqs=16, max_tokens=256, rounds=1)


class Replica:
    """The engine of this process, as a pool sees it."""

    def __init__(self, teacher: VllmTeacher) -> None:
        self._teacher = teacher

    async def placed(self) -> None: ...

    async def ready(self) -> dict[str, Any]:
        return self._teacher.metadata()

    async def canary(self) -> None: ...

    async def run(self, task: Any) -> Any:
        return await task.run(self._teacher)

    async def peak_memory_bytes(self) -> None: ...

    async def stop(self) -> None: ...


class Bench:
    """One engine, and the stage around it."""

    def __init__(self, teacher: VllmTeacher, config: Config) -> None:
        self._teacher, self._config = teacher, config
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self.tasks: Sequence[AnswerTask] = ()
        self.record = StageRecord()
        self.seconds_asking: list[float] = []

    async def stage(self) -> tuple[int, float]:
        """Generated tokens and seconds, without what the prepare stage does before."""
        root = f"{self._config.storage.root}/{next(self._numbers)}"
        storage = self._config.storage.model_copy(update={"root": root})
        config = self._config.model_copy(update={"storage": storage})
        run = await asyncio.to_thread(prepare, config)
        started = time.perf_counter()
        self.record = await asyncio.to_thread(self._synthesize, run)
        seconds = time.perf_counter() - started
        return int(self.record.counts[TEACHER]["generated_tokens"]), seconds

    async def engine(self) -> tuple[int, float]:
        """The same for all prompts of the last stage at once, given as token ids."""
        from vllm import SamplingParams
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        tokenizer, _ = student_tokenizer(self._config.student.files)
        requests = []
        for task in self.tasks:
            for prompt in task.prompts:
                ends = [*task.sampling.get("stop_token_ids", ()), tokenizer.eos_token_id]
                seed = prompt_seed(prompt.prompt_id, task.author, task.seed)
                fixed = {"seed": seed, "stop_token_ids": ends, "detokenize": False}
                parameters = SamplingParams(
                    **task.sampling | fixed, output_kind=RequestOutputKind.FINAL_ONLY
                )
                requests.append((tokens_input(prompt_ids(tokenizer, prompt)), parameters))

        async def answer(prompt: Any, parameters: SamplingParams) -> int:
            name = f"bare-{next(self._numbers)}"
            stream = self._teacher.engine.llm.generate(prompt, parameters, name)
            (output,) = [output async for output in stream]
            return len(output.outputs[0].token_ids)

        started = time.perf_counter()
        tokens = await asyncio.gather(*(answer(*request) for request in requests))
        return sum(tokens), time.perf_counter() - started

    def _synthesize(self, run: Run) -> StageRecord:
        """In a thread, since it waits for its pools."""
        with patch.object(synthesize, "run_pools", self._run_pools):
            return synthesize.synthesize(run)

    def _run_pools(self, all_work: Sequence[TeacherWork]) -> dict[str, PoolReport]:
        """The pool's own dispatcher with the engine of this process."""
        (work,) = all_work
        self.tasks, started = work.tasks, time.perf_counter()
        dispatcher = Dispatcher(
            work.name, lambda: Replica(self._teacher), work.replicas, work.tasks
        )
        running = asyncio.run_coroutine_threadsafe(dispatcher.run(), self._loop)
        report = running.result()
        self.seconds_asking.append(time.perf_counter() - started)
        return {work.name: report}


async def measure(bench: Bench, rounds: int) -> list[dict[str, Any]]:
    """Rounds in which both have their turn, in turning order."""
    ways: dict[str, Callable[[], Awaitable[tuple[int, float]]]]
    ways = {"engine": bench.engine, "stage": bench.stage}
    tokens: dict[str, int] = {}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    shares: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in list(ways) if turn % 2 else reversed(ways):
            tokens[name], seconds = await ways[name]()
            rates[name].append(tokens[name] / seconds)
            asking = bench.seconds_asking[-1] if name == "stage" else seconds
            shares[name].append(asking / seconds)
        print(f"round {turn + 1} of {rounds}", flush=True)
    counts = bench.record.counts[TEACHER]
    kept = {"engine": None, "stage": int(counts["kept"])}
    dropped = {"engine": None, "stage": sum(each["dropped"] for each in bench.record.filters)}
    return [
        {
            "way": name,
            "prompts": sum(len(task) for task in bench.tasks),
            "generated_tokens": tokens[name],
            "kept": kept[name],
            "dropped_by_filters": dropped[name],
            "tokens_per_second": statistics.median(found),
            "lowest": min(found),
            "highest": max(found),
            "share_asking": statistics.median(shares[name]),
        }
        for name, found in rates.items()
    ]


def config_of(data: Path, root: Path, model: str, stops: list[int], size: Size) -> Config:
    """A run whose one teacher answers GSM8K's questions."""
    source = {
        "domain": "gsm8k",
        "fields": {"text": "question", "reference": "answer"},
        "template": TEMPLATE,
    }
    sampling: dict[str, Any] = {"temperature": 1.0, "max_tokens": size.max_tokens}
    vllm = {"enforce_eager": True, "max_num_seqs": size.max_num_seqs}
    parts = [
        ("train.jsonl", "train", size.prompts),
        ("test.jsonl", "holdout", max(1, size.prompts // 10)),
    ]
    return Config.model_validate(
        {
            "name": "benchmark",
            "seed": 0,
            "storage": {"root": str(root)},
            "prompts": {
                "sources": [
                    {"path": str(data.absolute() / file), "split": split, "limit": limit} | source
                    for file, split, limit in parts
                ]
            },
            "teachers": {TEACHER: {"model": model, "vllm": vllm}},
            "synthesis": {
                "recipes": [
                    {
                        "type": "answer",
                        "by": TEACHER,
                        "sampling": sampling | ({"stop_token_ids": stops} if stops else {}),
                    }
                ],
                "filters": FILTERS,
                "prompts_per_shard": size.shard,
            },
            "scoring": {"num_logprobs": 16, "selection": {"type": "top_k", "max_entries": 16}},
            "combine": {
                "method": "mixture",
                "weights": {"type": "static", "teachers": {TEACHER: 1.0}},
            },
            "student": {"model": model, "initialization": "random"},
            "training": {
                "losses": [{"type": "forward_kl", "weight": 1.0}],
                "steps": 1,
                "sequences_per_step": 1,
                "tokens_per_micro_batch": 4096,
                "learning_rate": 1e-4,
                "warmup_steps": 0,
                "evaluate_every_steps": 1,
                "checkpoint_every_steps": 1,
            },
            "evaluation": {"sampling": {"max_tokens": 1}},
        }
    )


async def run(data: Path, model: str | None, size: Size, vocabulary: int) -> list[dict[str, Any]]:
    """Makes the material, starts the engine and measures."""
    set_engine_environment()
    from teachers.engine.vllm_teacher import VllmTeacher

    with tempfile.TemporaryDirectory() as scratch:
        folder, stops = Path(scratch), []
        if model is None:
            model = str(folder / "model")
            rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
            texts = [f"{row['question']}\n{row['answer']}" for row in rows]
            make_model(folder / "model", texts, vocabulary)
            stops = list(range(1, len(AutoTokenizer.from_pretrained(model)), ENDS_ONE_IN))
        config = config_of(data, folder / "storage", model, stops, size)
        prepared = prepare(config).prepared
        spec = EngineSpec(
            model=model,
            min_model_len=prepared.longest_prompt + size.max_tokens,
            vllm=config.teachers[TEACHER].vllm,
            seed=config.seed,
            eos_token_ids=prepared.answer_ends.ids,
        )
        teacher = await VllmTeacher.start(spec)
        print(json.dumps(teacher.metadata()), flush=True)
        bench = Bench(teacher, config)
        try:
            await bench.stage()  # the first calls allocate
            return await measure(bench, size.rounds)
        finally:
            teacher.shutdown()


def main() -> None:
    """Measures, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path, help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--quick", action="store_true", help="fewer prompts, one round")
    parser.add_argument("--json", type=Path, help="where to write rows and ratios")
    parser.add_argument("--model", help="a model folder instead of the small random one")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the random model")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    rows = asyncio.run(run(options.data, options.model, size, options.vocabulary))
    print_table(rows)
    rate = {row["way"]: row["tokens_per_second"] for row in rows}
    found = {"stage_over_engine": rate["stage"] / rate["engine"]}
    for name, ratio in found.items():
        print(f"{name}: {ratio:.3g}")
    if options.json:
        write_json(options.json, rows, found)


if __name__ == "__main__":
    main()
