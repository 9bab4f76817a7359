"""A score stage disturbed on purpose: what it works on, its processes, what must hold after.

What lies in storage is read with pyarrow alone; only the derived index is compared with what our
own code makes of the shards.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline import storage
from pipeline.cache.manifest import totals
from pipeline.cache.shard import read_shard_entry
from pipeline.fingerprint import sequence_id
from pipeline.layout import Layout
from pipeline.records import TokenSequence
from pipeline.sequences import read_dataset, read_sequences, write_dataset, write_sequences
from tests.support.command_line import QUICKSTART, polystill
from tests.support.quickstart import train_prompts

TEACHER, RUN = "arithmetic", "faults"
NUM_PROMPTS, PROMPTS_PER_SHARD = 600, 10
NUM_SHARDS = NUM_PROMPTS // PROMPTS_PER_SHARD
# No vocabulary has it: the engine refuses its sequence each time.
REFUSED_TOKEN = 10**6
# Batches are composed differently each time, which moves a float32 log-probability by about 1e-5
# nats; that may round to the neighbouring float16 (2**-10 of its size), and no further.
TOLERANCE = {"rtol": 2**-10, "atol": 5e-4}
MOVED = 0.01
"""Of all draws, at most: that rounding may move to another id."""


@dataclass(frozen=True)
class Material:
    """A root that is prepared up to scoring.

    Attributes:
        template: the folder, to be copied.
        prompts: the file of its prompts.
        sequence_ids: of its dataset, without the poison.
        poison: the sequence that no engine scores.
        env: of the actors.
        overrides: of the config, beside those that make the teacher.
    """

    template: Path
    prompts: Path
    sequence_ids: frozenset[str]
    poison: str
    # A thread each: the machine may be busy, and the model is tiny.
    env: Mapping[str, str] = field(default_factory=lambda: {"OMP_NUM_THREADS": "1"})
    overrides: tuple[str, ...] = ()

    def arguments(self, root: str | Path, run: str = RUN) -> list[str]:
        """Config and overrides of the quickstart's teacher of arithmetic alone, one engine."""
        # One sequence at a time: slow enough to be interrupted. Batching does not name a cache.
        engine = "{dtype: float32, max_num_seqs: 1, enforce_eager: true}"
        model = QUICKSTART / "teachers/arithmetic"
        teacher = f"{{model: {model}, vllm: {engine}, resources: {{num_cpus: 1}}}}"
        holdout = f"{{path: {QUICKSTART / 'holdout.jsonl'}, split: holdout, limit: 4}}"
        values = {
            "name": run,
            "storage.root": root,
            "storage.models_root": self.template.parent / "models",
            "prompts.sources": f"[{{path: {self.prompts}, split: train}}, {holdout}]",
            "prompts.checker": "null",
            "teachers": f"{{{TEACHER}: {teacher}}}",
            "synthesis.recipes": "[{type: dataset}]",
            "synthesis.filters": "[]",
            "synthesis.prompts_per_shard": PROMPTS_PER_SHARD,
            "combine.weights": f"{{type: static, teachers: {{{TEACHER}: 1.0}}}}",
            "cluster.local_num_cpus": 1,
            "cluster.env_vars": json.dumps(dict(self.env)),
        }
        config = str(QUICKSTART / "config.yaml")
        return [config, *(f"{key}={value}" for key, value in values.items()), *self.overrides]


