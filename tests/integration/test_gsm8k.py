"""GSM8K's rows end to end: teachers trained here, their caches, the student and a judge's replies
checked by transformers."""

import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.caches import (
    StoredSequence,
    assert_rows_agree,
    cache_folder,
    cached_rows,
    dataset,
    shards,
)
from tests.support.command_line import ROOT, file_times, polystill

pytestmark = pytest.mark.timeout(900)
DATA = ROOT / "tests/data/gsm8k"
TEACHERS = ("concise", "detailed")
MODELS = (*TEACHERS, "student", "twin")
DERIVED_FROM_SHARDS = ("manifest.json", "g1.index.parquet")
NUM_TRAIN, NUM_HOLDOUT, MAX_SEQUENCE_TOKENS, STEPS = 48, 16, 320, 20
# A float16 keeps 11 bits, so half of its last place is 2**-11 of the value; two float32 forwards of
# these models (vLLM's and transformers') differ by less than 1e-3 nats.
RELATIVE, ABSOLUTE = 2**-11, 1e-3
JUDGE, COMPARED, MOST_PROMPTS = "detailed", ("twin", "concise"), 8
TEMPLATE = ROOT / "pipeline/synthesis/templates/prefer.txt"
ROOM = 400  # tokens that the judge holds: the longest question is longer with two answers
OUTCOMES = {(1, 2): "wins", (2, 1): "losses", (3, 3): "ties"}
"""What replies mean where the student's answer stands first, and then second."""


