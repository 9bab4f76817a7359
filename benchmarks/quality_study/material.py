"""What the students of `benchmarks/quality.py` learn from: texts of two domains, a teacher of each,
the teachers' answers, and the cached rows that a selection keeps of their distributions.

`gsm8k` are GSM8K's questions, continued by their answers; `code` are pieces of the standard
library's source, continued by what follows. Whole files and questions belong to one split. A
teacher learns the train split of its own domain alone, less than twice, and both speak one
byte-level BPE. Teachers score and write through transformers: same numbers as under vLLM, without
an engine's start.

All lies in one folder, named by the digest of what decides it, each file complete or absent.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.quality_study import training
from benchmarks.quality_study.training import CROSS_ENTROPY, logprobs_of, steps, text_alone, train
from examples.gsm8k import make_teachers as gsm8k
from pipeline.cache import selection
from pipeline.cache.shard import ShardEntry, read_shard, read_shard_entry, write_shard
from pipeline.config.scoring import Selection
from pipeline.fingerprint import digest_bytes, digest_json, sequence_id, unit_interval
from pipeline.layout import Layout
from pipeline.records import SparseLogprobs, TokenSequence
from pipeline.sequences import read_sequences, write_sequences
from pipeline.storage import read_json, write_json
from students.architecture.build import load_model
from students.model import StudentModule
from teachers.tokenizing import tokenizer_hash

DOMAINS = ("gsm8k", "code")
"""Of the texts; the teachers have the same names."""
SPLITS = ("train", "validation", "holdout")
WHOLE, SYNTHETIC = "whole-train", "synthetic"
"""Beside the splits: all of the train split, for the teachers; and what these wrote."""
MIN_SEQUENCES = 4
MAX_TOKENS = 320
WINDOW, WINDOW_PROMPT = 192, 48
"""Tokens of a piece of code, and those of them that are the prompt."""
SHARE_HELD = 0.1
"""Of files and questions for validation; of the files as many for the hold-out."""
LEFT_OUT = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo"}
GENERATED_AT_ONCE = 128
TEACHER_GROUP, TEACHER_RATE = 8, 2e-3


@dataclass(frozen=True)
class Shape:
    """Of a Llama."""

    hidden: int
    intermediate: int
    layers: int


@dataclass(frozen=True)
class MaterialSize:
    """What teachers are, and how much there is to learn.

    Attributes:
        code_characters: of the train split's source at most; a tenth of it in the others.
        teacher_positions: that each teacher is trained on.
        train: sequences of each domain for the students.
        held: sequences of each domain for validation, and as many for the hold-out.
    """

    vocabulary: int
    teacher: Shape
    code_characters: int
    teacher_positions: int
    train: int
    held: int


@dataclass(frozen=True)
class Material:
    """A folder with tokenizer, sequences, teachers and rows."""

    folder: Path

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return PreTrainedTokenizerFast.from_pretrained(self.folder / "tokenizer")

    def teacher(self, name: str) -> PreTrainedModel:
        return load_model(self.folder / "teachers" / name)

    def sequences(self, domain: str, split: str) -> list[TokenSequence]:
        named = read_json(str(self.folder / f"{split}-{domain}.json"))
        return read_sequences(str(self.folder / named["shard"]))

    def rows(self, teacher: str, rule: Selection, split: str) -> dict[str, SparseLogprobs]:
        """By sequence, all that the teacher has scored."""
        return {row.sequence_id: row for row in read_shard(str(self._shard(teacher, rule, split)))}

    def shard(self, teacher: str, rule: Selection, split: str) -> ShardEntry:
        """Size and quality of what `rows` reads."""
        path = self._shard(teacher, rule, split)
        return read_shard_entry(str(path), path.stat().st_size)

    def score(self, teacher: str, rules: Mapping[Selection, Sequence[str]], split: str) -> None:
        """Has a teacher's rows written that are missing, from its whole distributions: teachers as
        small as these are so flat that 256 entries would leave out up to a quarter of their mass.

        Args:
            rules: with the domains whose sequences are scored.
        """
        missing = {
            rule: domains
            for rule, domains in rules.items()
            if not self._shard(teacher, rule, split).exists()
        }
        if not missing:
            return
        sequences = [s for domain in DOMAINS for s in self.sequences(domain, split)]
        wanted = {domain for domains in missing.values() for domain in domains}
        sequences = [each for each in sequences if each.domain in wanted]
        found: dict[Selection, dict[int, SparseLogprobs]] = {rule: {} for rule in missing}
        for i, logprobs_PV in logprobs_of(self.teacher(teacher), sequences):
            each = sequences[i]
            gold_P1 = torch.from_numpy(each.gold_ids.astype(np.int64))[:, None]
            top_PK, ids_PK = logprobs_PV.sort(dim=-1, descending=True)
            captured = (
                ids_PK.numpy().astype(np.int32),
                top_PK.numpy(),
                logprobs_PV.gather(1, gold_P1).squeeze(1).numpy(),
            )
            for rule, domains in missing.items():
                if each.domain in domains:
                    found[rule][i] = selection.select(
                        each.sequence_id, *captured, rule, teacher=teacher
                    )
        for rule, rows in found.items():
            in_order = [rows[i] for i in sorted(rows)]
            write_shard(str(self._shard(teacher, rule, split)), in_order, self.folder.name)

    def train_teacher(self, name: str, size: MaterialSize) -> None:
        """Trains the teacher of a domain unless it exists."""
        folder = self.folder / "teachers" / name
        if folder.exists():
            return
        shape, tokenizer = size.teacher, self.tokenizer
        torch.manual_seed(DOMAINS.index(name))
        module = StudentModule(
            LlamaForCausalLM(gsm8k.llama_config(tokenizer, **asdict(shape))), CROSS_ENTROPY
        )
        whole = [
            text_alone(replace(s, loss_spans=((1, len(s.input_ids)),)))
            for s in self.sequences(name, WHOLE)
        ]
        train(
            module,
            steps({name: whole}, TEACHER_GROUP, DOMAINS.index(name)),
            lambda _, batch: module(batch)[0],
            size.teacher_positions,
            TEACHER_RATE,
        )
        unfinished = self.folder / f"teachers/{name}.unfinished"
        module.model.save_pretrained(unfinished)
        os.replace(unfinished, folder)

    def write_answers(self, name: str) -> None:
        """Has a teacher continue the prompts of its own domain's train split, unless it has."""
        if not (self.folder / f"{SYNTHETIC}-{name}.json").exists():
            answers = _answers(self.teacher(name), self.tokenizer, self.sequences(name, "train"))
            _write(self.folder, SYNTHETIC, name, answers)

    def _shard(self, teacher: str, rule: Selection, split: str) -> Path:
        code = digest_bytes(Path(selection.__file__).read_bytes())
        name = digest_json([rule.model_dump(mode="json"), code])[:12]
        return self.folder / f"rows/{teacher}-{split}-{rule.type}-{name}.parquet"


