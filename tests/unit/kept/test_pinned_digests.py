"""Names and digests that lie in users' folders, held to values that were written down before the
packages were moved.

A value that changes here makes caches, answers, trainings or checkpoints of users useless, although
nothing about them has changed. `expected.json` holds what these functions returned at commit
ead47cf, with the versions of checkers, and of the filters that use them, that judge now. None of it
depends on where the repository or a storage root lies. The hash of a tokenizer
depends on how the library `tokenizers` writes one down: an upgrade may change it, and all that it
enters.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs.bookkeeping.plan import STAGE_NAMES
from jobs.bookkeeping.stage_records import score_key, stage_key, synthesis_key
from jobs.cluster import stage_jobs
from jobs.cluster.submit import submission_id
from jobs.stages.prepare import prepare
from jobs.stages.synthesize import synthesize
from pipeline import storage
from pipeline.cache.projection import projection_matrix, to_bfloat16
from pipeline.cache.selection import select
from pipeline.cache.shard import write_shard
from pipeline.checkers.answer_checkers import checker_identity
from pipeline.config.combine import LearnedWeights
from pipeline.config.load import load_config
from pipeline.config.rounds import layout_of
from pipeline.config.run import Config
from pipeline.config.scoring import HeadAndSampled
from pipeline.config.teachers import EndpointTeacherConfig
from pipeline.fingerprint import (
    digest_bytes,
    digest_ids,
    digest_json,
    sequence_id,
    unit_interval,
)
from pipeline.layout import CacheLayout, Layout
from pipeline.records import DatasetEntry, HiddenStates, Prompt, SparseLogprobs, TokenSequence
from pipeline.run.preparation import preparation_key
from pipeline.run.prepared_run import Run
from pipeline.run.training_spec import training_specs
from pipeline.sequences import write_dataset, write_sequences
from pipeline.synthesis.answered_shards import shard_digest
from pipeline.synthesis.prompts import load_prompts
from pipeline.synthesis.steps import walk
from students.data.batches import DataOrder
from teachers.canary import canary_ids, full_step
from teachers.protocol import CapturedRows
from teachers.tokenizing import load_tokenizer
from tests.support.command_line import QUICKSTART, ROOT, file_times
from tests.unit.synthesis.test_recipes import Engines

DATA = ROOT / "tests/data/pinned"
EXPECTED = json.loads((DATA / "expected.json").read_text())
CONFIGS = {
    "quickstart": DATA / "quickstart.yaml",
    "hidden_states": DATA / "hidden_states.yaml",
    "rounds": DATA / "rounds.yaml",
    "endpoint": DATA / "endpoint.yaml",
}
LEARNED = {
    "weights": {
        "arithmetic": {"arithmetic": 0.75, "words": 0.25},
        "words": {"arithmetic": 0.125, "words": 0.875},
    },
    "provenance": {},
}


def load(name: str, root: Path, *overrides: str) -> Config:
    return load_config(CONFIGS[name], [f"storage.root={root}", *overrides])


def as_json(value: Any) -> Any:
    """The value as a JSON file gives it back."""
    return json.loads(json.dumps(value))


def at_a_fixed_place(config: Config) -> Config:
    """The config as it would be loaded in other folders, the same on every machine."""
    text = json.dumps(config.model_dump(mode="json"))
    text = text.replace(config.storage.root, "/storage").replace(str(ROOT), "/polystill")
    return Config.model_validate(json.loads(text))


def hand_made_sequences() -> list[TokenSequence]:
    made = []
    for number, domain in enumerate(("arithmetic", "words", "arithmetic")):
        ids = np.array([4, 5, 6, 7 + number, 9, 1], np.int32)
        spans = ((2, 4), (5, 6)) if number == 1 else ((3, 6),)
        identifier = sequence_id(ids, spans, "tokenizer")
        made.append(
            TokenSequence(identifier, ids, spans, f"p{number}", domain, (domain, "dataset"), "stop")
        )
    return made


def write_hand_made_dataset(layout: Layout) -> tuple[str, list[DatasetEntry]]:
    """Writes two shards of sequences and the dataset that names them."""
    sequences, entries = hand_made_sequences(), []
    for domain in ("arithmetic", "words"):
        members = [sequence for sequence in sequences if sequence.domain == domain]
        shard = write_sequences(layout, domain, members)
        for s in members:
            split = "holdout" if s.prompt_id == "p2" else "train"
            size = len(s.input_ids), s.num_positions
            entries.append(
                DatasetEntry(s.sequence_id, s.prompt_id, s.domain, split, s.authors, shard, *size)
            )
    return write_dataset(layout, entries), entries


def submitted(config: Config, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Name and metadata under which Ray and other submitters know the config's training job."""
    with monkeypatch.context() as patch:
        patch.setattr("jobs.cluster.stage_jobs.submit_stage", lambda client, **asked: asked)
        asked: Any = stage_jobs.submit(None, at_a_fixed_place(config), "train", ["stage", "train"])
    known = {key: asked[key] for key in ("run", "stage", "digest", "folder")}
    name = submission_id(asked["run"], asked["stage"], asked["digest"], 3)
    return known | {"submission_id": name}