@dataclass(frozen=True)
class Finished:
    """A run that is complete."""

    models: Path
    root: Path
    arguments: list[str]
    printed: str

    @property
    def folder(self) -> Path:
        return self.root / "runs/gsm8k"

    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "report.json").read_text())

    def again(self) -> str:
        """The same command once more; returns what it printed."""
        finished = polystill(*self.arguments, seconds=300)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two teachers of ten seconds each, and a run of every stage on a head of its own."""
    folder = tmp_path_factory.mktemp("gsm8k")
    models, root = folder / "models", folder / "output"
    script = ROOT / "examples/gsm8k/make_teachers.py"
    options = ["--seconds-per-teacher", "10", "--vocabulary-size", "512", "--threads", "1"]
    subprocess.run(
        [sys.executable, script, "--data", DATA, "--output", models, *options],
        check=True,
        capture_output=True,
    )
    overrides = {
        "storage.root": root,
        "prompts.sources.0.limit": NUM_TRAIN,
        "prompts.sources.1.limit": NUM_HOLDOUT,
        **{f"teachers.{name}.model": models / "teachers" / name for name in TEACHERS},
        f"teachers.{JUDGE}.vllm.max_model_len": ROOM,
        "student.model": models / "student",
        "synthesis.max_sequence_tokens": MAX_SEQUENCE_TOKENS,
        "synthesis.prompts_per_shard": 16,
        "training.steps": STEPS,
        "training.warmup_steps": 2,
        "training.sequences_per_step": 8,
        "training.log_every_steps": 1,
        "training.evaluate_every_steps": 10,
        "training.checkpoint_every_steps": 10,
        "evaluation.sampling.max_tokens": 16,
        "evaluation.max_prompts_per_domain": MOST_PROMPTS,
        "evaluation.judge": f"{{teacher: {JUDGE}, against: [{', '.join(COMPARED)}]}}",
    }
    arguments = ["run", "examples/gsm8k/config.yaml", *(f"{k}={v}" for k, v in overrides.items())]
    done = polystill(*arguments, seconds=700)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return Finished(models, root, arguments, done.stdout)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def logprobs_PV(model: Any, sequence: StoredSequence) -> np.ndarray:
    """Log-probabilities over the token at every position, given all tokens before it."""
    input_ids = torch.from_numpy(sequence.input_ids.astype(np.int64))
    logits_TV = model(input_ids=input_ids[None]).logits[0]
    return torch.log_softmax(logits_TV, dim=-1).numpy()[sequence.positions - 1]


def gold(rows_PV: np.ndarray, sequence: StoredSequence) -> np.ndarray:
    return np.take_along_axis(rows_PV, sequence.input_ids[sequence.positions][:, None], 1)[:, 0]


def numbers_in(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in numbers_in(item)]
    if isinstance(value, list):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, int | float) else []


def metrics(finished: Finished, student: str) -> list[dict[str, Any]]:
    lines = (finished.folder / student / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_sequence_has_the_row_that_transformers_computes(
    finished: Finished, teacher: str
) -> None:
    sequences = dataset(finished.root, "gsm8k")
    rows = cached_rows(shards(finished.root, teacher))
    assert rows.keys() == sequences.keys()
    model = load(finished.models / "teachers" / teacher)
    moved = []
    for name, sequence in sequences.items():
        expected_PV = logprobs_PV(model, sequence)
        tolerance = {"rtol": RELATIVE, "atol": ABSOLUTE, "err_msg": f"{teacher} {name}"}
        found, expected = rows[name]["gold_logprobs"], gold(expected_PV, sequence)
        np.testing.assert_allclose(found, expected, **tolerance)
        np.testing.assert_allclose(
            rows[name]["first_logprobs"], expected_PV.max(axis=1), **tolerance
        )
        moved.append(np.abs(found[1:] - expected[:-1]).mean())
    # The comparison is worth something: a row one position off would be far outside the tolerance.
    assert np.mean(moved) > 100 * ABSOLUTE


def test_sequences_that_are_too_long_are_dropped_and_counted(finished: Finished) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished.models / "student")
    rows = [
        json.loads(line)
        for name, limit in (("train", NUM_TRAIN), ("test", NUM_HOLDOUT))
        for line in (DATA / f"{name}.jsonl").read_text().splitlines()[:limit]
    ]
    whole = [
        tokenizer.encode(f"Question: {row['question']}\nAnswer:", add_special_tokens=False)
        + tokenizer.encode(f" {row['answer']}", add_special_tokens=False)
        + [tokenizer.eos_token_id]
        for row in rows
    ]
    kept = [ids for ids in whole if len(ids) <= MAX_SEQUENCE_TOKENS]
    found = [sequence.input_ids.tolist() for sequence in dataset(finished.root, "gsm8k").values()]
    assert found == kept
    assert 0 < len(kept) < len(whole)
    counts = finished.report()["synthesis"]["dataset"]
    assert (counts["answers"], counts["kept"]) == (len(whole), len(kept))
    assert counts["too_long"] == len(whole) - len(kept)


@pytest.mark.parametrize("student", ["student", "twin"])
def test_training_takes_the_configured_steps_and_learns(finished: Finished, student: str) -> None:
    summary = json.loads((finished.folder / student / "training.json").read_text())
    assert summary["steps"] == STEPS
    lines = metrics(finished, student)
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    assert list(losses) == list(range(1, STEPS + 1))
    first, last = list(losses.values())[:3], list(losses.values())[-3:]
    assert np.mean(last) < 0.95 * np.mean(first)
    holdout = {line["step"]: line["holdout/loss"] for line in lines if "holdout/loss" in line}
    assert list(holdout) == [10, 20] and holdout[20] < holdout[10]


@pytest.mark.parametrize("student", ["student", "twin"])
def test_the_exported_student_is_the_one_in_the_report(finished: Finished, student: str) -> None:
    folder = finished.folder / "export" / student
    assert AutoTokenizer.from_pretrained(folder).eos_token_id is not None
    model = load(folder)
    holdout = [s for s in dataset(finished.root, "gsm8k").values() if s.split == "holdout"]
    losses = -np.concatenate([gold(logprobs_PV(model, s), s) for s in holdout])
    (entry,) = [m for m in finished.report()["models"] if m["name"] == student]
    assert entry["parameters"] == model.num_parameters()
    measured = entry["domains"]["mathematics"]
    assert measured["holdout_tokens"] == len(losses)
    # Both are means of the same float32 log-probabilities, packed there and one by one here.
    assert measured["holdout_loss"] == pytest.approx(losses.mean(), abs=1e-4)
    assert 0 <= measured["exact_match"] <= 1 and measured["kl_to_mixture"] > 0


def test_the_report_is_complete_and_finite(finished: Finished) -> None:
    report = finished.report()
    assert [model["name"] for model in report["models"]] == list(MODELS)
    for model in report["models"]:
        assert model["domains"]["mathematics"]["prompts"] > 0
        assert model["tokens_per_second"] > 0 and model["latency_seconds"] > 0
    stages = ["prepare", "synthesize", "score", "train", "export", "evaluate"]
    assert [stage["stage"] for stage in report["stages"]] == stages
    assert all(math.isfinite(number) for number in numbers_in(report))
    num_sequences = len(dataset(finished.root, "gsm8k"))
    assert report["caches"].keys() == set(TEACHERS)
    for found in report["caches"].values():
        assert (found["num_sequences"], found["quarantined"]) == (num_sequences, 0)
        # The selection keeps entries up to a mass of 0.99, or 32 of them.
        assert 0 < found["kept_mass"] <= 1 and 1 <= found["entries_per_position"] <= 32
    weights = report["weights"]["mathematics"]
    assert weights.keys() == set(TEACHERS)
    assert all(0 < weight < 1 for weight in weights.values())
    assert sum(weights.values()) == pytest.approx(1)
    for student in ("student", "twin"):
        assert report["curves"][student] == metrics(finished, student)


def answers_of(finished: Finished, model: str) -> dict[str, str]:
    """Answers to the hold-out prompts by prompt id."""
    lines = (finished.folder / "answers" / f"{model}.jsonl").read_text().splitlines()
    return {line["prompt_id"]: line["answer"].strip() for line in map(json.loads, lines)}


class Judge:
    """The judge under transformers, asked for one of three digits.

    Attributes:
        replies: the digits in order of their logits by prompt, first and second answer; a question
            that leaves no room for a digit is not among them.
        close: questions whose two best digits an engine may exchange.
    """

    def __init__(self, finished: Finished) -> None:
        folder = finished.models / "teachers" / JUDGE
        self._tokenizer, self._model = AutoTokenizer.from_pretrained(folder), load(folder)
        (table,) = (finished.root / "prompts").glob("*.parquet")
        self._words = {row["prompt_id"]: row["text"] for row in pq.read_table(table).to_pylist()}
        self.replies: dict[tuple[str, str, str], int] = {}
        self.close: set[tuple[str, str, str]] = set()

    @torch.no_grad()
    def ask(self, prompt: str, first: str, second: str) -> int | None:
        """The likeliest digit, or None where the question is too long."""
        words = TEMPLATE.read_text().format(prompt=self._words[prompt], first=first, second=second)
        ids = self._tokenizer(words, return_tensors="pt")["input_ids"]
        if ids.shape[1] + 1 > ROOM:
            return None
        digits = self._tokenizer.convert_tokens_to_ids(["1", "2", "3"])
        best = self._model(input_ids=ids).logits[0, -1, digits].sort(descending=True)
        if best.values[0] - best.values[1] < 2 * ABSOLUTE:
            self.close.add((prompt, first, second))
        self.replies[prompt, first, second] = int(best.indices[0]) + 1
        return self.replies[prompt, first, second]


def test_the_judge_is_asked_in_both_orders_and_prefers_as_transformers_does(
    finished: Finished,
) -> None:
    judge, ours = Judge(finished), answers_of(finished, "student")
    rows = {row["other"]: row for row in finished.report()["preferences"]}
    page = (finished.folder / "report.html").read_text()
    assert rows.keys() == set(COMPARED) and len(ours) == MOST_PROMPTS
    for other in COMPARED:
        sure, unsure = Counter(), 0
        for prompt, theirs in answers_of(finished, other).items():
            if theirs == ours[prompt]:
                sure["same"] += 1
                continue
            orders = [(prompt, ours[prompt], theirs), (prompt, theirs, ours[prompt])]
            replies = tuple(judge.ask(*order) for order in orders)
            if judge.close.intersection(orders):
                unsure += 1
            else:
                # a digit that stays when the answers change places is no preference
                sure["unjudged" if None in replies else OUTCOMES.get(replies, "inconsistent")] += 1
        row = rows[other]
        kinds = (*OUTCOMES.values(), "inconsistent", "same", "unjudged")
        assert sum(row[kind] for kind in kinds) == row["prompts"] == MOST_PROMPTS
        assert all(sure[kind] <= row[kind] <= sure[kind] + unsure for kind in kinds), (row, sure)
        assert (row["judge"], row["domain"]) == (JUDGE, "mathematics")
        assert f"Against {other}, judged by {JUDGE}: " in page
        assert f"{other} {row['losses']} times of {MOST_PROMPTS}" in finished.printed
    assert any(row["unjudged"] for row in rows.values())
    stored = [
        reply
        for path in (finished.root / "judgements").glob("*/*.json")
        for reply in json.loads(path.read_text()).values()
    ]
    assert len(stored) == len(judge.replies) > 0 and set(stored) <= {1, 2, 3}
    moved = Counter(judge.replies.values()) - Counter(stored)
    assert moved.total() <= len(judge.close)


def test_the_html_report_needs_nothing_from_outside(finished: Finished) -> None:
    page = (finished.folder / "report.html").read_text()
    assert all(name in page for name in MODELS)
    fetched = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(["']?([^"')]+)""", page)
    targets = [first or second for first, second in fetched]
    assert [target for target in targets if not target.startswith(("#", "data:"))] == []
    assert "@import" not in page