def make_material(data: Path, output: Path, size: MaterialSize) -> Material:
    """Tokenizer and sequences of all splits, made where they do not exist.

    Raises:
        ValueError: DATA or the standard library has too little text.
    """
    code = _code(size.code_characters)
    sources = [Path(__file__), Path(training.__file__), Path(gsm8k.__file__)]
    questions = [data / "train.jsonl", data / "test.jsonl"]
    digest = digest_json(
        [
            asdict(size),
            [digest_bytes(path.read_bytes()) for path in [*sources, *questions]],
            digest_json(code),
        ]
    )
    material = Material(output / f"quality-{digest[:12]}")
    if not (material.folder / "holdout-code.json").exists():  # which is written last
        _write_texts(material.folder, questions, code, size)
    return material


def _write_texts(
    folder: Path, questions: Sequence[Path], code: dict[str, list[str]], size: MaterialSize
) -> None:
    answered, held_out = (gsm8k.read_rows(path) for path in questions)
    num_held = int(SHARE_HELD * len(answered))
    rows = {
        "train": answered[num_held:],
        "validation": answered[:num_held],
        "holdout": held_out,
    }
    texts = [*(row.text for row in rows["train"]), *code["train"]]
    tokenizer = gsm8k.build_tokenizer(texts, size.vocabulary)
    tokenizer.save_pretrained(folder / "tokenizer")
    digest = tokenizer_hash(tokenizer)
    for split in SPLITS:
        most = size.train if split == "train" else size.held
        given = [
            _sequence(ids, start, "gsm8k", "dataset", digest)
            for ids, start in gsm8k.encode(tokenizer, rows[split])
            if len(ids) <= MAX_TOKENS
        ]
        for domain, found in {"gsm8k": given, "code": _windows(tokenizer, code[split])}.items():
            if len(found) < MIN_SEQUENCES:
                raise ValueError(f"{len(found)} sequences of {domain} for {split} are too few")
            if split == "train":
                _write(folder, WHOLE, domain, found)
            _write(folder, split, domain, found[:most])


