"""A run whose sequences and caches are made on the spot, and teachers that need no engine."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from jobs.stages.score import score
from pipeline import storage
from pipeline.config.load import dump_config, load_config
from pipeline.config.rounds import layout_of
from pipeline.config.run import Config
from pipeline.fingerprint import digest_bytes, sequence_id
from pipeline.layout import Layout
from pipeline.records import DatasetEntry, TokenSequence
from pipeline.run.identities import cache_identities
from pipeline.run.preparation import Prepared, preparation_key, save_prepared
from pipeline.run.prepared_run import Run
from pipeline.sequences import write_dataset, write_sequences
from teachers.pool.contracts import PoolReport
from teachers.protocol import CapturedRows, EarlierRows, ScoringRequest
from tests.support.command_line import QUICKSTART

VOCABULARY, WIDTH, HIDDEN = 20, 16, 12
TOKENIZER = "tokenizer"
ENGINE = {"engine": "fake", "dtype": "float32", "capture": "arrays", "prefix_sharing": False}


@dataclass
class FakeTeacher:
    """A teacher that scores by a hash of the tokens so far.

    Attributes:
        salt: enters the hash; another salt makes another model.
        layers: layers whose hidden states it captures. Each state begins with its layer and the
            index of its token.
    """

    salt: str
    layers: tuple[int, ...] = ()
    version: str = "1"
    asked: list[tuple[bool, bool]] = field(default_factory=list)

    async def score(
        self, request: ScoringRequest, earlier: EarlierRows | None = None
    ) -> CapturedRows:
        """The teacher's contract, of numbers that mean nothing but always come out the same."""
        input_ids, first_index = request.input_ids, request.first_index
        self.asked.append((request.distributions, request.hidden_states))
        hidden_states = None
        if request.hidden_states:
            hidden_states = self._hidden_states(input_ids, first_index)
        if not request.distributions:
            rows = CapturedRows.without_distributions(len(input_ids) - first_index)
            return replace(rows, hidden_states=hidden_states)
        rows = [self._row(input_ids[:i]) for i in range(first_index, len(input_ids))]
        logprobs_PV = np.array(rows, dtype=np.float32)
        order_PK = np.argsort(-logprobs_PV, axis=1, kind="stable")[:, :WIDTH]
        gold = np.array(input_ids[first_index:])
        return CapturedRows(
            order_PK.astype(np.int32),
            np.take_along_axis(logprobs_PV, order_PK, axis=1),
            logprobs_PV[np.arange(len(gold)), gold],
            hidden_states,
        )

    def metadata(self) -> dict[str, Any]:
        """Fulfils the protocol."""
        return ENGINE | {"engine_version": self.version, "max_model_len": 99}

    def _hidden_states(self, input_ids: list[int], first_index: int) -> np.ndarray:
        """float32[P, L, HIDDEN], exact in bfloat16."""
        assert self.layers, "an engine without a connector captures no states"
        rows = []
        for i in range(first_index - 1, len(input_ids) - 1):
            row = self._row(input_ids[: i + 1])[: HIDDEN - 2].round()
            rows.append([[layer, i, *row] for layer in self.layers])
        return np.array(rows, np.float32)

    def _row(self, before: list[int]) -> np.ndarray:
        seed = int(digest_bytes(self.salt.encode(), bytes(before))[:8], 16)
        logits = np.random.default_rng(seed).normal(0, 3, VOCABULARY)
        return logits - np.log(np.exp(logits).sum())


@dataclass
class FakePools:
    """Stands for `run_pools`: runs every task at once, and keeps the sequences that were scored.

    Attributes:
        salts: salts by teacher; another salt changes the teacher's numbers.
        version: version of the engines.
        fails: error that is raised instead of the second task, as if the job were killed there.
        scored: teacher and id of every sequence that was scored.
        asked: for every such sequence, whether distributions and hidden states were asked for.
    """

    salts: dict[str, str] = field(default_factory=dict)
    version: str = "1"
    fails: Exception | None = None
    scored: list[tuple[str, str]] = field(default_factory=list)
    asked: list[tuple[bool, bool]] = field(default_factory=list)

    def __call__(self, works: Sequence[Any]) -> dict[str, PoolReport]:
        reports = {}
        for work in works:
            salt = self.salts.get(work.name, work.name)
            teacher = FakeTeacher(salt, work.spec.hidden_layers, self.version, self.asked)
            report = PoolReport()
            for number, task in enumerate(work.tasks):
                if self.fails is not None and number == 1:
                    raise self.fails
                report.results.append(asyncio.run(task.run(teacher)))
                self.scored += [(work.name, identifier) for identifier in task.sequence_ids]
            report.engines = [teacher.metadata()] if work.tasks else []
            reports[work.name] = report
        return reports