def make_material(folder: Path, env: Mapping[str, str]) -> Material:
    """Prepares prompts and answers, and puts one poison sequence among those of one shard."""
    rows = train_prompts(TEACHER, NUM_PROMPTS)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    material = Material(folder / "template", prompts, frozenset(), "")
    for stage in ("prepare", "synthesize"):
        done = polystill(
            "stage", stage, *material.arguments(material.template), seconds=900, env=env
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return add_poison(material)


def add_poison(material: Material) -> Material:
    """Gives the dataset's first shard a sequence with a token that no engine knows."""
    layout = Layout(str(material.template), RUN)
    record = Path(layout.stage_record("synthesize"))
    outcome = json.loads(record.read_text())
    entries = read_dataset(layout, outcome["dataset"])
    first = [entry for entry in entries if entry.shard == entries[0].shard]
    input_ids = np.array([3, 4, REFUSED_TOKEN], np.int32)
    spans = ((1, 3),)
    poison = TokenSequence(
        sequence_id=sequence_id(input_ids, spans, "test"),
        input_ids=input_ids,
        loss_spans=spans,
        prompt_id="poison",
        domain=TEACHER,
        authors=("dataset",),
        finish_reason="stop",
    )
    healthy = read_sequences(str(material.template / first[0].shard))
    half = len(healthy) // 2
    shard = write_sequences(layout, TEACHER, [*healthy[:half], poison, *healthy[half:]])
    moved = [replace(entry, shard=shard) for entry in first]
    added = replace(
        moved[0],
        sequence_id=poison.sequence_id,
        prompt_id=poison.prompt_id,
        num_tokens=len(input_ids),
        num_positions=poison.num_positions,
    )
    rest = entries[len(first) :]
    outcome["dataset"] = write_dataset(layout, [*moved[:half], added, *moved[half:], *rest])
    record.write_text(json.dumps(outcome))
    healthy_ids = frozenset(entry.sequence_id for entry in entries)
    return Material(material.template, material.prompts, healthy_ids, poison.sequence_id)


def add_run(root: Path, run: str, sequences_per_shard: int) -> None:
    """Adds a run on the same sequences, which lie in other shards for it."""
    layout = Layout(str(root), run)
    shutil.copytree(Layout(str(root), RUN).run_folder, layout.run_folder)
    record = Path(layout.stage_record("synthesize"))
    outcome = json.loads(record.read_text())
    entries = read_dataset(layout, outcome["dataset"])
    held = {
        sequence.sequence_id: sequence
        for shard in {entry.shard for entry in entries}
        for sequence in read_sequences(str(root / shard))
    }
    moved = []
    for start in range(0, len(entries), sequences_per_shard):
        group = entries[start : start + sequences_per_shard]
        shard = write_sequences(layout, TEACHER, [held[entry.sequence_id] for entry in group])
        moved += [replace(entry, shard=shard) for entry in group]
    outcome["dataset"] = write_dataset(layout, moved)
    record.write_text(json.dumps(outcome))


def upload(folder: Path, root: str) -> None:
    """Copies a folder into an object store."""
    for path in folder.rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{root}/{path.relative_to(folder)}", path.read_bytes())


@dataclass(frozen=True)
class Store:
    """The cache below a storage root, a folder or a URI."""

    root: str

    @property
    def folder(self) -> str:
        """The only cache of the teacher."""
        filesystem, path = fs.FileSystem.from_uri(self.root)
        found = filesystem.get_file_info(fs.FileSelector(f"{path}/caches", allow_not_found=True))
        (name,) = [info.base_name for info in found if info.base_name.startswith(f"{TEACHER}-")]
        return f"{self.root}/caches/{name}"

    def files(self, suffix: str, folder: str = "") -> dict[str, int]:
        """Size of every finished file below the caches whose path fits, by URI."""
        filesystem, path = fs.FileSystem.from_uri(self.root)
        selector = fs.FileSelector(f"{path}/caches", recursive=True, allow_not_found=True)
        return {
            self.root + info.path.removeprefix(path): info.size
            for info in filesystem.get_file_info(selector)
            if info.path.endswith(suffix)
            and f"{folder}/" in info.path
            and not info.base_name.startswith(".")
        }

    def shards(self) -> dict[str, int]:
        """Size of every complete shard, by URI."""
        return self.files(".parquet", "/g1")

    def read(self, uri: str) -> bytes:
        filesystem, path = fs.FileSystem.from_uri(uri)
        with filesystem.open_input_file(path) as file:
            return file.readall()

    def rows(self) -> dict[str, list[dict[str, np.ndarray]]]:
        """The rows of all shards by sequence id, one for each shard that holds the sequence."""
        found = defaultdict(list)
        for uri in self.shards():
            filesystem, path = fs.FileSystem.from_uri(uri)
            for row in pq.read_table(path, filesystem=filesystem).to_pylist():
                found[row.pop("sequence_id")].append(_decoded(row))
        return dict(found)

    def quarantined(self) -> dict[str, str]:
        """The error of every sequence set aside."""
        records = [json.loads(self.read(uri)) for uri in self.files(".json", ".quarantine")]
        return {record["sequence_id"]: record["error"] for record in records}


def _decoded(row: dict[str, bytes]) -> dict[str, np.ndarray]:
    types = dict.fromkeys(("num_entries", "num_head", "token_ids_high", "counts"), "<u1")
    types["token_ids_low"] = "<u2"
    return {name: np.frombuffer(cell, types.get(name, "<f2")) for name, cell in row.items()}


def assert_same_rows(
    found: Mapping[str, dict[str, np.ndarray]], expected: Mapping[str, dict[str, np.ndarray]]
) -> None:
    """Two scorings of the same sequences: gold and head log-probabilities within `TOLERANCE`.

    A head may end one entry earlier or later where its mass lies on the bound of the selection, so
    each position's common prefix is compared. The last bit may also move a draw to a neighbour,
    which happens to few of them.
    """
    assert found.keys() == expected.keys()
    num_draws = num_moved = 0
    for name, row in expected.items():
        other = found[name]
        np.testing.assert_allclose(
            _floats(other, "gold_logprobs"),
            _floats(row, "gold_logprobs"),
            **TOLERANCE,
            err_msg=name,
        )
        lengths = np.stack([_head_lengths(each) for each in (other, row)])
        assert np.abs(np.diff(lengths, axis=0)).max() <= 1, f"{name}: entries {lengths}"
        common = lengths.min(axis=0)
        heads = [
            _prefixes(_floats(each, "logprobs"), _head_lengths(each), common)
            for each in (other, row)
        ]
        np.testing.assert_allclose(heads[0], heads[1], **TOLERANCE, err_msg=name)
        ids = [_prefixes(_token_ids(each), each["num_entries"], common) for each in (other, row)]
        # Only neighbours that are as good as equal may change places.
        swapped = ids[0] != ids[1]
        assert np.isin(ids[0][swapped], ids[1]).all(), f"{name}: other tokens"
        num_draws += int(row["counts"].sum(dtype=np.int64))
        num_moved += (_draws(row) - _draws(other)).total()
    assert num_moved <= MOVED * num_draws, f"{num_moved} of {num_draws} draws moved"


def _head_lengths(row: dict[str, np.ndarray]) -> np.ndarray:
    return row["num_head" if len(row["num_head"]) else "num_entries"].astype(np.int64)


def _draws(row: dict[str, np.ndarray]) -> Counter[tuple[int, int]]:
    """How often each token id was drawn at each position."""
    lengths = row["num_entries"].astype(np.int64)
    positions = np.repeat(np.arange(len(lengths)), lengths)
    places = np.arange(len(positions)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    drawn = places >= _head_lengths(row)[positions]
    pairs = zip(positions[drawn].tolist(), _token_ids(row)[drawn].tolist(), strict=True)
    return Counter(dict(zip(pairs, row["counts"].tolist(), strict=True)))


def _floats(row: dict[str, np.ndarray], column: str) -> np.ndarray:
    return row[column].astype(np.float64)


def _token_ids(row: dict[str, np.ndarray]) -> np.ndarray:
    return row["token_ids_low"].astype(np.int64) + 65536 * row["token_ids_high"].astype(np.int64)


def _prefixes(values: np.ndarray, lengths: np.ndarray, common: np.ndarray) -> np.ndarray:
    """The first entries of each position, one position after the other."""
    counts = lengths.astype(np.int64)
    starts = np.cumsum(counts) - counts
    return np.concatenate([values[a : a + n] for a, n in zip(starts, common, strict=True)])


def assert_whole(
    material: Material,
    store: Store,
    expected: Mapping[str, dict[str, np.ndarray]] | None,
    overlap: bool = False,
) -> dict[str, dict[str, np.ndarray]]:
    """Checks a finished cache; returns its rows.

    Exactly the dataset's sequences are there, each in one shard (with `overlap` in at least one,
    all of its rows alike) with the rows expected; the poison alone is quarantined, with its error;
    index and manifest are those that the shards give.
    """
    rows = store.rows()
    assert rows.keys() == material.sequence_ids
    twice = [name for name, found in rows.items() if len(found) > 1]
    assert overlap or not twice, f"in several shards: {twice}"
    for number in range(max(len(found) for found in rows.values())):
        some = {name: found[number] for name, found in rows.items() if len(found) > number}
        if expected is not None:
            assert_same_rows(some, {name: expected[name] for name in some})
    errors = store.quarantined()
    assert errors.keys() == {material.poison}
    assert "token ids outside 0 to" in errors[material.poison]
    assert_derived_from_shards(store)
    return {name: found[0] for name, found in rows.items()}


def assert_derived_from_shards(store: Store) -> None:
    """Index and manifest as they were written are what the shards alone give."""
    entries = [read_shard_entry(uri, size) for uri, size in sorted(store.shards().items())]
    (index,) = store.files(".index.parquet")
    filesystem, path = fs.FileSystem.from_uri(index)
    written = pq.read_table(path, filesystem=filesystem).to_pylist()
    assert [json.loads(json.dumps(asdict(entry))) for entry in entries] == [
        row | {name: json.loads(row[name]) for name in ("figures", "origin")} for row in written
    ]
    manifest = json.loads(store.read(f"{store.folder}/manifest.json"))
    assert manifest["totals"] == totals(entries).model_dump()
    engines = {json.dumps(entry.origin) for entry in entries}
    assert {json.dumps(engine) for engine in manifest["provenance"]["engines"]} == engines


def actors(head: psutil.Process) -> list[psutil.Process]:
    """The teachers' actors below a process, engines not included."""
    return [
        each
        for each in head.children(recursive=True)
        if title(each).startswith("ray::TeacherActor")
    ]


def engines(head: psutil.Process) -> list[psutil.Process]:
    """The engine processes below a process."""
    return [each for each in head.children(recursive=True) if "EngineCore" in title(each)]


def title(process: psutil.Process) -> str:
    """The command line of a process, which Ray and vLLM set to say what it is."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def kill(processes: list[psutil.Process]) -> int:
    """SIGKILLs processes by their ids, all at once; returns how many were still there."""
    killed = 0
    for process in processes:
        try:
            process.kill()
            killed += 1
        except psutil.NoSuchProcess:
            continue
    return killed