def key_of_preparation(config: Config, monkeypatch: pytest.MonkeyPatch) -> str:
    """The key at a fixed place, of files with fixed sizes and times."""
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.storage.file_states", lambda path: [(path, 11, 12)])
        return preparation_key(at_a_fixed_place(config))


def steps_in_words(run: Run) -> dict[str, Any]:
    """Digest of every step, name of its prompts as one shard, and digests of its first prompts."""
    prompts = load_prompts(run.layout, run.prepared.prompts_digest)
    return {
        work.step.label: {
            "digest": work.digest,
            "num_prompts": len(work.prompts),
            "shard": shard_digest(work.prompts),
            "first": [[p.prompt_id, p.digest, p.split] for p in work.prompts[:2]],
        }
        for work in walk(run.config, run.layout, run.prepared.synthesis_digests, prompts)
    }


def values_of(config: Config, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names and digests of one round: all that lies on disk or decides what is resumed.

    The models and prompts are read and checked as in a run; the sequences are hand-made.
    """
    layout = layout_of(config)
    run = prepare(config)
    prepared = run.prepared
    dataset, _ = write_hand_made_dataset(layout)
    keys = {"synthesize": synthesis_key(run)}
    record = {"key": keys["synthesize"], "dataset": dataset}
    storage.write_json(layout.stage_record("synthesize"), record)
    if isinstance(config.combine.weights, LearnedWeights):
        storage.write_json(layout.learned_weights, LEARNED)
    keys["score"] = score_key(run)
    record = {"key": keys["score"], "dataset": dataset}
    storage.write_json(layout.stage_record("score"), record)
    keys |= {stage: stage_key(run, stage) for stage in STAGE_NAMES[3:]}
    rules = prepared.filters_before_scoring + prepared.filters_after_scoring
    found = storage.read_json(layout.prepared)
    del found["key"], found["change_times"]
    return as_json(
        {
            "prepared": found,
            "preparation_key": key_of_preparation(config, monkeypatch),
            "cache_fingerprints": {n: digest_json(r) for n, r in prepared.cache_identities.items()},
            "cache_folders": {
                name: cache.shards_folder.removeprefix(config.storage.root)
                for name, cache in run.cache_layouts().items()
            },
            "judgements": [digest_json(rule["rubric"]) for rule in rules if "rubric" in rule],
            "endpoint_canaries": {
                name: digest_json([prepared.identities[name], prepared.tokenizer_hash])
                for name, teacher in config.teachers.items()
                if isinstance(teacher, EndpointTeacherConfig)
            },
            "filters": [
                digest_json(prepared.filters_before_scoring),
                digest_json([prepared.filters_after_scoring, prepared.cache_identities]),
            ],
            "steps": steps_in_words(run),
            "dataset": dataset,
            "keys": keys,
            "trainings": {
                spec.student: {
                    "identity": spec.identity(),
                    "digest": digest_json(spec.identity()),
                    "seed": spec.seed,
                    "folder": spec.folder.removeprefix(config.storage.root),
                }
                for spec in training_specs(run, dataset)
            },
            "submitted": submitted(config, monkeypatch),
        }
    )


def second_round(root: Path) -> Config:
    """The second round of the config with rounds; its first round has exported a student."""
    first = load("rounds", root)
    exported = Path(layout_of(first).export_folder("student"))
    shutil.copytree(QUICKSTART / "teachers/words", exported)
    storage.write_json(layout_of(first).stage_record("export"), {"key": "exported"})
    return load("rounds", root, "round=2")


def assert_as_then(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compares one key after another; a key that was not written down may be new."""
    assert expected, "something was written down"
    for key, value in expected.items():
        assert found[key] == value, key


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_digests_of_a_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_as_then(values_of(load(name, tmp_path), monkeypatch), EXPECTED[name])


def test_names_and_digests_of_a_second_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_as_then(values_of(second_round(tmp_path), monkeypatch), EXPECTED["round 2"])


def written_by_replayed_engines(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Files, datasets and seeds of synthesis, in a round of teachers and one of the student."""
    files = load("rounds", root).student.files
    engines = Engines(
        load_tokenizer(files), lambda text, i: (f"{text[-3:]}{i % 3}", ["stop", "length"][i % 2])
    )
    monkeypatch.setattr("jobs.stages.synthesize.run_pools", engines)
    datasets = []
    for config in (load("rounds", root), second_round(root)):
        record = synthesize(prepare(config))
        datasets.append([record.dataset, record.key, record.counts])
    others = ("runs/rounds/export/", "marks/")  # marks have names by chance
    names = [name for name in file_times(root) if not name.startswith(others)]
    asked = sorted((who, text, sampling["seed"]) for who, text, sampling in engines.asked)
    return as_json({"files": sorted(names), "datasets": datasets, "asked": asked})


def test_names_of_what_synthesis_writes_and_the_seeds_it_asks_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_as_then(written_by_replayed_engines(tmp_path, monkeypatch), EXPECTED["synthesis"])


def identities_of_checkers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Identities of the shipped checkers, and of a user's, which its source decides."""
    rules = folder / "pinned_rules.py"
    rules.write_text("def same(answer, reference):\n    return answer == reference\n")
    monkeypatch.syspath_prepend(folder)
    return {name: checker_identity(name) for name in ("exact", "number", "pinned_rules.same")}


def test_identities_of_checkers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert identities_of_checkers(tmp_path, monkeypatch) == EXPECTED["checkers"]


def hash_of(array: np.ndarray) -> list[Any]:
    """Dtype and shape of an array, and a hash of its numbers."""
    little = array.astype(array.dtype.newbyteorder("<"))
    return [
        little.dtype.str,
        list(array.shape),
        hashlib.blake2b(little.tobytes(), digest_size=8).hexdigest(),
    ]


def captured_rows() -> CapturedRows:
    """Rows of three positions and eight entries, of numbers that a float32 holds exactly."""
    logprobs_PK = -np.array(
        [[0.5, 1.5, 2.5, 4, 5, 6, 7, 8], [0.25, 2, 4, 5, 6, 7, 8, 9], [1, 1.5, 2, 3, 4, 5, 6, 7]],
        np.float32,
    )
    token_ids_PK = (np.arange(24).reshape(3, 8) * 7 % 64).astype(np.int32)
    return CapturedRows(token_ids_PK, logprobs_PK, -np.array([1.5, 3, 5], np.float32))


def small_values() -> dict[str, Any]:
    """The digests and fixed draws themselves, of hand-made arguments."""
    prompts = [
        Prompt("p", "d", "train", messages=({"role": "user", "content": "Ähm"},), reference="r"),
        Prompt("q", "d", "holdout", text="raw"),
    ]
    rows = captured_rows()
    rule = HeadAndSampled(
        type="head_and_sampled", head_mass=0.5, max_head_entries=2, num_draws=12, renormalise=True
    )
    drawn = select(
        "s" * 32, rows.token_ids, rows.logprobs, rows.gold_logprobs, rule, teacher="teacher"
    )
    order = DataOrder(["b", "a", "b", "c"] * 3, [3, 1, 2, 5] * 3, 7, "dataset", 5)
    return as_json(
        {
            "digest_bytes": [digest_bytes(), digest_bytes(b"ab", b"c"), digest_bytes(b"a", b"bc")],
            "digest_json": digest_json({"b": [1, 2.5, None, True], "a": "Ä"}),
            "digest_ids": [digest_ids([]), digest_ids(["first", "second"])],
            "sequence_ids": [s.sequence_id for s in hand_made_sequences()],
            "unit_interval": unit_interval("p"),
            "prompts": [prompt.digest for prompt in prompts],
            "prompt_shard": shard_digest(prompts),
            "canary_ids": [canary_ids(33, 64), canary_ids(4, 16, 3), full_step(5, 64, 12, 8)],
            "data_order": [order.batch(step).tolist() for step in range(4)],
            "projection": hash_of(projection_matrix(12, 5, 3)),
            "drawn": {
                name: value.tolist()
                for name, value in vars(drawn).items()
                if isinstance(value, np.ndarray) and name not in ("logprobs", "entropies")
            },
        }
    )


def paths_of(layout: Layout | CacheLayout) -> dict[str, str]:
    """Every path that a layout gives, by its own place and name; with fixed arguments."""
    found = {}
    for name, value in vars(type(layout)).items():
        if isinstance(value, property):
            found[name] = getattr(layout, name)
        elif callable(value) and not name.startswith("_") and name != "cache":
            given = [2] if name == "of_round" else ["given"] * (value.__code__.co_argcount - 1)
            made = getattr(layout, name)(*given)
            found[name] = made if isinstance(made, str) else made.run
    kind = layout.run if isinstance(layout, Layout) else layout.name
    return {f"{kind}: {name}": path for name, path in found.items()}


def all_paths() -> dict[str, str]:
    """Paths of a run, of its second round and of a cache's second generation."""
    layout = Layout("/root", "run", "/models")
    cache = layout.cache("teacher+features", "0123456789abcdef0123456789abcdef", 2)
    return paths_of(layout) | paths_of(layout.of_round(2)) | paths_of(cache)


def test_digests_of_hand_made_values() -> None:
    assert_as_then(small_values(), EXPECTED["values"])


def test_paths_below_a_storage_root() -> None:
    assert_as_then(all_paths(), EXPECTED["paths"])


def table_of(path: str | Path) -> dict[str, Any]:
    """Content of a Parquet file: schema, metadata and cells, those of bytes as hex."""
    table = pq.read_table(path)
    metadata = table.schema.metadata or {}
    return {
        "schema": {field.name: str(field.type) for field in table.schema},
        "metadata": {key.decode(): text.decode() for key, text in metadata.items()},
        "rows": [
            {k: v.hex() if isinstance(v, bytes) else v for k, v in row.items()}
            for row in table.to_pylist()
        ],
    }


def written_tables(root: Path) -> dict[str, Any]:
    """Content of each kind of shard, and of a dataset, of hand-made numbers.

    The bytes of the files are left out: they may change with pyarrow, and nobody compares them.
    """
    row = SparseLogprobs(
        sequence_id="a" * 32,
        num_entries=np.array([2, 1], np.uint8),
        token_ids=np.array([3, 70000, 5], np.uint32),
        logprobs=np.array([-0.25, -2.0, -0.125], np.float16),
        counts=np.zeros(0, np.uint8),
        gold_logprobs=np.array([-0.25, -4.0], np.float16),
        tail_mass=np.array([1 - np.exp(-0.25) - np.exp(-2), 1 - np.exp(-0.125)], np.float16),
        entropies=np.array([0.75, 0.5], np.float16),
    )
    drawn = SparseLogprobs(
        sequence_id="b" * 32,
        num_entries=np.array([3], np.uint8),
        token_ids=np.array([3, 9, 5], np.uint32),
        logprobs=np.array([-0.5], np.float16),
        counts=np.array([6, 2], np.uint8),
        gold_logprobs=np.array([-0.5], np.float16),
        tail_mass=np.array([0.0625], np.float16),
        entropies=np.array([0.75], np.float16),
        num_head=np.array([1], np.uint8),
        renormalised=True,
    )
    values_PLH = np.arange(12, dtype=np.float32).reshape(2, 2, 3) / 4
    states = HiddenStates("c" * 32, to_bfloat16(values_PLH))
    origin = {"engine": "fake", "dtype": "float32"}
    found = {}
    for name, content in (("distributions", row), ("draws", drawn), ("states", states)):
        path = str(root / f"{name}.parquet")
        entry = write_shard(path, [content], "f" * 32, origin)
        found[name] = table_of(path) | {"digest": entry.digest, "checksum": entry.checksum}
    layout = Layout(str(root), "run")
    dataset, entries = write_hand_made_dataset(layout)
    found["dataset"] = table_of(layout.dataset(dataset)) | {"digest": dataset}
    for shard in sorted({entry.shard for entry in entries}):
        found[shard] = table_of(storage.join(layout.root, shard))
    return as_json(found)


def test_what_stands_in_shards_and_datasets(tmp_path: Path) -> None:
    assert_as_then(written_tables(tmp_path), EXPECTED["tables"])