def _write(folder: Path, split: str, domain: str, found: list[TokenSequence]) -> None:
    """The shard, then the file that names it."""
    shard = write_sequences(Layout(str(folder), "quality"), domain, found)
    write_json(str(folder / f"{split}-{domain}.json"), {"shard": shard})


def _code(most_characters: int) -> dict[str, list[str]]:
    """By split the standard library's files, in the order of their hashed names."""
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in root.rglob("*.py")]
    found: dict[str, list[str]] = {split: [] for split in SPLITS}
    room = {
        "train": most_characters,
        "validation": most_characters // 10,
        "holdout": most_characters // 10,
    }
    for name in sorted(names, key=lambda name: digest_bytes(name.encode())):
        if LEFT_OUT & set(name.split("/")):
            continue
        place = unit_interval(name)
        split = SPLITS[(place < 2 * SHARE_HELD) + (place < SHARE_HELD)]
        if room[split] > 0:
            text = (root / name).read_text(encoding="utf-8", errors="ignore")[: room[split]]
            room[split] -= len(text)
            found[split].append(text)
    return found


def _windows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[TokenSequence]:
    """Pieces of equal length from all files, in the order of their ids."""
    windows, digest = {}, tokenizer_hash(tokenizer)
    for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        for start in range(0, len(ids) - WINDOW + 1, WINDOW):
            piece = ids[start : start + WINDOW]
            sequence = _sequence(piece, WINDOW_PROMPT, "code", "dataset", digest)
            windows[sequence.sequence_id] = sequence
    return [windows[name] for name in sorted(windows)]


def _sequence(
    ids: Sequence[int],
    start: int,
    domain: str,
    generator: str,
    tokenizer_digest: str,
) -> TokenSequence:
    """Of a prompt up to index `start` and what is learned behind it."""
    input_ids, spans = np.array(ids, np.int32), ((start, len(ids)),)
    name = sequence_id(input_ids, spans, tokenizer_digest)
    prompt = digest_json([int(i) for i in ids[:start]])
    return TokenSequence(name, input_ids, spans, prompt, domain, (generator,), "dataset")


@torch.no_grad()
def _answers(
    teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, given: list[TokenSequence]
) -> list[TokenSequence]:
    """Sampled at temperature 1 to the same longest sequence; one that does not end is cut there."""
    torch.manual_seed(0)
    domain, eos, digest = given[0].domain, tokenizer.eos_token_id, tokenizer_hash(tokenizer)
    most = max(len(each.input_ids) for each in given)
    prompts = sorted((s.input_ids[: s.loss_spans[0][0]].tolist() for s in given), key=len)
    found: dict[str, TokenSequence] = {}
    for first in range(0, len(prompts), GENERATED_AT_ONCE):
        chosen = prompts[first : first + GENERATED_AT_ONCE]
        longest = max(map(len, chosen))
        padded = [[tokenizer.pad_token_id] * (longest - len(ids)) + ids for ids in chosen]
        written = teacher.generate(
            torch.tensor(padded),
            attention_mask=torch.tensor(
                [[0] * (longest - len(ids)) + [1] * len(ids) for ids in chosen]
            ),
            generation_config=GenerationConfig(
                do_sample=True,
                top_k=0,
                max_new_tokens=most - longest,
                eos_token_id=eos,
                pad_token_id=tokenizer.pad_token_id,
            ),
        )
        for ids, row in zip(chosen, written[:, longest:].tolist(), strict=True):
            answer = row[: row.index(eos) + 1] if eos in row else row
            sequence = _sequence([*ids, *answer], len(ids), domain, domain, digest)
            found[sequence.sequence_id] = sequence
    return [found[name] for name in sorted(found)]