def test_the_same_command_again_does_nothing(finished: Finished) -> None:
    before, started = file_times(finished.root), time.monotonic()
    printed = finished.again()
    assert time.monotonic() - started < 15
    assert "nothing to do" in printed and str(finished.folder / "report.html") in printed
    assert file_times(finished.root) == before


def test_train_starts_from_a_checkpoint_and_ends_with_an_export(finished: Finished) -> None:
    """Through every job up to the export, on the finished run's sequences and rows, with another
    target: a product, by confidence.
    """
    before = {name: [p.name for p in shards(finished.root, name)] for name in TEACHERS}
    checkpoint = finished.folder / f"student/checkpoints/step-{STEPS:08d}"
    _, config, *overrides = finished.arguments
    done = polystill(
        "train",
        config,
        *overrides,
        "name=again",
        "evaluation.twin=false",
        "evaluation.judge=null",
        "training.steps=3",
        "training.warmup_steps=0",
        "training.learning_rate=1e-6",
        "combine={method: product, weights: {type: confidence, temperature: 1, per: token}}",
        "--from-checkpoint",
        checkpoint,
        seconds=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert re.findall(r"\[\d/5 (\w+)\] done", done.stdout)[-2:] == ["train", "export"]
    assert "evaluate" not in done.stdout and str(finished.root / "runs/again") in done.stdout
    assert {name: [p.name for p in shards(finished.root, name)] for name in TEACHERS} == before
    folder = finished.root / "runs/again"
    summary = json.loads((folder / "student/training.json").read_text())
    assert summary["steps"] == 3 and summary["identity"]["combine"]["method"] == "product"
    lines = (folder / "student/metrics.jsonl").read_text().splitlines()
    first, last = json.loads(lines[0]), metrics(finished, "student")[-1]
    # a rate this low moves nothing: the hold-out still is as likely as at the checkpoint's end
    found = [json.loads(line) for line in lines if "holdout/cross_entropy" in line][-1]
    assert found["holdout/cross_entropy"] == pytest.approx(last["holdout/cross_entropy"], rel=1e-3)
    assert math.isfinite(first["train/forward_kl"]) and first["train/forward_kl"] > 0
    assert load(folder / "export/student").num_parameters() > 0


def test_a_lost_cache_shard_alone_is_made_again(finished: Finished) -> None:
    lost = shards(finished.root, "concise")[1]
    rows, before = cached_rows([lost]), file_times(finished.root)
    lost.unlink()
    printed = finished.again()
    assert "[3/6 score] done" in printed
    assert re.findall(r"\[\d/6 (\w+)\] up to date", printed) == [
        "prepare",
        "synthesize",
        "train",
        "export",
        "evaluate",
    ]
    after = file_times(finished.root)
    assert_rows_agree(cached_rows([lost]), rows)
    concise = cache_folder(finished.root, "concise").relative_to(finished.root)
    detailed = cache_folder(finished.root, "detailed").relative_to(finished.root)
    allowed = {
        str(lost.relative_to(finished.root)),
        *(f"{folder}/{name}" for folder in (concise, detailed) for name in DERIVED_FROM_SHARDS),
        "runs/gsm8k/config.yaml",
        "runs/gsm8k/run.lock",
        "runs/gsm8k/stages/score.json",
        "runs/gsm8k/stages/score.unended.json",
    }
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {name for name in changed if not name.startswith("runs/gsm8k/logs/")} <= allowed
    assert "nothing to do" in finished.again()