@dataclass
class FabricatedRun:
    """A run below `root` whose prompts, answers and identities exist only in its files."""

    root: Path
    name: str = "quickstart"
    overrides: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> list[str]:
        """Arguments of the command line."""
        own = [f"storage.root={self.root}", f"name={self.name}", "scoring.num_logprobs=16"]
        return [str(QUICKSTART / "config.yaml"), *own, *self.overrides]

    @property
    def config(self) -> Config:
        path, *overrides = self.arguments
        return load_config(path, overrides)

    @property
    def layout(self) -> Layout:
        return layout_of(self.config)

    def prepare(self) -> Run:
        """Writes what the prepare stage would write."""
        config = self.config
        identities = {name: {"weights": name} for name in config.teachers}
        prepared = Prepared(
            key=preparation_key(config),
            prompts_digest="p",
            prompt_counts={},
            longest_prompt=4,
            tokenizer_hash=TOKENIZER,
            eos_token_id=1,
            cache_identities=cache_identities(config, identities, TOKENIZER),
            synthesis_identities={},
            student_identity={"model": "student"},
            identities=identities,
            hidden_sizes=dict.fromkeys(config.training.teacher_layers, HIDDEN),
        )
        storage.write_bytes(self.layout.resolved_config, dump_config(config).encode())
        save_prepared(self.layout, prepared)
        return Run(config, self.layout, prepared)

    def write_answers(self, first: int, last: int, split: str = "train") -> list[DatasetEntry]:
        """Adds one shard for each domain, with the sequences `first` to `last`, to the dataset."""
        entries = self.entries()
        for domain in ("arithmetic", "words"):
            sequences = [make_sequence(domain, number) for number in range(first, last)]
            shard = write_sequences(self.layout, domain, sequences)
            entries += [
                DatasetEntry(
                    s.sequence_id,
                    s.prompt_id,
                    domain,
                    split,
                    s.authors,
                    shard,
                    len(s.input_ids),
                    s.num_positions,
                )
                for s in sequences
            ]
        record = {"key": "none", "dataset": write_dataset(self.layout, entries)}
        storage.write_json(self.layout.stage_record("synthesize"), record)
        return entries

    def entries(self) -> list[DatasetEntry]:
        """Entries that the dataset holds so far."""
        from pipeline.sequences import read_dataset

        path = Path(self.layout.stage_record("synthesize"))
        if not path.exists():
            return []
        return list(read_dataset(self.layout, json.loads(path.read_text())["dataset"]))

    def score(self) -> str:
        """Runs the score stage with the pools that stand in for engines; returns the dataset."""
        digest = storage.read_json(self.layout.stage_record("synthesize"))["dataset"]
        return str(score(self.prepare(), digest).dataset)

    def shards(self, teacher: str, generation: int = 1) -> dict[str, tuple[int, int]]:
        """Modification time in ns and inode of every shard, by name."""
        paths = self.root.glob(f"caches/{teacher}-*/g{generation}/*.parquet")
        return {p.stem: (p.stat().st_mtime_ns, p.stat().st_ino) for p in sorted(paths)}


def make_sequence(domain: str, number: int) -> TokenSequence:
    """A sequence of 8 to 12 tokens; the first 4 are its prompt."""
    rng = np.random.default_rng([len(domain), number])
    ids = rng.integers(4, VOCABULARY, 8 + number % 5).astype(np.int32)
    spans = ((4, len(ids)),)
    identifier = sequence_id(ids, spans, TOKENIZER)
    return TokenSequence(identifier, ids, spans, f"{domain}-{number}", domain, (domain,), "stop")
